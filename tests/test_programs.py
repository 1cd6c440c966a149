"""What is counted on the devices, against a plain numpy model."""

import jax.numpy as jnp
import numpy as np

from mhil import losses, scoring

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
  got = scoring._count(
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
  got = scoring._count(table, zero, zero + 2, jnp.ones(1, bool))
  assert int(got.top5[0]) == 1 and int(got.correct[0]) == 0
