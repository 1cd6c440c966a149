"""A trained network as files that answer without its run or its data.

One holds what XLA needs, parameters included, by `jax.export`: no code of ours,
no pickle; the other says what it is, and has the hash of the first. A network
takes images as they are stored, any number of them, and gives each its class
and the score that won. Heads that are not in it cannot answer: their classes
are named, and no image is given to one of them.
"""

import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from mhil import bank as bank_lib
from mhil import facts, phases, programs, scoring, sharding
from mhil import run as run_lib

PROGRAM, ABOUT = "network.bin", "network.json"
PLATFORMS = "cpu", "cuda", "tpu"


def program(
  run: run_lib.Run, state: programs.State
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """`images [b, ...] -> (classes [b], scores [b])` after the last task.

  On one device, whatever mesh trained the heads; to be jitted.
  """
  last = len(run.stream.tasks) - 1
  bank = phases.whole(run, state, last)
  one = run._replace(mesh=sharding.make_mesh(devices=jax.local_devices()[:1]))
  rows = jax.tree.map(
    lambda x: bank_lib.flatten(np.asarray(x))[: len(run.heads), None],
    bank._replace(opt=(), side=()),
  )
  held = bank_lib.place(rows, one.mesh)
  task = phases.open_phase(one, run.phases_of(last)[0]).task
  classes = run.stream.class_of
  parts = one.mesh, run.dataset, run.objective, run.loss
  scores = scoring.class_scores(*parts, one.numbers, len(classes))

  def predict(images):
    table = scores(held, task, images).reshape(images.shape[0], -1)
    best = jnp.argmax(table, axis=1)
    return jnp.asarray(classes.reshape(-1))[best], jnp.max(table, axis=1)

  return predict


def about(run: run_lib.Run, state: programs.State) -> dict[str, Any]:
  """What a network answers, and what made it; JSON-safe."""
  heads, image = run.stream.heads, run.dataset.test_images
  missing = sorted(set(range(len(heads))) - set(run.heads))
  told = facts.of_run(run, state)
  return {
    "image_shape": list(image.shape[1:]),
    "image_dtype": str(image.dtype),
    "classes": [c for head in run.heads for c in heads[head]],
    "missing_heads": missing,
    "missing_classes": [c for head in missing for c in heads[head]],
    "data": run.dataset.name.partition(":")[0],
    "params_sha256": told["params_sha256"],
    "versions": told["versions"],
  }


def save(
  folder: pathlib.Path, run: run_lib.Run, state: programs.State
) -> dict[str, Any]:
  """Writes the network to a folder, once its files have answered alike.

  Returns:
    What `about` says, and the hash of the program.

  Raises:
    AssertionError: if the files' answers are not those of the program; what
      the folder held before stays.
    OSError: if the folder cannot be written.
  """
  predict, images = jax.jit(program(run, state)), run.dataset.test_images
  shape = jax_export.symbolic_shape("b, ...", like=images.shape)
  given = jax.ShapeDtypeStruct(shape, images.dtype)
  data = jax_export.export(predict, platforms=PLATFORMS)(given).serialize()
  told = about(run, state) | {"program_sha256": _sha256(data)}
  some = np.asarray(images[: min(len(images), 256)])
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as name:
    draft = pathlib.Path(name)
    (draft / PROGRAM).write_bytes(data)
    (draft / ABOUT).write_text(json.dumps(told, indent=1) + "\n")
    answer, _ = load(draft)
    for ours, wanted in zip(answer(some), predict(some)):
      np.testing.assert_array_equal(ours, np.asarray(wanted))
    # After a kill between the two the hash tells them apart.
    for file in PROGRAM, ABOUT:
      (draft / file).rename(folder / file)
  return told


def load(
  folder: pathlib.Path, batch: int = 256
) -> tuple[Callable[[np.ndarray], tuple[np.ndarray, ...]], dict[str, Any]]:
  """A saved network: `images [n, ...] -> (classes [n], scores [n])`.

  Args:
    folder: where `save` wrote it.
    batch: images that a device takes at once.

  Returns:
    The network, and what `save` said of it.

  Raises:
    ValueError: for a folder without a network, or a damaged one; the network
      raises it for images that `check` refuses.
  """
  try:
    told = json.loads((folder / ABOUT).read_text())
    data = (folder / PROGRAM).read_bytes()
    if _sha256(data) != told["program_sha256"]:
      raise ValueError(f"{ABOUT} is of another {PROGRAM}")
    exported = jax_export.deserialize(bytearray(data))
    _check_told(told, exported)
  except Exception as error:  # The reader of flat buffers raises anything.
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise ValueError(
      f"{folder} holds no sound network ({reason}); write it by "
      "experiments.export"
    ) from None
  return in_batches(jax.jit(exported.call), told, batch), told


def in_batches(
  ask: Callable[[np.ndarray], Sequence[Any]], told: dict[str, Any], batch: int
) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
  """`images [n, ...] -> arrays [n]`, of what answers for so many at once.

  Args:
    ask: `images [b, ...] -> arrays [b]`.
    told: of `about`; images that it does not fit are refused.
    batch: images at once.
  """

  def answer(images: np.ndarray) -> tuple[np.ndarray, ...]:
    images = check(images, told)
    found = []
    for start in range(0, len(images), batch):
      part = images[start : start + batch]
      # One shape, so that nothing compiles twice.
      filled = np.resize(part, (min(batch, len(images)), *part.shape[1:]))
      found.append([np.asarray(x)[: len(part)] for x in ask(filled)])
    return tuple(np.concatenate(parts) for parts in zip(*found))

  return answer


def check(images: np.ndarray, told: dict[str, Any]) -> np.ndarray:
  """Images as a network takes them, `[n, height, width, channels]`.

  As in `data.load`, `[n, height, width]` get one channel, and `[n, d]` become
  1x1 images of d channels.

  Args:
    images: as they are stored.
    told: of `about`.

  Raises:
    ValueError: if the network does not take them.
  """
  shape, dtype, given = tuple(told["image_shape"]), told["image_dtype"], images
  if images.ndim == 3:
    images = images[..., None]
  elif images.ndim == 2:
    images = images[:, None, None]
  if images.ndim != 1 + len(shape) or images.shape[1:] != shape:
    raise ValueError(
      f"images are {given.shape}, and the network takes "
      f"{('n', *shape)}; give it images of {shape}"
    )
  if str(images.dtype) != dtype or not len(images):
    raise ValueError(
      f"images are {len(images)} of {images.dtype}; give the network some, of "
      f"{dtype}, as they are stored"
    )
  if images.dtype.kind == "f":
    bad = ~np.isfinite(images).all((1, 2, 3))
    if bad.any():
      raise ValueError(
        f"images hold NaN or infinity, first in image {int(bad.argmax())}; "
        "repair or drop such images"
      )
  return images


def _check_told(told: dict[str, Any], exported: jax_export.Exported) -> None:
  """Raises, of any kind, unless a network's words fit its program."""
  (images,) = exported.in_avals
  shape, dtype = tuple(told["image_shape"]), told["image_dtype"]
  if (shape, dtype) != (tuple(images.shape[1:]), str(images.dtype)):
    raise ValueError(f"{PROGRAM} takes {images}")
  for name in "classes", "missing_heads", "missing_classes":
    if not all(type(number) is int for number in told[name]):
      raise ValueError(f"{name}={told[name]} are no numbers")


def _sha256(data: bytes | bytearray) -> str:
  return hashlib.sha256(data).hexdigest()
