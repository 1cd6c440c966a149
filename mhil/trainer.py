"""The loop over tasks: D-CE-Train, readable from top to bottom.

It knows no method: how a branch learns (`objective`) and what a head pays
(`loss`) arrive as arguments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import tqdm
from jax.sharding import Mesh

from mhil import (
  alone,
  compiling,
  facts,
  growing,
  inputs,
  losses,
  objectives,
  partitions,
  phases,
  prepare,
  programs,
  progress,
  streams,
  transforms,
)
from mhil import data as data_lib
from mhil import run as run_lib
from mhil.progress import Progress
from mhil.recipe import Recipe

DEFAULT = Recipe()


@runtime_checkable
class Checkpoints(Protocol):
  """What the loop asks of a place to save; see `checkpoint.Checkpoints`."""

  every: int

  def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
    """Saves in the background; the arrays may be overwritten at once.

    Raises:
      FloatingPointError: if a number is NaN or infinite; nothing is saved.
    """

  def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest sound save, laid out like these shapes; None without one."""

  def newest(self) -> int | None:
    """Step of the newest save."""


class Diverged(RuntimeError):
  """A loss, or a number that was to be saved, became NaN or infinite.

  Where a loss couples the heads (`Loss.share`), the NaN of one reaches all
  through their normaliser, so the head named need not be its origin.
  """


class Result(NamedTuple):
  """A finished (or stopped) run.

  Attributes:
    state: final parameters and all else that training needs.
    progress: what was measured, task by task.
    metrics: what follows from it; JSON-safe.
    finished: False if `stop` ended the run early.
    predict: `images [b, ...] -> classes [b]`, over all open heads.
  """

  state: programs.State
  progress: Progress
  metrics: dict[str, Any]
  finished: bool
  predict: Callable[[np.ndarray], np.ndarray]


def train(
  mesh: Mesh,
  stream: streams.Stream,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
  recipe: Recipe = DEFAULT,
  transform: transforms.Transform | None = None,
  partition: partitions.Partition = partitions.NONE,
  *,
  seed: int = 0,
  **watch: Any,
) -> Result:
  """Trains task after task and tests all open heads after each.

  Args:
    mesh: from `sharding.make_mesh`; heads are dealt over its `head` axis.
    stream: which classes arrive when.
    dataset: all samples, seen and unseen.
    objective: how a branch learns, e.g. `objectives.end_to_end(branch)`.
    loss: e.g. `losses.dce()`.
    recipe: optimiser, epochs, batch and the like.
    transform: what is remembered of the samples, and added to each batch, e.g.
      `rehearsal.transform`; None for nothing.
    partition: how a branch falls into parts that are trained apart, e.g.
      `subnets.partition`.
    seed: moves initialisation, exemplars, shuffling and augmentation.
    **watch: where to save, what to go on from and what to show; see `fit`.

  Raises:
    ValueError: if the parts do not fit together.
    Diverged: names the step, the head and the last good save.
  """
  run = prepare.build(
    mesh, stream, dataset, objective, loss, recipe, seed, transform, partition
  )
  return fit(run, **watch)


