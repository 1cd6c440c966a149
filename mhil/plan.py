"""The plan of a stream: which rows each step of each phase trains on.

A task has one phase, or two where its classifier is balanced at the end. All
lengths are known before training; which exemplars are kept is not, where they
are chosen by features.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mhil import memory, pipeline, streams
from mhil.recipe import Recipe

Labels = Int[np.ndarray, " n"]
Rows = Int[np.ndarray, " m"]


class Phase(NamedTuple):
  """A stretch of steps with one set of rows.

  Attributes:
    task: the task that it belongs to.
    balanced: True for the balanced fine-tuning after a task's training.
    steps: its global steps.
    epochs: passes over its rows.
    rows: of one pass, without exemplars that have room of their own.
    width: of these in a batch.
  """

  task: int
  balanced: bool
  steps: range
  epochs: int
  rows: int
  width: int

  @property
  def per_epoch(self) -> int:
    """Steps of one pass."""
    return len(self.steps) // self.epochs


def phases(
  stream: streams.Stream, labels: Labels, recipe: Recipe
) -> tuple[Phase, ...]:
  """Every phase of the stream, in order."""
  plan: list[Phase] = []
  start = 0
  for t, classes in enumerate(stream.tasks):
    new = int(np.isin(labels, classes).sum())
    old = kept_size(labels, stream.seen(t - 1) if t else (), recipe)
    shared = recipe.replay if old else 0
    rows = new + (0 if shared else old)
    todo = [(False, recipe.epochs, rows, recipe.batch - shared)]
    if recipe.balanced_epochs and t:
      rows = kept_size(labels, stream.seen(t), recipe)
      todo.append((True, recipe.balanced_epochs, rows, recipe.batch))
    for balanced, epochs, rows, width in todo:
      steps = range(start, start + epochs * -(-rows // width))
      plan.append(Phase(t, balanced, steps, epochs, rows, width))
      start = steps.stop
  return tuple(plan)


def kept_size(labels: Labels, classes: tuple[int, ...], recipe: Recipe) -> int:
  """How many exemplars of the seen classes the memory holds."""
  there = [int((labels == c).sum()) for c in classes]
  if recipe.memory is None:
    return sum(there)
  if recipe.selection == "reservoir":
    return min(recipe.memory, sum(there))
  shares = memory.shares(recipe.memory, len(classes), recipe.protocol)
  return sum(min(pair) for pair in zip(shares, there))


def epoch(
  phase: Phase,
  stream: streams.Stream,
  labels: Labels,
  recipe: Recipe,
  kept: Rows,
  seed: int,
  index: int,
) -> Int[np.ndarray, "k b"]:
  """The batches of one pass: row numbers `[steps, batch]`.

  Where the rows run out, a row of the same pass fills the gap, written `~row`:
  its weight is zero, but batch statistics must not see a stranger.

  Args:
    phase: which.
    stream, labels, recipe, seed: the run's.
    kept: rows in the memory; with a balanced phase, of its new classes too.
    index: which pass of the phase.
  """
  order = _order(phase, stream, labels, recipe, kept, seed, index)
  gaps = order < 0
  order[gaps] = ~np.resize(order[~gaps], int(gaps.sum()))
  return order


def rows(order: Int[np.ndarray, "*k"]) -> Int[np.ndarray, "*k"]:
  """The rows that an order reads, those of weight zero among them."""
  return np.where(order < 0, ~order, order)


def _order(phase, stream, labels, recipe, kept, seed, index):
  key = {"seed": seed, "task": phase.task}
  if phase.balanced:
    # Counted on from the task's first phase, so that no shuffle comes twice.
    index += recipe.epochs
    return pipeline.epoch_order(kept, epoch=index, batch=recipe.batch, **key)
  new = np.flatnonzero(np.isin(labels, stream.tasks[phase.task]))
  new = new.astype(np.int32)
  if not (recipe.replay and len(kept)):
    rows = np.concatenate([new, kept])
    return pipeline.epoch_order(rows, epoch=index, batch=recipe.batch, **key)
  width = recipe.batch - recipe.replay
  fresh = pipeline.epoch_order(new, epoch=index, batch=width, **key)
  return np.concatenate(
    [fresh, _replayed(len(fresh), kept, recipe, key, index)], 1
  )


def counts(
  phase: Phase,
  stream: streams.Stream,
  labels: Labels,
  recipe: Recipe,
  kept: Rows,
) -> np.ndarray:
  """How often each class `[classes]` is drawn, up to a common factor."""
  classes = len(stream.order)
  old = np.bincount(labels[kept], minlength=classes).astype(np.float64)
  if phase.balanced:
    return old
  new = np.bincount(
    labels[np.isin(labels, stream.tasks[phase.task])], minlength=classes
  )
  if recipe.replay and len(kept):
    # Of each batch, `replay` rows are exemplars, whatever their number.
    old *= recipe.replay / (recipe.batch - recipe.replay)
    old *= new.sum() / len(kept)
  return new + old


def _replayed(steps, kept, recipe, key, index):
  """Exemplars `[steps, replay]`: shuffled passes over all, end to end."""
  passes = -(-steps * recipe.replay // len(kept))
  drawn = [
    pipeline.epoch_order(
      kept, epoch=2**31 + index * passes + i, batch=len(kept), **key
    )[0]
    for i in range(passes)
  ]
  rows = np.concatenate(drawn)[: steps * recipe.replay]
  return rows.reshape(steps, recipe.replay)
