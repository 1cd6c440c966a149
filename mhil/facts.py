"""Facts of a run that no test set is needed for: sizes, traffic, hashes."""

import hashlib
import math
import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np

from mhil import heads, programs
from mhil import run as run_lib

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def of_run(run: run_lib.Run, state: programs.State) -> dict[str, Any]:
  """Sizes, traffic, hash and versions; JSON-safe."""
  of_head = sum(math.prod(x.shape[2:]) for x in jax.tree.leaves(state.bank.params))
  open_heads = len(run.stream.tasks)
  usage = run.step.memory_analysis()
  return {
    "params_sha256": params_sha256(state.bank.params, open_heads),
    "parameters": {"total": of_head * open_heads, "per_head": of_head},
    "memory": exemplars(run),
    "compiles": {"train_step": 1, "evaluate": 1},
    "collectives": [c._asdict() for c in run.traffic],
    "step_bytes_per_device": {
      "temporary": usage.temp_size_in_bytes,
      "arguments": usage.argument_size_in_bytes,
    },
    "steps_per_task": [len(steps) for steps in run.plan],
    "mesh": dict(run.mesh.shape),
    "devices": [str(d) for d in run.mesh.devices.flat],
    "seed": run.seed,
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
  }


def exemplars(run: run_lib.Run) -> dict[str, Any]:
  """What the memory holds at most, over the whole mesh."""
  held = max(
    len(rows) - int(np.isin(run.dataset.train_labels[rows], new).sum())
    for rows, new in zip(run.rows, run.stream.tasks)
  )
  image = run.dataset.train_images[0]
  protocol = "every sample" if run.recipe.memory is None else "fixed total"
  return {
    "exemplars": held,
    "bytes": held * image.nbytes,
    "protocol": f"{protocol}, balanced over the classes seen, random choice",
  }


def params_sha256(params: Any, open_heads: int) -> str:
  """Hash over the parameters' bytes: by path, then by head."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    whole = heads.flatten(np.asarray(leaf))[:open_heads]
    digest.update(np.ascontiguousarray(whole).tobytes())
  return digest.hexdigest()
