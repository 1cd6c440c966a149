"""A phase of a run: its tables, its exemplars, its test."""

import jax
import numpy as np

from mhil import (
  across,
  herding,
  inputs,
  metrics,
  plan,
  programs,
  scoring,
  sharding,
)
from mhil import bank as bank_lib
from mhil import run as run_lib

P = jax.P
NOTHING = np.zeros(0, np.int32)
# Statistics that move by a tenth forget all but half a per cent of their past.
SETTLING = 50


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
  seen = np.zeros((len(stream.heads), stream.head_width), bool)
  classes = list(stream.seen(phase.task))
  seen[stream.head_of[classes], stream.column_of[classes]] = True
  counts = plan.counts(phase, stream, labels, run.recipe, held)
  task = bank_lib.Task(
    run_lib.scalar(stream.newest(phase.task) + 1, run.mesh),
    run_lib.scalar(phase.steps.start, run.mesh),
    run_lib.scalar(len(phase.steps), run.mesh),
    sharding.replicated(np.bool_(phase.balanced), run.mesh),
    sharding.replicated(counts, run.mesh),
    bank_lib.place(run.numbers, run.mesh),
    bank_lib.place(bank_lib.arrange(seen[list(run.heads)], run.mesh), run.mesh),
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
  return run.collect(run.whole(state.bank), rows)


def features(
  run: run_lib.Run, state: programs.State, t: int, rows: np.ndarray
) -> np.ndarray:
  """Features `[n, f]` of training samples in task `t`'s head, for herding."""
  bank, images = whole(run, state, t), run.dataset.train_images
  head = run.stream.newest(t)
  return _of_head(run, run.features, bank, head, images, rows)


def _of_head(run, program, bank, head, images, rows):
  """What a program of a head makes of images, batch by batch."""
  found, row = [], run.heads.index(head)
  batch = run.recipe.test_batch
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    padded = np.pad(part, (0, batch - len(part)), mode="edge")
    given = sharding.replicated(images[padded], run.mesh)
    out = program(bank, run_lib.scalar(row, run.mesh), given)
    here = row % run.mesh.shape["head"], slice(len(part))
    found.append(jax.tree.map(lambda x, here=here: x[here], across.fetch(out)))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def settle(
  run: run_lib.Run, state: programs.State, feed: inputs.Feed
) -> programs.State:
  """The state with statistics of the network that is tested, if they differ.

  They move as in training, over the first batches of the phase again. Each has
  the rows that the last step drew from the memory: to draw others, a step needs
  a second copy of it.
  """
  if run.new_stats is None:
    return state
  memory = run_lib.shown(run, state).memory
  first = feed.phase.steps.start
  stop = min(feed.phase.steps.stop, first + SETTLING)
  bank = run.whole(state.bank)._replace(opt=(), side=())
  for step, given in zip(range(first, stop), inputs.steps(run, feed, first)):
    now = programs.State(run_lib.scalar(step, run.mesh), bank, memory)
    stats = run.new_stats(now, given[0], feed.task, given[1])
    bank = bank._replace(stats=jax.block_until_ready(stats))
  return state._replace(bank=run.with_stats(state.bank, bank.stats))


def probe(run: run_lib.Run, state: programs.State, t: int) -> dict[str, float]:
  """What the objective measures of each open head on its classes' test images.

  Of logits, the accuracy within the head; of other numbers, the mean; then
  the mean over heads.
  """
  if run.probe is None:
    return {}
  stream, dataset, rows = run.stream, run.dataset, []
  bank, seen = run.whole(state.bank), set(stream.seen(t))
  for head in run_lib.opened(run, t):
    known = [c for c in stream.heads[head] if c in seen]
    mine = np.flatnonzero(np.isin(dataset.test_labels, known))
    found = _of_head(run, run.probe, bank, head, dataset.test_images, mine)
    column = stream.column_of[dataset.test_labels[mine]]
    width = len(known)
    rows.append(
      {
        name: (x[:, :width].argmax(1) == column) if x.ndim == 2 else x
        for name, x in found.items()
      }
    )
  names = rows[0] if rows else ()
  return {n: float(np.mean([row[n].mean() for row in rows])) for n in names}


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


def class_scores(run: run_lib.Run):
  """`(bank, task, images) -> [b, tasks, c]` of a run; see `scoring`."""
  parts = run.mesh, run.dataset, run.objective, run.loss
  count = len(run.stream.heads)
  scores = scoring.class_scores(*parts, run.numbers, count)
  return scoring.by_task(scores, run.stream)


def predictor(run: run_lib.Run, state: programs.State, t: int):
  """`images [b, ...] -> classes [b]` over the heads open after task `t`."""
  task = open_phase(run, run.phases_of(t)[0]).task
  bank = whole(run, state, t)
  winner = jax.jit(
    scoring.winner(run.mesh, run.dataset, run.objective, run.loss)
  )
  # -1 in padded columns and closed heads, which never win.
  class_of = np.full((bank.loss.size, run.stream.head_width), -1)
  there = run_lib.opened(run, t)
  class_of[: len(there)] = run.stream.class_of[list(there)]

  def predict(images: np.ndarray) -> np.ndarray:
    padding = -len(images) % run.mesh.shape["data"]
    padded = np.concatenate([images, images[:1].repeat(padding, 0)])
    placed = sharding.place(padded, run.mesh, P())
    place = np.asarray(winner(bank, task, placed))[: len(images)]
    return class_of.reshape(-1)[place]

  return predict
