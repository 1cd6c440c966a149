"""Distributed class-incremental learning in JAX and Flax.

Letters used alike in einsums, shape annotations and comments:

  b  batch            c  classes of a head    d  features
  f  hidden units     g  groups of a buffer   h  heads
  l  heads held by one device                 m  buffer slots
  n  subnets          r  rows drawn           s  stages
  t  tasks            w  workers

Arrays of the bank of heads start with `l h`: head `i` is entry
`divmod(i, h)`, and the second axis lies over the mesh's `head` axis.
"""

import importlib
from typing import Any

from mhil.version import __version__

__all__ = [
  "__version__",
  "abreast",
  "alone",
  "augment",
  "auxnet",
  "blocks",
  "buffer",
  "chain",
  "checkpoint",
  "config",
  "coupling",
  "cuts",
  "cutting",
  "data",
  "drawing",
  "frozen",
  "growing",
  "guessing",
  "heads",
  "inputs",
  "layer_parallel",
  "layers",
  "local",
  "losses",
  "metrics",
  "modules",
  "networks",
  "objectives",
  "optimizers",
  "partitions",
  "phases",
  "plots",
  "prepare",
  "probe",
  "processes",
  "recipe",
  "rehearsal",
  "relay",
  "report",
  "run",
  "serving",
  "sharding",
  "stages",
  "streams",
  "subnets",
  "trainer",
  "transforms",
]


def __getattr__(name: str) -> Any:
  # Late, so that one module does not cost the import of all (Orbax: seconds).
  if name in __all__:
    return importlib.import_module(f"mhil.{name}")
  raise AttributeError(f"module 'mhil' has no attribute {name!r}")


def __dir__() -> list[str]:
  return __all__
