"""What is counted on the devices, against a plain numpy model."""

import jax.numpy as jnp
import numpy as np
import pytest

from mhil import inputs, losses, programs, scoring
from tests import tiny

HEADS, WIDTH = 4, 3


def counted(table, owners, columns, here):
  """The same from the definitions, a sample at a time."""
  tally = {
    name: np.zeros(HEADS, int)
    for name in ("total", "correct", "head_correct", "within_correct", "top5")
  }
  confusion = np.zeros((HEADS, HEADS), int)
  for scores, owner, column, real in zip(table, owners, columns, here):
    if not real:
      continue
    flat = scores.reshape(-1)
    best_head, best_column = divmod(int(flat.argmax()), WIDTH)
    rank = sorted(flat, reverse=True).index(scores[owner, column])
    tally["total"][owner] += 1
    tally["correct"][owner] += (best_head, best_column) == (owner, column)
    tally["head_correct"][owner] += best_head == owner
    tally["within_correct"][owner] += scores[owner].argmax() == column
    tally["top5"][owner] += rank < 5
    confusion[owner, best_head] += 1
  return tally, confusion


def test_counts_equal_their_definitions():
  rng = np.random.default_rng(0)
  n = 300
  table = rng.normal(size=(n, HEADS, WIDTH)).astype(np.float32)
  owners = rng.integers(0, 3, n)
  columns = np.where(owners == 1, rng.integers(0, 2, n), rng.integers(0, 3, n))
  table[np.arange(n), owners, columns] += 1.0
  table[:, 3] = losses.MASKED  # a closed head
  table[:, 1, 2] = losses.MASKED  # a head of two classes
  here = np.arange(n) < 280  # the rest fills the last batch up
  got = scoring.count(
    jnp.asarray(table), jnp.asarray(owners), jnp.asarray(columns),
    jnp.asarray(here),
  )  # fmt: skip
  want, confusion = counted(table, owners, columns, here)
  for name, value in want.items():
    assert np.asarray(getattr(got, name)).tolist() == value.tolist(), name
  np.testing.assert_array_equal(got.confusion, confusion)
  # Neither all right nor all wrong, or the test could not fail.
  assert 0 < want["correct"].sum() < want["top5"].sum() < 280


def test_equal_scores_share_their_rank():
  """Six classes tie: none of the others is above the true one."""
  table = jnp.zeros((1, 2, 3))
  zero = jnp.zeros(1, jnp.int32)
  got = scoring.count(table, zero, zero + 2, jnp.ones(1, bool))
  assert int(got.top5[0]) == 1 and int(got.correct[0]) == 0


@pytest.mark.parametrize("seen", [36, 24, 21, 5])
def test_each_batch_of_a_test_has_its_share_of_every_class(seen):
  """Statistics of a batch of one class alone would take that class away."""
  classes, each, batch = 3, 12, 6
  labels = np.repeat(np.arange(classes, dtype=np.int32), each)
  head, column = jnp.array([0, 0, 1]), jnp.array([0, 1, 0])
  rows = jnp.asarray(labels)  # an image is its class
  samples = programs.Samples(rows, rows, head, column, None)
  there = np.bincount(labels[:seen], minlength=classes)
  batches = -(-seen // batch)

  def scores(bank, task, images):
    """Right in a batch that has its share, to a sample, and wrong in others."""
    found = jnp.bincount(images, length=classes)
    # What fills a batch up is seen, too, and no share.
    fair = (found >= there // batches).all()
    table = (
      jnp.zeros((batch, 2, 2))
      .at[jnp.arange(batch), head[images], column[images]]
      .set(1.0)
    )
    return jnp.where(fair, table, -table)

  tally = scoring.evaluate(scores, batch, 2)(None, None, samples, seen)
  total = np.asarray(tally.total)
  assert total.tolist() == [there[:2].sum(), there[2]], "each counts once"
  np.testing.assert_array_equal(tally.correct, total)


def test_test_rows_are_in_order_of_heads_and_classes():
  stream, dataset = tiny.stream(), tiny.dataset()
  mixed = dataset._replace(test_labels=dataset.test_labels[::-1])
  rows = inputs.by_task(stream, mixed)
  assert sorted(rows) == list(range(len(rows)))
  labels = mixed.test_labels[rows]
  order = [c for task in stream.tasks for c in sorted(task)]
  assert labels.tolist() == np.repeat(order, 7).tolist()
