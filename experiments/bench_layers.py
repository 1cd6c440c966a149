"""Suite `layers`: how much sooner a layer-parallel step ends.

A step goes in phases (`coupling.timetable`), each as long as its longest
program, so with data Td a step of K stages should be faster by

  rho(K) = serial step / (Td + sum over phases of the longest program)

which for one correction and equal stages is the bound of the paper. (a) Two
stages on two devices: each program timed alone, then the step. (b) Up to 16
stages, the same sum in FLOPs of the compiled programs.
"""

import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax

from experiments import bench_stages, layer_steps, measure
from experiments.layer_steps import METHODS, SETUP, Parallel, Pieces, Setup
from mhil import abreast, objectives

REPETITIONS = 21
# How far a measured step may be from the model: the design asks for it.
LIMIT = 0.15
DEEP = Setup(layers=16)


def two_devices(
  label: str, setup: Setup = SETUP, repetitions: int = REPETITIONS
) -> measure.Table:
  """(a) Serial and parallel steps in turn, and the parts of the model."""
  made = layer_steps.parallel(setup, METHODS[label](2), 2)
  serial = layer_steps.build(
    objectives.end_to_end(layer_steps.branch_of(setup)), setup
  )
  alone, at_once = (Pieces(made.run, made.method, x) for x in (False, True))
  whole = [bench_stages.Stretch(serial), bench_stages.Stretch(made.run)]
  walls, cpus = measure.turns([*whole, alone, at_once], repetitions)
  rows = [
    _row(what, [ms / bench_stages.SPAN for ms in each])
    for what, each in zip(("serial step", "parallel step"), walls)
  ]
  rows += _pieces(alone, at_once, repetitions)
  cores = statistics.median(a / b for a, b in zip(cpus[0], walls[0]))
  return measure.Table(
    f"Two devices: {label}",
    _note(setup, made, repetitions),
    {"what": "what", "ms": "ms"},
    rows,
    [*_read(rows, made, alone, at_once, repetitions), _audit(made, alone)]
    + [f"The serial step is on {cores:.2f} cores."],
  )


def _row(what: str, walls: list[float]) -> dict[str, Any]:
  return {"what": what, "ms": statistics.median(walls), "walls": walls}


def _pieces(alone, at_once, repetitions) -> list[dict[str, Any]]:
  rows = []
  for pieces in alone, at_once:
    steps = pieces.steps[-repetitions:]
    for what in steps[0]:
      # Alone, a phase of one program is in the table already.
      if pieces is at_once and (what == "send" or len(what) == 1):
        continue
      times = [sum(step[what]) for step in steps]
      rows.append(_row(_called(what, len(steps[0][what])), times))
  return rows


def _called(what: Any, times: int) -> str:
  often = f", {times} times" if times > 1 else ""
  if what == "send":
    return f"copies between stages{often}"
  if isinstance(what[0], str):
    return f"{what[0]} {what[1]}{often}"
  return " and ".join(f"{name} {k}" for name, k in what) + f" at once{often}"


def _read(rows, made, alone, at_once, repetitions) -> list[str]:
  count = len(made.cut.stages)
  steps = zip(alone.steps[-repetitions:], at_once.steps[-repetitions:])
  models = [layer_steps.modelled(*pair, made.method, count) for pair in steps]
  serial, step = (row["walls"] for row in rows[:2])
  # Neighbours in time see the same machine: all are ratios within a turn.
  lines = [f"A parallel step is {_ratio(serial, step):.2f} times as fast."]
  named = "programs alone", "copies too", "devices busy at once"
  for name, each in zip(named, zip(*models)):
    off = _ratio(each, step) - 1
    within = "within" if abs(off) <= LIMIT else "NOT within"
    lines.append(
      f"By the model, {name}: {_ratio(serial, each):.2f}; measured is off by "
      f"{100 * off:+.0f} %, {within} {100 * LIMIT:.0f} %."
    )
  shared = statistics.median(c / b for _, b, c in models)
  lines.append(
    f"At once, a step's programs and copies take {shared:.2f} of the time that "
    "the longest of each phase take alone: what the devices share."
  )
  return lines


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
  return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _audit(made: Parallel, alone: Pieces) -> str:
  """What stages tell each other, and by which means."""
  count = len(made.cut.stages)
  # The first messages are the flights, the first of them to home itself.
  flights = sum(alone.bytes[1:count])
  others = sum(alone.bytes[count:])
  batch = made.run.recipe.batch
  formula = sum(abreast.exchanged(made.cut, batch, made.method))
  return (
    f"Interfaces exchange {others:,} bytes a step, by the formula {formula:,}; "
    f"images, labels and tables are {flights:,} more. Each program is compiled "
    "for its stage's devices alone, so it holds no collective over `stage` by "
    f"construction; of any kind there are {len(made.run.traffic)}."
  )


def _note(setup: Setup, made: Parallel, repetitions: int) -> str:
  costs = " and ".join(f"{cost:,}" for cost in made.cut.costs)
  return (
    f"{setup.layers} dense layers of {setup.hidden}, batch {setup.batch}, SGD; "
    f"two stages of {costs} multiply-adds a sample, the network that guesses "
    f"{made.guesser.costs[0]:,}; each device asked to keep to a core. Medians "
    f"of {repetitions} turns; steps in stretches of {bench_stages.SPAN}, "
    "programs and copies one by one in a step that waits for each."
  )


def many_stages(
  counts: Sequence[int] = (2, 4, 8, 16), setup: Setup = DEEP
) -> measure.Table:
  """(b) The longest way through a step, in FLOPs of the compiled programs."""
  serial = layer_steps.flops(
    layer_steps.build(
      objectives.end_to_end(layer_steps.branch_of(setup)), setup
    ).step
  )
  rows: list[dict[str, Any]] = []
  for label, method_of in METHODS.items():
    for k in counts:
      # All on one device: what programs do is no matter of where.
      here = [jax.devices()[0]] * k
      made = layer_steps.parallel(setup, method_of(k), k, here)
      longest = layer_steps.way(made)
      counted = made.run.objective.facts["counted_speedup"]
      row = {"what": label, "stages": k, "longest": longest / 1e6}
      rows.append(row | {"rho": serial / longest, "counted": counted})
  note = (
    f"{setup.layers} dense layers of {setup.hidden}, batch {setup.batch}. "
    "FLOPs of compiled programs, by XLA's count; of the serial step "
    f"{serial / 1e6:,.0f} million. The way is the data and, phase after phase, "
    "the stage with the most to do. Networks that guess have a tenth of the "
    "branch's multiply-adds in all. Exchange is left out."
  )
  columns = {
    "what": "method",
    "stages": "stages",
    "longest": "MFLOP on the longest way",
    "rho": "sooner, by FLOPs",
    "counted": "sooner, by multiply-adds",
  }
  return measure.Table("More stages", note, columns, rows, _best(rows))


def _best(rows: list[dict[str, Any]]) -> list[str]:
  best = [
    max((row for row in rows if row["what"] == label), key=lambda r: r["rho"])
    for label in METHODS
  ]
  return [
    f"{row['what']}: {row['rho']:.2f} times sooner at best, in {row['stages']} "
    "stages."
    for row in best
  ]


SUITE = measure.Suite(
  2,
  (*(functools.partial(two_devices, label) for label in METHODS), many_stages),
)
