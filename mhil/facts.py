"""Facts of a run that no test set is needed for: sizes, traffic, hashes."""

import hashlib
import importlib.metadata
import math
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhil import across, networks, programs
from mhil import bank as bank_lib
from mhil import run as run_lib

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def of_run(run: run_lib.Run, state: programs.State) -> dict[str, Any]:
  """Sizes, traffic, hash and versions; JSON-safe."""
  bank = run.whole(state.bank)
  params = bank.params
  of_head = sum(math.prod(x.shape[2:]) for x in jax.tree.leaves(params))
  open_heads, tasks = len(run.heads), len(run.stream.tasks)
  usage = [program.memory_analysis() for program in run.programs]
  return {
    "params_sha256": params_sha256(params, open_heads),
    "parameters": {"total": of_head * open_heads, "per_head": of_head},
    "inference": inference(run, params, bank.stats),
    "memory": memory(run, state),
    "compiles": dict(zip(("train_step", "evaluate"), run.compiles)),
    "collectives": [c._asdict() for c in run.traffic],
    "exchange": {
      "method": run.partition.name,
      "every": run.partition.every,
      "collectives": [c._asdict() for c in run.exchanged],
    },
    "step_bytes_per_device": {
      "temporary": max(x.temp_size_in_bytes for x in usage),
      "arguments": max(x.argument_size_in_bytes for x in usage),
    },
    "steps_per_task": [
      sum(len(phase.steps) for phase in run.phases_of(t)) for t in range(tasks)
    ],
    "objective": {"name": run.objective.name, **run.objective.facts},
    "mesh": dict(run.grid.shape),
    "devices": [str(d) for d in run.grid.devices.flat],
    "augmentation": {"pad": run.dataset.pad, "flip": run.dataset.flip},
    "seed": run.seed,
    "heads": list(run.heads),
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
  }


def inference(run: run_lib.Run, params: Any, stats: Any) -> dict[str, int]:
  """What one head reads and multiplies for one image, once it is trained."""
  params, stats = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), (params, stats)
  )
  shape = run.dataset.train_images.shape[1:]
  image = jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)
  # Statistics of a test batch are means over the mesh, which is not here.
  predict = jax.vmap(run.objective.predict, (None, None, 0), axis_name="data")
  return {
    "parameters": networks.used_numbers(predict, params, stats, image),
    "multiply_adds": networks.multiply_adds(predict, params, stats, image),
  }


def memory(run: run_lib.Run, state: programs.State) -> dict[str, Any]:
  """What the memory can hold and holds, over the whole mesh."""
  facts = dict(run.transform.facts)
  if run.recipe.cumulative:
    labels, image = run.dataset.train_labels, run.dataset.train_images[0]
    facts["kind"] = "every sample, from the data set"
    facts["samples"], facts["bytes"] = len(labels), len(labels) * image.nbytes
    return facts | {"held": len(labels), "distinct": len(labels)}
  held = run.transform.held(state.memory)
  return facts | {"held": len(held), "distinct": len(np.unique(held))}


def params_sha256(params: Any, open_heads: int) -> str:
  """Hash over the parameters' bytes: by path, then by head."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    whole = bank_lib.flatten(across.fetch(leaf))[:open_heads]
    digest.update(np.ascontiguousarray(whole).tobytes())
  return digest.hexdigest()
