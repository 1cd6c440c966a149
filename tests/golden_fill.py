"""Deterministic parameter values, the same in every language.

Golden files that store no parameters were made with these: a 64-bit mix of
the tensor's name and the element's index, in exact integer arithmetic.
"""

import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"
MEAN = np.array([125.3, 123.0, 113.9]) / 255
STD = np.array([63.0, 62.1, 66.7]) / 255


def load(file: str) -> dict[str, np.ndarray]:
  """Reads `golden/{file}.npz`."""
  with np.load(FOLDER / f"{file}.npz", allow_pickle=False) as arrays:
    return dict(arrays)


def images(golden: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the network's input for the raw images of a golden file."""
  return ((golden["image_u8"] / 255 - MEAN) / STD).astype(np.float32)


def values(name: str, shape: tuple[int, ...], salt="public:") -> np.ndarray:
  """Returns the float32 values of the tensor called `name`."""
  index = np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint64)
  seed = zlib.crc32(f"{salt}{name}".encode()) + 1
  offset = np.uint64(seed * 0xD1B54A32D192ED03 % 2**64)
  x = index * np.uint64(0x9E3779B97F4A7C15) + offset
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  x = x ^ (x >> np.uint64(31))
  s = 2 * ((x >> np.uint64(40)) / 2.0**24).reshape(shape) - 1
  kind = name.rsplit(".", 1)[-1]
  if kind == "kernel":
    s *= np.sqrt(6 / np.prod(shape[:-1]))
  elif kind == "scale":
    s = 1 + 0.1 * s
  elif kind == "bias":
    s *= 0.1
  else:
    raise ValueError(f"name={name!r} must end in kernel, scale or bias")
  return s.astype(np.float32)


def name_of(path, prefix: str = "") -> str:
  """Returns the golden files' name for a leaf of a branch's params."""
  name = ".".join(str(key.key) for key in path)
  name = name.replace("norm", "bn").replace("readout.dense", "fc")
  return prefix + name


def fill(tree, prefix: str = ""):
  """Replaces every leaf of `tree` (anything with a shape) by its values."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(values(name_of(path, prefix), leaf.shape)),
    tree,
  )


def by_name(tree, prefix: str = "") -> dict[str, np.ndarray]:
  """Flattens `tree` to the golden files' names."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {name_of(path, prefix): np.asarray(leaf) for path, leaf in leaves}


def distance(got, want) -> float:
  """Returns the largest difference over the largest wanted magnitude."""
  return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())
