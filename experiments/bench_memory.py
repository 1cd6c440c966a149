"""Suite `memory`: what a step of local learning holds besides its arguments.

Compiled, never run: (a) ResNet-110 cut into K modules, against end to end;
(b) memory against depth, one module a block.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import measure
from mhil import local, losses, modules, networks, objectives

BATCH, SHAPE, CLASSES = 128, (32, 32, 3), 10
MODES = ("R0", "E", "R1E")
# What local learning in the most modules may need of end to end.
BOUND = 0.25
# XLA lays out arrays before it makes code, and code that is not optimised is
# made in a fraction of the time. (a) states what that changes.
QUICK: Any = {"xla_backend_optimization_level": 0}


def temporary(
  objective: objectives.Objective, batch: int, options: Any = QUICK
) -> int:
  """Bytes of the compiled gradient beyond arguments and results.

  Args:
    objective: whose step is compiled.
    batch: samples in it.
    options: of the compiler; None for its own.
  """
  label = jax.ShapeDtypeStruct((batch,), jnp.int32)
  images = jax.ShapeDtypeStruct((batch, *SHAPE), jnp.float32)
  weight = jax.ShapeDtypeStruct((batch,), jnp.float32)
  state = jax.eval_shape(objective.init, jax.random.key(0))
  loss = losses.dce("none")
  valid, prior = jnp.ones(CLASSES, bool), jnp.zeros(CLASSES + 1)

  def step(params, stats, side, images, label, weight):
    given = objectives.Batch(images, jnp.zeros_like(label), label, weight)

    def criterion(logits):
      return loss.value(logits, label, prior, valid, None)

    key = jax.random.key(0)
    return objective.step(params, stats, side, given, criterion, key)

  lowered = jax.jit(step).lower(*state, images, label, weight)
  usage: Any = lowered.compile(options).memory_analysis()
  return usage.temp_size_in_bytes


def cut_objective(
  branch: networks.Branch, cuts: int | Sequence[str], mode: str
) -> objectives.Objective:
  """Local learning, or end to end for one module."""
  if cuts == 1:
    return objectives.end_to_end(branch)
  return local.local(modules.split(branch, SHAPE, cuts, modules.Method(mode)))


def by_modules(
  depth: int = 110,
  counts: Sequence[int] = (1, 2, 4, 8, 16),
  deepest: Sequence[str] = MODES,
  batch: int = BATCH,
) -> measure.Table:
  """(a) One network, cut at the published places; more modes for the last.

  Args:
    depth: of a ResNet with published lists.
    counts: of modules, 1 first.
    deepest: modes of the last count; the first is compiled as usual too, and
      so is end to end.
    batch: samples of a gradient.
  """
  branch = networks.resnet_cifar(depth, CLASSES + 1)
  first, *between, last = counts
  cases = [(first, "end to end"), *((k, "R0") for k in between)]
  cases += [(last, mode) for mode in deepest]
  rows: list[dict[str, Any]] = []
  for k, mode in cases:
    objective = cut_objective(branch, k, mode)
    mib = temporary(objective, batch) / 2**20
    share = 100 * mib / (rows[0]["mib"] if rows else mib)
    rows.append({"mode": mode, "modules": k, "mib": mib, "share": share})
    if (k, mode) in (cases[0], (last, deepest[0])):
      rows[-1]["usual"] = temporary(objective, batch, None) / 2**20
  columns = {
    "mode": "mode",
    "modules": "modules",
    "mib": "temporary MiB",
    "share": "% of end to end",
  }
  note = (
    f"ResNet-{depth}, batch {batch}, float32, classifiers 1c2f, cuts as "
    "published; temporary memory of one compiled gradient."
  )
  return measure.Table("Modules", note, columns, rows, _read_modules(rows))


def by_depth(
  blocks: Sequence[int] = (2, 4, 6),
  modes: Sequence[str] = MODES[:2],
  batch: int = BATCH,
) -> measure.Table:
  """(b) Networks of `3 n` blocks, end to end and one module a block."""
  rows: list[dict[str, Any]] = []
  for mode in ("end to end", *modes):
    for n in blocks:
      branch = networks.resnet_cifar(6 * n + 2, CLASSES + 1)
      cuts = 1 if mode == "end to end" else branch.pieces[:-2]
      used = temporary(cut_objective(branch, cuts, mode), batch)
      rows.append({"mode": mode, "blocks": 3 * n, "mib": used / 2**20})
  columns = {"mode": "mode", "blocks": "blocks", "mib": "temporary MiB"}
  note = (
    f"ResNets of {', '.join(str(3 * n) for n in blocks)} blocks, batch "
    f"{batch}; each block a module, with its 1c2f classifier."
  )
  return measure.Table("Depth", note, columns, rows, _read_depth(rows))


def _read_modules(rows: list[dict[str, Any]]) -> list[str]:
  deepest = rows[-1]["modules"]
  lines = [
    f"{row['mode']} with {deepest} modules needs {row['share']:.1f} % of end "
    f"to end: {within(row['share'] / 100)}."
    for row in rows
    if row["modules"] == deepest
  ]
  whole, part = (row for row in rows if "usual" in row)
  more = [100 * (row["usual"] / row["mib"] - 1) for row in (whole, part)]
  share = part["usual"] / whole["usual"]
  return [
    *lines,
    "All rows are compiled without optimisation. With it end to end needs "
    f"{whole['usual']:.1f} MiB ({more[0]:+.1f} %) and {part['mode']} with "
    f"{deepest} modules {part['usual']:.1f} MiB ({more[1]:+.1f} %), "
    f"{100 * share:.1f} %: {within(share)}.",
  ]


def within(share: float) -> str:
  """Whether a share of the memory of end to end keeps to the bound."""
  return f"{'within' if share <= BOUND else 'NOT within'} a quarter"


def _read_depth(rows: list[dict[str, Any]]) -> list[str]:
  lines = []
  for mode in dict.fromkeys(row["mode"] for row in rows):
    first, *_, last = [row for row in rows if row["mode"] == mode]
    slope = (last["mib"] - first["mib"]) / (last["blocks"] - first["blocks"])
    lines.append(f"{mode}: {slope:.2f} MiB a block.")
  return lines


SUITE = measure.Suite(1, (by_modules, by_depth))
