"""What a run has measured: plain numbers that survive a restart."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mhil import across, metrics, streams

NO_TABLE = np.zeros((0, 0), np.int32)


class Progress(NamedTuple):
  """What has been measured so far.

  Attributes:
    step: global step reached.
    tallies: test counts after each finished task; only the last one has its
      table of confusion.
    history: rows `[step, loss of head 0, ..]`; None where a head is idle.
    logged: step of the last row.
    seconds: training time of each task begun.
    waited: seconds in which the loop waited for its next batch.
    stepped: seconds between the waits, within a stretch of steps.
    probes: what the objective measured after each task, by name.
    tested: seconds of the last test.
    tasks: classes of each task of the stream.
  """

  step: int = 0
  tallies: tuple[metrics.Tally, ...] = ()
  history: tuple[tuple[float | None, ...], ...] = ()
  logged: int = 0
  seconds: tuple[float, ...] = ()
  waited: float = 0.0
  stepped: float = 0.0
  probes: tuple[dict[str, float], ...] = ()
  tested: float = 0.0
  tasks: tuple[tuple[int, ...], ...] = ()


class NotFinite(ArithmeticError):
  """A head's loss is NaN or infinite since some step."""

  def __init__(self, head: int, step: int):
    super().__init__(f"head {head}, step {step}")
    self.head, self.step = head, step


