"""What a training step costs, and how long it takes beside other steps.

Costs are XLA's own, of the program that one device runs. Times are those of
steps taken in turn, so that a busy machine slows all of them alike.
"""

import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mhil import inputs, phases, sharding
from mhil import run as run_lib

# Labels, a run, and which of its tasks to train.
Case = tuple[dict[str, Any], run_lib.Run, int]


class Table(NamedTuple):
  """One part of a suite, measured.

  Attributes:
    title: what it shows.
    note: how it was measured.
    columns: key of a row's cell, to the column's heading.
    rows: one dict for each line; may hold more than the columns.
    reading: what the numbers say, a sentence or two each.
  """

  title: str
  note: str
  columns: dict[str, str]
  rows: list[dict[str, Any]]
  reading: list[str]


class Suite(NamedTuple):
  """A named list of parts.

  Attributes:
    devices: simulated devices that it asks for.
    parts: each measures and returns a table.
  """

  devices: int
  parts: tuple[Callable[[], Table], ...]


class Stepper:
  """Takes the steps of a run's task, one after the other, as training does."""

  def __init__(self, run: run_lib.Run, task: int):
    """Opens `task` of a run whose heads are fresh."""
    self.run, state = run, run_lib.start(run)
    phase = run.phases_of(task)[0]
    self._feed = phases.open_phase(run, phase)
    first = np.int32(phase.steps.start)
    self._state = state._replace(step=sharding.replicated(first, run.mesh))
    self._done, self._epoch = 0, inputs.batches(run, self._feed, 0)

  def __call__(self) -> None:
    """Takes one step and waits for it."""
    self.step()
    self.wait()

  def step(self) -> None:
    """Sends one step to the devices."""
    epoch, i = divmod(self._done, self._feed.phase.per_epoch)
    if i == 0:
      self._epoch = inputs.batches(self.run, self._feed, epoch)
    self._done += 1
    self._state = self.run.step(
      self._state, self._epoch, self._feed.task, self.run.train_set
    )

  def given(self) -> tuple[Any, ...]:
    """What begins a step: step, memory, epoch, task, samples."""
    state, run = self._state, self.run
    return (
      *(state.step + 0, jax.tree.map(lambda x: x + 0, state.memory)),
      *(self._epoch, self._feed.task, run.train_set),
    )

  def wait(self) -> None:
    """Waits for the steps sent; see also `Run.one_at_a_time`."""
    jax.block_until_ready(self._state)


def cost(run: run_lib.Run) -> dict[str, float]:
  """What one step costs one device, from the compiled program.

  A loop's body counts once, however often it runs.

  Returns:
    `flops`; `accessed`, bytes read and written; `temporary` and `arguments`,
    bytes of memory; `traffic`, bytes over the `head` axis; `collectives`,
    their number.
  """
  return of_program(run.step, run.traffic)


def of_program(
  compiled: Any, traffic: Sequence[sharding.Collective]
) -> dict[str, float]:
  """The same of any compiled program, with its collectives."""
  counted, usage = compiled.cost_analysis(), compiled.memory_analysis()
  return {
    "flops": counted["flops"],
    "accessed": counted["bytes accessed"],
    "temporary": usage.temp_size_in_bytes,
    "arguments": usage.argument_size_in_bytes,
    "traffic": sharding.bytes_over(traffic, "head"),
    "collectives": sum("head" in c.axes for c in traffic),
  }


def compare(cases: Sequence[Case], repetitions: int) -> list[dict[str, Any]]:
  """Costs and times of steps that are taken in turn.

  Args:
    cases: what to measure.
    repetitions: steps of each, forwards and backwards through the cases,
      after two to warm up.

  Returns:
    For each case its labels, `cost`, and the medians `ms` on the wall and
    `cpu_ms` over all of the process's threads; `walls` holds every time.
  """
  steppers = [Stepper(run, task) for _, run, task in cases]
  rows = [labels | cost(run) for labels, run, _ in cases]
  return timed(rows, steppers, repetitions)


def timed(
  rows: list[dict[str, Any]],
  steppers: Sequence[Callable[[], None]],
  repetitions: int,
) -> list[dict[str, Any]]:
  """The rows with the times of their steppers, as in `compare`."""
  walls, cpus = turns(steppers, repetitions)
  for row, wall_ms, cpu_ms in zip(rows, walls, cpus, strict=True):
    row["ms"] = statistics.median(wall_ms)
    row["cpu_ms"] = statistics.median(cpu_ms)
    row["walls"] = wall_ms
  return rows


def turns(
  steppers: Sequence[Callable[[], None]], repetitions: int
) -> tuple[list[list[float]], list[list[float]]]:
  """Milliseconds of each stepper, on the wall and of all threads' processors.

  They are called in turn, forwards and backwards, after two rounds to warm up.
  """
  walls: list[list[float]] = [[] for _ in steppers]
  cpus: list[list[float]] = [[] for _ in steppers]
  for repetition in range(-2, repetitions):
    order = range(len(steppers))
    for i in order if repetition % 2 == 0 else reversed(order):
      wall, cpu = time.perf_counter(), time.process_time()
      steppers[i]()
      if repetition >= 0:
        walls[i].append(1e3 * (time.perf_counter() - wall))
        cpus[i].append(1e3 * (time.process_time() - cpu))
  return walls, cpus


def ratio(row: dict[str, Any], reference: dict[str, Any]) -> float:
  """Median over repetitions of one step's time over another's.

  Neighbours in time see the same machine, so this is steadier than a ratio
  of medians.
  """
  pairs = zip(row["walls"], reference["walls"], strict=True)
  return statistics.median(a / b for a, b in pairs)


def spread(values: Sequence[float]) -> float:
  """How far the largest lies above the smallest, as a fraction."""
  low, high = min(values), max(values)
  return 0.0 if high == low else high / low - 1 if low else float("inf")


def verdict(values: Sequence[float], limit: float = 0.1) -> str:
  """`flat` or `NOT flat`, with the spread in brackets."""
  size = spread(values)
  word = "flat" if size <= limit else "NOT flat"
  return f"{word} ({100 * size:.1f} %)"


def cores() -> int:
  """Processor cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def markdown(table: Table) -> str:
  """The table with its note and reading."""
  cells = [
    [_cell(key, row[key]) for key in table.columns] for row in table.rows
  ]
  lines = [f"## {table.title}", "", table.note, ""]
  lines += grid(table.columns.values(), cells)
  return "\n".join([*lines, "", *(f"- {line}" for line in table.reading)])


def grid(head: Collection[str], body: Iterable[Iterable[str]]) -> list[str]:
  """Lines of a Markdown table."""
  titles, *rows = ("| " + " | ".join(cells) + " |" for cells in (head, *body))
  return [titles, "|" + " --- |" * len(head), *rows]


def mean_of(values: np.ndarray) -> str:
  """Mean over seeds, and standard deviation where there are several."""
  deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
  return f"{values.mean():.1f}{deviation}"


def _cell(key: str, value: Any) -> str:
  if key in ("temporary", "arguments"):
    return f"{value / 2**20:.2f}"
  if key in ("flops", "accessed"):
    return f"{value / 1e6:.1f}"
  if value is None:
    return "?"
  if isinstance(value, float):
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
  return f"{value:,}" if isinstance(value, int) else str(value)
