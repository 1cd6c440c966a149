"""A phase of a run: its tables, its exemplars, its test."""

import jax
import numpy as np

from mhil import bank as bank_lib
from mhil import inputs, memory, metrics, plan, programs, sharding
from mhil import run as run_lib

P = jax.P
NOTHING = np.zeros(0, np.int32)


def open_phase(
  run: run_lib.Run, phase: plan.Phase, kept: np.ndarray
) -> inputs.Feed:
  """Opens the task's head: who may train and score, and the class priors."""
  stream, labels = run.stream, run.dataset.train_labels
  shape = len(stream.tasks), stream.head_width
  counts, seen = np.zeros(shape), np.zeros(shape, bool)
  drawn = plan.counts(phase, stream, labels, run.recipe, kept)
  for c in stream.seen(phase.task):
    place = stream.head_of[c], stream.column_of[c]
    counts[place], seen[place] = drawn[c], True
  prior = np.zeros((shape[0], shape[1] + 1), np.float32)
  if run.recipe.correction:
    prior = run.loss.prior(counts, seen)
  task = bank_lib.Task(
    run_lib.scalar(phase.task + 1, run.mesh),
    run_lib.scalar(phase.steps.start, run.mesh),
    run_lib.scalar(len(phase.steps), run.mesh),
    sharding.replicated(np.bool_(phase.balanced), run.mesh),
    bank_lib.place(bank_lib.arrange(prior, run.mesh), run.mesh),
    bank_lib.place(bank_lib.arrange(seen, run.mesh), run.mesh),
  )
  return inputs.Feed(phase, kept, task)


def keep(
  run: run_lib.Run, state: programs.State, t: int, kept: memory.Kept
) -> memory.Kept:
  """What the memory holds once task `t` is learnt."""
  stream, recipe = run.stream, run.recipe
  labels, classes = run.dataset.train_labels, stream.tasks[t]
  size = len(labels) if recipe.memory is None else recipe.memory
  if recipe.memory is None:
    orders = {c: np.flatnonzero(labels == c) for c in classes}
    return memory.update(kept, orders, size, "per_class")
  if recipe.selection == "reservoir":
    came = [
      np.flatnonzero(np.isin(labels, task)) for task in stream.tasks[: t + 1]
    ]
    arrived = np.concatenate(came).astype(np.int32)
    return {-1: memory.reservoir(arrived, size, run.seed)}
  if recipe.selection == "random":
    orders = {c: memory.random_order(labels, c, run.seed) for c in classes}
    return memory.update(kept, orders, size, recipe.protocol)
  share = memory.shares(size, len(stream.seen(t)), recipe.protocol)[-1]
  orders = {}
  for c in classes:
    rows = np.flatnonzero(labels == c)
    orders[c] = memory.herding(features(run, state, t, rows), rows, share + 1)
  return memory.update(kept, orders, size, recipe.protocol)


def features(
  run: run_lib.Run, state: programs.State, t: int, rows: np.ndarray
) -> np.ndarray:
  """Features `[n, f]` of training samples in head `t`, for herding."""
  found = []
  batch = run.recipe.test_batch
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    padded = np.pad(part, (0, batch - len(part)), mode="edge")
    images = sharding.replicated(run.dataset.train_images[padded], run.mesh)
    out = run.features(state.bank, run_lib.scalar(t, run.mesh), images)
    found.append(np.asarray(out)[t % run.mesh.shape["head"], : len(part)])
  return np.concatenate(found)


def evaluate(
  run: run_lib.Run, state: programs.State, feed: inputs.Feed
) -> metrics.Tally:
  """Test counts, `metrics.Tally`, over all classes seen by then."""
  seen = np.isin(run.dataset.test_labels, run.stream.seen(feed.phase.task))
  parts = [
    run.tally(state.bank, feed.task, part, run_lib.scalar(counted, run.mesh))
    for part, counted in inputs.tests(run, int(seen.sum()))
  ]
  return metrics.Tally(*(sum(map(np.asarray, each)) for each in zip(*parts)))


def predictor(run: run_lib.Run, state: programs.State, t: int):
  """`images [b, ...] -> classes [b]` over the heads open after task `t`."""
  task = open_phase(run, run.phases_of(t)[0], NOTHING).task
  scores = jax.jit(
    programs.class_scores(run.mesh, run.dataset, run.objective, run.loss)
  )
  # -1 in padded columns, which never win.
  class_of = np.full((len(run.stream.tasks), run.stream.head_width), -1)
  for c in range(run.dataset.classes):
    class_of[run.stream.head_of[c], run.stream.column_of[c]] = c

  def predict(images: np.ndarray) -> np.ndarray:
    padding = -len(images) % run.mesh.shape["data"]
    padded = np.concatenate([images, images[:1].repeat(padding, 0)])
    placed = sharding.place(padded, run.mesh, P())
    table = np.asarray(scores(state.bank, task, placed))[: len(images)]
    best = table[:, : len(class_of)].reshape(len(images), -1).argmax(1)
    return class_of.reshape(-1)[best]

  return predict
