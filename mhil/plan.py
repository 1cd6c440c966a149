"""The plan of a stream: which rows each step of each phase trains on.

A task has one phase, or two where its classifier is balanced at the end. All
lengths are known before training; what the memory holds is not.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from mhil import pipeline, streams
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
    rows: of one pass.
  """

  task: int
  balanced: bool
  steps: range
  epochs: int
  rows: int

  @property
  def per_epoch(self) -> int:
    """Steps of one pass."""
    return len(self.steps) // self.epochs


def phases(
  stream: streams.Stream, labels: Labels, recipe: Recipe, size: int
) -> tuple[Phase, ...]:
  """Every phase of the stream, in order.

  Args:
    stream, labels, recipe: the run's.
    size: what the memory can hold, of which balanced phases make passes.
  """
  plan: list[Phase] = []
  start = 0
  for t in range(len(stream.tasks)):
    rows = len(arriving(stream, labels, recipe, t))
    todo = [(False, recipe.epochs, rows)]
    if recipe.balanced_epochs and t:
      seen = int(np.isin(labels, stream.seen(t)).sum())
      todo.append((True, recipe.balanced_epochs, min(size, seen)))
    for balanced, epochs, rows in todo:
      steps = range(start, start + epochs * -(-rows // recipe.batch))
      plan.append(Phase(t, balanced, steps, epochs, rows))
      start = steps.stop
  return tuple(plan)


def arriving(
  stream: streams.Stream, labels: Labels, recipe: Recipe, t: int
) -> Rows:
  """Rows of the training set that task `t` trains on."""
  classes = stream.seen(t) if recipe.cumulative else stream.tasks[t]
  return np.flatnonzero(np.isin(labels, classes)).astype(np.int32)


def epoch(
  phase: Phase,
  stream: streams.Stream,
  labels: Labels,
  recipe: Recipe,
  held: Rows,
  seed: int,
  index: int,
) -> Int[np.ndarray, "k b"]:
  """The batches of one pass: row numbers `[steps, batch]`.

  Where the rows run out, a row of the same pass fills the gap, written `~row`:
  its weight is zero, but batch statistics must not see a stranger.

  Args:
    phase: which.
    stream, labels, recipe, seed: the run's.
    held: rows in the memory, which a balanced phase trains on.
    index: which pass of the phase.
  """
  if phase.balanced:
    # A buffer may hold a sample twice.
    held = np.unique(held)
    rows = np.full(phase.rows, -1, np.int32)
    rows[: len(held)] = held
    # Counted on from the task's first phase, so that no shuffle comes twice.
    index += recipe.epochs
  else:
    rows = arriving(stream, labels, recipe, phase.task)
  order = pipeline.epoch_order(
    rows, seed=seed, task=phase.task, epoch=index, batch=recipe.batch
  )
  gaps = order < 0
  order[gaps] = ~np.resize(order[~gaps], int(gaps.sum()))
  return order


def rows(order: Int[np.ndarray, "*k"]) -> Int[np.ndarray, "*k"]:
  """The rows that an order reads, those of weight zero among them."""
  return np.where(order < 0, ~order, order)


def counts(
  phase: Phase,
  stream: streams.Stream,
  labels: Labels,
  recipe: Recipe,
  held: Rows,
) -> np.ndarray:
  """Samples of each class `[classes]` in a step, on average.

  Those that the memory adds to it are not counted.
  """
  rows = np.unique(held)
  if not phase.balanced:
    rows = arriving(stream, labels, recipe, phase.task)
  each = np.bincount(labels[rows], minlength=len(stream.order))
  return (each * (recipe.batch / max(len(rows), 1))).astype(np.float32)