def fit(
  run: run_lib.Run,
  *,
  checkpoints: Checkpoints | None = None,
  resume: bool = False,
  after: Result | None = None,
  stop: Callable[[], bool] = lambda: False,
  log: Callable[[int, dict[str, float]], None] = lambda step, row: None,
  scored: Callable[[int, np.ndarray], None] | None = None,
  bar: bool = False,
) -> Result:
  """The loop of `train`, over parts that are built and compiled.

  Args:
    run: from `prepare.build`.
    checkpoints: where to save, after each task and every `every` steps.
    resume: go on from the newest save, bit for bit; it may be that of a shorter
      stream, see `growing`.
    after: where nothing is resumed, go on from this result of a shorter stream.
    stop: asked after every step; True saves and returns.
    log: gets each row of numbers as it is known.
    scored: gets, after each task, the scores of `alone.scores`.
    bar: show a progress bar.

  Raises:
    ValueError: if the stream does not go on where the saved one ends.
    Diverged: names the step, the head and the last good save.
  """
  # 1. Draw the heads, or take them from the newest save or an earlier run.
  stream, recipe = run.stream, run.recipe
  state, done = _begin(run, checkpoints if resume else None, after)
  note = progress.Recorder(done, log, run.heads, len(stream.heads))
  pace = run_lib.Pace(run)
  score = alone.scorer(run) if scored else None
  meter = tqdm.tqdm(
    total=run.phases[-1].steps.stop,
    initial=done.step,
    disable=not bar,
    unit="step",
    dynamic_ncols=True,
  )

  def save():
    # Only sound states are saved, so a save is always the last good one.
    note.flush()
    note.check(run.read(state)[2])
    assert checkpoints is not None
    try:
      checkpoints.save(note.step, state, progress.to_json(note.progress()))
    except FloatingPointError as error:
      raise Diverged(str(error)) from None

  try:
    for phase in run.phases:
      t = phase.task
      if t < len(done.tallies) or phase.steps.stop < note.step:
        continue
      # 2. Open the head of the task that has arrived.
      held = run.transform.held(state.memory)
      feed = phases.open_phase(run, phase, held)
      meter.set_description(f"task {t + 1}/{len(stream.tasks)}")
      if note.step == phase.steps.start and not phase.balanced:
        state = run_lib.renew(run, state, t)
      note.begin(t)
      given = inputs.steps(run, feed, note.step)

      # 3. Train all heads that learn; what comes from the host is read ahead.
      for step in range(note.step, phase.steps.stop):
        with note.waiting():
          batches, samples = next(given)
        state = run.step(state, batches, feed.task, samples)
        state = run.exchange(state, step + 1)
        pace(state)
        meter.update()
        note.step = step + 1
        if note.step % recipe.log_every == 0 or note.step == phase.steps.stop:
          state, sums, bad = run.read(state)
          note.push(sums, bad, run_lib.training(run, t))
        if note.step == phase.steps.stop:
          break
        stopping = stop()
        if checkpoints and (
          stopping or (checkpoints.every and note.step % checkpoints.every == 0)
        ):
          save()
        if stopping:
          return _result(run, state, note, finished=False)

      # 4. Choose what to keep, test every open head on all classes seen; save.
      note.flush()
      if not phase.balanced:
        state = phases.keep(run, state, t)
      if phase is not run.phases_of(t)[-1]:
        continue
      found = {"collected": phases.probe(run, state, t)}
      state = phases.settle(run, state, feed)
      found["settled"] = phases.probe(run, state, t)
      with note.testing():
        tally = phases.evaluate(run, state, feed)
      note.end(tally, found)
      if scored is not None:
        scored(t, alone.scores(run, state, feed, score))
      if checkpoints:
        save()
      note.compiled(compiling.count())
      if stop() and t + 1 < len(stream.tasks):
        return _result(run, state, note, finished=False)
  except progress.NotFinite as error:
    last = checkpoints.newest() if checkpoints else None
    where = "none was saved" if last is None else f"step {last}"
    # A normaliser that heads share carries a NaN from one to all.
    of = " of head {}" if run.loss.share is None else ", first seen in head {},"
    raise Diverged(
      f"the loss{of.format(error.head)} became NaN or infinite at step "
      f"{error.step}; last good checkpoint: {where}; lower "
      "optimizer.learning_rate or look at the data"
    ) from None
  finally:
    meter.close()
  return _result(run, state, note, finished=True)


def _begin(run, checkpoints, after) -> tuple[programs.State, Progress]:
  state = run_lib.start(run)
  if not checkpoints and after is None:
    return state, Progress(tasks=run.stream.tasks)
  like = run_lib.shapes(state)
  del state  # There may be no room for two.
  if saved := checkpoints and checkpoints.restore(like):
    return growing.grow(run, saved[0], progress.from_json(saved[1]), like)
  if after is None:
    return run_lib.start(run), Progress(tasks=run.stream.tasks)
  held = growing.lifted(after.state)
  return growing.grow(run, held, after.progress, like)


def _result(run, state, note, finished) -> Result:
  done = note.progress()
  last = max(len(done.tallies) - 1, 0)
  numbers = progress.measured(done) | facts.of_run(run, state)
  numbers["compiles"]["after_first_task"] = note.compiled_later
  predict = phases.predictor(run, state, last)
  return Result(state, done, numbers, finished, predict)
