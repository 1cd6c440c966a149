"""Suite `stages`: modules on two devices, at once, in turn, and end to end.

Each simulated device is asked to keep to one core, so that two can be worth
two; the processor time of the rows on one device says whether it did. Steps of
all rows are taken in turn, batch by batch.
"""

import functools
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import measure
from mhil import (
  data,
  inputs,
  local,
  losses,
  modules,
  networks,
  objectives,
  optimizers,
  phases,
  prepare,
  relay,
  sharding,
  streams,
  trainer,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

STAGES, BATCH, REPETITIONS, SPAN = 2, 64, 11, 6
ONE_CORE = "--xla_cpu_multi_thread_eigen=false"
# Processor time over time on the wall of one device: the host's part is in it.
CORE = 1.1
ROWS = ("end to end", "one device", "in turn", "at once")
COLUMNS = {
  "row": "row",
  "devices": "devices",
  "ms": "ms a step",
  "ratio": "over in turn",
  "busy": "% busy",
  "temporary": "temporary MiB, most",
  "sent": "bytes of features a step",
  "accuracy": "accuracy %",
  "sha": "parameters",
}


class Setup(NamedTuple):
  """What every row shares."""

  widths: tuple[int, ...] = (16, 32, 64)
  cuts: tuple[str, ...] = ("conv1",)
  samples: int = 640
  epochs: int = 10
  side: int = 32


SETUP = Setup()


def one_core() -> None:
  """Asks each device to keep to a core; to be called before jax starts."""
  given = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{given} {ONE_CORE}".strip()


@functools.cache
def build(setup: Setup, row: str) -> run_lib.Run:
  """A run of one task: `end to end`, `one device`, `in turn` or `at once`."""
  shape, classes = (setup.side, setup.side, 3), 10
  branch = networks.convnet(shape, classes + 1, setup.widths, axis="data")
  cut = modules.split(branch, shape, setup.cuts, modules.GREEDY)
  objective = local.local(cut)
  if row == "end to end":
    objective = objectives.end_to_end(branch)
  stage = STAGES if row in ("in turn", "at once") else 1
  if stage > 1:
    parts = local.stages(cut, shape, stage)
    spread = functools.partial(
      relay.spread, parts=parts, at_once=row == "at once"
    )
    objective = objective._replace(spread=spread)
  return prepare.build(
    sharding.make_mesh(stage=stage),
    streams.class_incremental(classes, sizes=(classes,), order_seed=None),
    dataset(setup, classes),
    objective,
    losses.dce("none"),
    Recipe(
      optimizer=optimizers.sgd(0.9),
      rate=optimizers.constant(0.02),
      epochs=setup.epochs,
      batch=BATCH,
    ),
    seed=0,
  )


@functools.cache
def dataset(setup: Setup, classes: int) -> data.Dataset:
  """Noisy tiles of one colour each: something to learn, of any size."""
  rng = np.random.default_rng(0)
  tiles = rng.uniform(60, 200, (classes, 4, 4, 3))
  centre = tiles.repeat(setup.side // 4, 1).repeat(setup.side // 4, 2)

  def split(n: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(n, dtype=np.int32) % classes
    pixels = centre[labels] + rng.normal(0, 60, (n, *centre.shape[1:]))
    return np.clip(pixels, 0, 255).astype(np.uint8), labels

  sets = *split(setup.samples), *split(setup.samples)
  return data.Dataset(
    "tiles", *sets, classes, 255.0, (0.5,) * 3, (0.3,) * 3, 0, False
  )


class Stretch:
  """Takes `SPAN` steps and waits for every stage."""

  def __init__(self, run: run_lib.Run):
    """Opens the task of a run whose heads are fresh."""
    self.run, self.state, self._done = run, run_lib.start(run), 0
    self._feed = phases.open_phase(run, run.phases[0])

  def __call__(self) -> None:
    """Takes the next steps of the task."""
    run, each = self.run, self._feed.phase.per_epoch
    for step in range(self._done, self._done + SPAN):
      batches = inputs.batches(run, self._feed, step // each)
      state = run.step(self.state, batches, self._feed.task, run.train_set)
      self.state = run.exchange(state, step + 1)
    self._done += SPAN
    jax.block_until_ready(self.state)


def side_by_side(
  setup: Setup = SETUP, repetitions: int = REPETITIONS
) -> measure.Table:
  """Times of stretches taken in turn, and whole runs for their accuracy."""
  runs = [build(setup, row) for row in ROWS]
  stretches = [Stretch(run) for run in runs]
  timed = measure.turns(stretches, repetitions)
  rows: list[dict[str, Any]] = [{"row": row} for row in ROWS]
  for row, run, walls, cpus, last in zip(
    rows, runs, *timed, stretches, strict=True
  ):
    row["walls"] = [ms / SPAN for ms in walls]
    row["ms"] = statistics.median(row["walls"])
    row["temporary"] = max(
      x.memory_analysis().temp_size_in_bytes for x in run.programs
    )
    row["devices"] = run.grid.shape["stage"]
    row["busy"] = busy(walls, cpus, row["devices"])
    sent = relay.handed_on(last.state.bank) if row["devices"] > 1 else []
    row["sent"] = sum(each["features"] for each in sent)
    done = trainer.fit(run)
    row["accuracy"] = 100 * done.metrics["last_accuracy"]
    row["sha"] = done.metrics["params_sha256"][:8]
  turn = rows[ROWS.index("in turn")]
  for row in rows:
    row["ratio"] = measure.ratio(row, turn)
  note = _note(setup, repetitions)
  balance = _balance(runs[ROWS.index("at once")])
  reading = [*_read(rows), held(rows), balance]
  return measure.Table("Two stages", note, COLUMNS, rows, reading)


def busy(walls: Sequence[float], cpus: Sequence[float], devices: int) -> float:
  """The process's time on processors in % of the devices', the median.

  Args:
    walls, cpus: milliseconds of stretches, on the wall and of all threads.
    devices: that the stretches had.
  """
  pairs = zip(walls, cpus, strict=True)
  return 100 * statistics.median(cpu / (devices * wall) for wall, cpu in pairs)


def held(rows: Sequence[dict[str, Any]]) -> str:
  """Whether a device kept to its core, in a sentence."""
  most = max(row["busy"] for row in rows if row["devices"] == 1) / 100
  kept = "did" if most <= CORE else "did NOT"
  return (
    f"On one device the process is on {most:.2f} cores at most, so a device "
    f"{kept} keep to one core (limit {CORE})."
  )


def _note(setup: Setup, repetitions: int) -> str:
  return (
    f"Convnet {'-'.join(map(str, setup.widths))} in two modules, greedy, batch "
    f"{BATCH} of {setup.side}x{setup.side}x3 (noisy tiles), SGD. Medians of "
    f"{repetitions} stretches of {SPAN} steps, rows in turn; wall-clock of a "
    "shared machine. Busy: time on processors, the host's part of a step "
    "included, in % of the time on the wall times the devices. Accuracy after "
    f"{setup.epochs} epochs."
  )


def _read(rows: list[dict[str, Any]]) -> list[str]:
  by_name = {row["row"]: row for row in rows}
  one, turn, once = (by_name[n] for n in ("one device", "in turn", "at once"))
  same = len({row["sha"] for row in (one, turn, once)}) == 1
  pairs = zip(once["walls"], one["walls"], strict=True)
  share = statistics.median(a / b for a, b in pairs)
  return [
    f"At once a step takes {once['ratio']:.2f} of what it takes in turn, and "
    f"{share:.2f} of what it takes on one device.",
    "Parameters on one device, in turn and at once are "
    f"{'the same, bit for bit' if same else 'NOT the same'}.",
  ]


def _balance(run: run_lib.Run) -> str:
  """What the stages' own work lets one hope for, free of other programs."""
  _, later = run.programs
  feed, state = phases.open_phase(run, run.phases[0]), run_lib.start(run)
  batches = inputs.batches(run, feed, 0)
  # Until something has been handed on, the later stage has no work.
  state = run.step(state, batches, feed.task, run.train_set)
  state = run.exchange(state, 1)
  times: list[list[float]] = [[], []]
  for _ in range(12):
    begun = time.process_time()
    state = run.step(state, batches, feed.task, run.train_set)
    jax.block_until_ready(state)
    between = time.process_time()
    part = jax.block_until_ready(later(state.bank[1]))
    times[0].append(between - begun)
    times[1].append(time.process_time() - between)
    state = state._replace(bank=(state.bank[0], part))
  one, two = (1e3 * statistics.median(each[2:]) for each in times)
  bound = 100 * (one + two) / (2 * max(one, two))
  return (
    f"Alone, the stages take {one:.0f} and {two:.0f} ms of processor time a "
    f"step, so two devices can be {bound:.0f} % busy at most, and a step at "
    f"once can take {max(one, two) / (one + two):.2f} of one in turn at best."
  )


SUITE = measure.Suite(STAGES, (side_by_side,))
