"""A phase of a run: its tables, its exemplars, its test."""

import jax
import numpy as np

from mhil import bank as bank_lib
from mhil import herding, inputs, metrics, plan, programs, scoring, sharding
from mhil import run as run_lib

P = jax.P
NOTHING = np.zeros(0, np.int32)


def open_phase(
  run: run_lib.Run, phase: plan.Phase, held: np.ndarray = NOTHING
) -> inputs.Feed:
  """Opens the task's head: who may train and score, and how often each class.

  Args:
    run: the run.
    phase: which.
    held: rows in the memory; only a balanced phase reads them.
  """
  stream, labels = run.stream, run.dataset.train_labels
  seen = np.zeros((len(stream.tasks), stream.head_width), bool)
  for c in stream.seen(phase.task):
    seen[stream.head_of[c], stream.column_of[c]] = True
  counts = plan.counts(phase, stream, labels, run.recipe, held)
  task = bank_lib.Task(
    run_lib.scalar(phase.task + 1, run.mesh),
    run_lib.scalar(phase.steps.start, run.mesh),
    run_lib.scalar(len(phase.steps), run.mesh),
    sharding.replicated(np.bool_(phase.balanced), run.mesh),
    sharding.replicated(counts, run.mesh),
    bank_lib.place(bank_lib.arrange(seen, run.mesh), run.mesh),
  )
  return inputs.Feed(phase, held, task)


def keep(run: run_lib.Run, state: programs.State, t: int) -> programs.State:
  """The state once the memory has chosen of what task `t` taught.

  A memory that keeps what passes has nothing left to choose.
  """
  if run.transform.keep is None:
    return state
  labels, orders = run.dataset.train_labels, {}
  # No policy leaves a class more.
  most = -(-run.transform.size // len(run.stream.seen(t)))
  for c in run.stream.tasks[t]:
    rows = np.flatnonzero(labels == c)
    found = features(run, state, t, rows)
    orders[c] = herding.herding(found, rows, most)
  images = run.dataset.train_images
  kept = run.transform.keep(state.memory, orders, lambda rows: images[rows])
  return state._replace(memory=kept)


def whole(run: run_lib.Run, state: programs.State, t: int) -> bank_lib.Bank:
  """The heads as they are tested after task `t`.

  New samples and what the memory holds may be looked at.
  """
  labels = run.dataset.train_labels
  new = plan.arriving(run.stream, labels, run.recipe, t)
  rows = np.union1d(new, run.transform.held(state.memory))
  return run.settle(run.whole(state.bank), rows)


def features(
  run: run_lib.Run, state: programs.State, t: int, rows: np.ndarray
) -> np.ndarray:
  """Features `[n, f]` of training samples in head `t`, for herding."""
  found, bank = [], whole(run, state, t)
  batch = run.recipe.test_batch
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    padded = np.pad(part, (0, batch - len(part)), mode="edge")
    images = sharding.replicated(run.dataset.train_images[padded], run.mesh)
    out = run.features(bank, run_lib.scalar(t, run.mesh), images)
    found.append(np.asarray(out)[t % run.mesh.shape["head"], : len(part)])
  return np.concatenate(found)


def evaluate(
  run: run_lib.Run, state: programs.State, feed: inputs.Feed
) -> metrics.Tally:
  """Test counts, `metrics.Tally`, over all classes seen by then."""
  seen = np.isin(run.dataset.test_labels, run.stream.seen(feed.phase.task))
  bank = whole(run, state, feed.phase.task)
  parts = [
    run.tally(bank, feed.task, part, run_lib.scalar(counted, run.mesh))
    for part, counted in inputs.tests(run, int(seen.sum()))
  ]
  return metrics.Tally(*(sum(map(np.asarray, each)) for each in zip(*parts)))


def predictor(run: run_lib.Run, state: programs.State, t: int):
  """`images [b, ...] -> classes [b]` over the heads open after task `t`."""
  task = open_phase(run, run.phases_of(t)[0]).task
  bank = whole(run, state, t)
  scores = jax.jit(
    scoring.class_scores(run.mesh, run.dataset, run.objective, run.loss)
  )
  # -1 in padded columns, which never win.
  class_of = np.full((len(run.stream.tasks), run.stream.head_width), -1)
  for c in range(run.dataset.classes):
    class_of[run.stream.head_of[c], run.stream.column_of[c]] = c

  def predict(images: np.ndarray) -> np.ndarray:
    padding = -len(images) % run.mesh.shape["data"]
    padded = np.concatenate([images, images[:1].repeat(padding, 0)])
    placed = sharding.place(padded, run.mesh, P())
    table = np.asarray(scores(bank, task, placed))[: len(images)]
    best = table[:, : len(class_of)].reshape(len(images), -1).argmax(1)
    return class_of.reshape(-1)[best]

  return predict