class Recorder:
  """Keeps `Progress` up to date without making the devices wait.

  A row is read when the next one is pushed, so the transfer of one overlaps
  with the steps of the other.
  """

  def __init__(
    self,
    done: Progress,
    log: Callable[[int, dict[str, float]], None],
    heads: Sequence[int],
    count: int,
  ):
    self.step = done.step
    self._done, self._log = done, log
    self._heads, self._count = heads, count
    self._pending: tuple | None = None
    self._compiled: int | None = None
    self._stepping: float | None = None
    self.compiled_later = 0
    self._logged = done.logged
    self._clock = time.perf_counter()

  def begin(self, t: int) -> None:
    """Starts the clock of a stretch of steps in task `t`."""
    self._stepping = None
    if len(self._done.seconds) > t:
      self._stop_clock()
    else:
      self._clock = time.perf_counter()
      self._done = self._done._replace(seconds=(*self._done.seconds, 0.0))

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time within as waiting for data."""
    self._count_steps()
    start = time.perf_counter()
    yield
    self._stepping = time.perf_counter()
    waited = self._done.waited + self._stepping - start
    self._done = self._done._replace(waited=waited)

  @contextlib.contextmanager
  def testing(self) -> Iterator[None]:
    """Takes the time within as that of a test."""
    start = time.perf_counter()
    yield
    self._done = self._done._replace(tested=time.perf_counter() - start)

  def push(self, loss, bad_step, training: tuple[int, ...]) -> None:
    """Takes a row still on the devices; reads the one before."""
    self.flush()
    steps = self.step - self._logged
    self._pending = self.step, steps, loss, bad_step, training
    self._logged = self.step

  def flush(self) -> None:
    """Reads the row that is still on the devices, once they have made it."""
    if self._pending is not None:
      self._read()
    self._count_steps()

  def _read(self) -> None:
    assert self._pending is not None
    step, steps, loss, bad_step, training = self._pending
    self._pending = None
    self.check(bad_step)
    # The mesh may hold more entries than there are heads.
    mean = dict(zip(self._heads, _of_heads(loss).mean(1) / steps))
    row = tuple(
      float(mean[i]) if i in training else None for i in range(self._count)
    )
    self._done = self._done._replace(
      history=(*self._done.history, (step, *row))
    )
    self._log(step, {f"loss/head_{i}": row[i] for i in training})

  def compiled(self, count: int) -> None:
    """Takes the number of compiled programs after each task."""
    if self._compiled is None:
      self._compiled = count
    self.compiled_later = count - self._compiled

  def check(self, bad_step) -> None:
    """Raises `NotFinite` if a head went bad, for the first that did."""
    bad = _of_heads(bad_step)
    if (bad >= 0).any():
      first = np.where(bad < 0, np.iinfo(np.int32).max, bad).min(1)
      head = self._heads[int(first.argmin())]
      raise NotFinite(head, int(first.min()) + 1)

  def end(self, tally, found: dict[str, dict[str, float]]) -> None:
    """Books the test after a task, and what the objective measured."""
    tally = metrics.Tally(*(np.asarray(x) for x in tally))
    # Of earlier tests only the counts by task are read again; their tables
    # would be as many numbers in every save as the cube of the tasks.
    before = (t._replace(confusion=NO_TABLE) for t in self._done.tallies)
    probe = {f"{a}/{b}": x for a, row in found.items() for b, x in row.items()}
    self._done = self._done._replace(
      tallies=(*before, tally), probes=(*self._done.probes, probe)
    )
    self._stop_clock()
    self._log(self.step, accuracies(tally) | probe)

  def progress(self) -> Progress:
    """Everything up to now."""
    self._stop_clock()
    return self._done._replace(step=self.step, logged=self._logged)

  def _count_steps(self) -> None:
    """Books the time since the last wait; of a host that ran ahead, too."""
    now = time.perf_counter()
    if self._stepping is not None:
      stepped = self._done.stepped + now - self._stepping
      self._done = self._done._replace(stepped=stepped)
      self._stepping = now

  def _stop_clock(self) -> None:
    now = time.perf_counter()
    if self._done.seconds:
      last = self._done.seconds[-1] + now - self._clock
      self._done = self._done._replace(seconds=(*self._done.seconds[:-1], last))
    self._clock = now


def _of_heads(numbers) -> np.ndarray:
  """`[l, h, ...]` as `[l h, parts]`, in the order of the heads."""
  numbers = across.fetch(numbers)
  if numbers.dtype == np.float32:
    numbers = numbers.astype(np.float64)
  return numbers.reshape(-1, math.prod(numbers.shape[2:]))


def accuracies(tally: metrics.Tally) -> dict[str, float]:
  """The accuracies that show where a multi-head network errs, in [0, 1]."""
  return {
    "accuracy": metrics.accuracy(tally),
    "task_id_accuracy": metrics.task_id_accuracy(tally),
    "within_task_accuracy": metrics.within_task_accuracy(tally),
    "top5_accuracy": metrics.top5_accuracy(tally),
  }


def matrix(done: Progress) -> np.ndarray:
  """The accuracy matrix `[t, t]` of the finished tasks; NaN ahead."""
  n = len(done.tallies)
  rows = [metrics.task_accuracies(tally)[:n] for tally in done.tallies]
  return np.stack(rows) if rows else np.zeros((0, 0))


def measured(done: Progress) -> dict[str, Any]:
  """Every number that follows from the tests; JSON-safe."""
  if not done.tallies:
    return {"steps": done.step, "seconds_per_task": list(done.seconds)}
  table, last, n = matrix(done), done.tallies[-1], len(done.tallies)
  each = [accuracies(tally) for tally in done.tallies]
  return {
    **metrics.summary(table, last.total[:n]),
    **{k: v for k, v in each[-1].items() if k != "accuracy"},
    "accuracy_after_task": [row["accuracy"] for row in each],
    "task_id_after_task": [row["task_id_accuracy"] for row in each],
    "within_task_after_task": [row["within_task_accuracy"] for row in each],
    "top5_after_task": [row["top5_accuracy"] for row in each],
    "within_task_per_task": (last.within_correct[:n] / last.total[:n]).tolist(),
    "accuracy_matrix": [
      [None if np.isnan(x) else x for x in row] for row in table.tolist()
    ],
    "confusion_between_heads": last.confusion[:n, :n].tolist(),
    "seconds_per_task": list(done.seconds),
    "waiting_share": done.waited / (done.waited + done.stepped),
    "test_ms_per_image": 1e3 * done.tested / int(last.total.sum()),
    "probes": list(done.probes),
    "steps": done.step,
  }


def widen(done: Progress, stream: streams.Stream, entries: int) -> Progress:
  """What was measured of a stream, as a stream with more tasks measures it.

  Args:
    done: so far.
    stream: the longer one.
    entries: of its tallies; one a task, and more where a mesh holds more.
  """

  def fit(count):
    if not np.size(count):
      return count  # A table that was dropped; see `Recorder.end`.
    count = np.asarray(count)[(slice(entries),) * np.ndim(count)]
    return np.pad(count, [(0, entries - n) for n in count.shape])

  history = tuple(
    (*row, *(None,) * (1 + len(stream.heads) - len(row)))
    for row in done.history
  )
  tallies = tuple(metrics.Tally(*map(fit, tally)) for tally in done.tallies)
  return done._replace(history=history, tallies=tallies, tasks=stream.tasks)


def to_json(done: Progress) -> dict[str, Any]:
  """Progress as lists and numbers."""
  tallies = [[x.tolist() for x in tally] for tally in done.tallies]
  return {**done._asdict(), "tallies": tallies}


def from_json(saved: dict[str, Any]) -> Progress:
  """The inverse of `to_json`."""
  return Progress(
    step=saved["step"],
    tallies=tuple(
      metrics.Tally(*(np.asarray(x) for x in tally))
      for tally in saved["tallies"]
    ),
    history=tuple(tuple(row) for row in saved["history"]),
    logged=saved["logged"],
    seconds=tuple(saved["seconds"]),
    waited=saved["waited"],
    stepped=saved["stepped"],
    probes=tuple(saved.get("probes", ())),
    tested=saved.get("tested", 0.0),
    tasks=tuple(tuple(task) for task in saved.get("tasks", ())),
  )
