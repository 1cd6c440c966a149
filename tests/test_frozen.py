"""The frozen classifier: it learns nothing and reads only what it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import frozen, networks, objectives

KEY = jax.random.key(0)
BRANCH = networks.mlp(4, 3, (8, 8), norm="batch")


@functools.cache
def objective():
  return objectives.end_to_end(frozen.frozen(BRANCH, 2))


def criterion(logits):
  return -jax.nn.log_softmax(logits)[:, 0]


def test_the_classifier_gets_no_gradient_and_the_trunk_does():
  x = jax.random.normal(KEY, (6, 4))
  zeros = jnp.zeros(6, jnp.int32)
  batch = objectives.Batch(x, zeros, zeros, jnp.full(6, 1 / 6))
  params, stats, _ = objective().init(KEY)
  step = jax.jit(
    lambda p, s: objective().step(p, s, {}, batch, criterion, KEY).grads
  )
  grads = step(params, stats)
  assert all(
    np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads["readout"])
  )
  assert np.abs(grads["dense1"]["dense"]["kernel"]).max() > 0
  # Only what is read gets any credit.
  assert np.all(np.asarray(grads["dense1"]["norm"]["scale"])[2:] == 0)


def test_logits_read_the_first_features_alone():
  branch = frozen.frozen(BRANCH, 2)
  params, _ = branch.init(KEY)
  features = jax.random.normal(KEY, (3, 8))
  want = branch.readout(params, features)
  same = branch.readout(params, features.at[:, 2:].set(7.0))
  np.testing.assert_array_equal(want, same)
  other = branch.readout(params, features.at[:, 0].set(7.0))
  assert np.abs(want - other).max() > 0.1


def test_pieces_chain_to_apply():
  branch = frozen.frozen(BRANCH, 2)
  params, stats = branch.init(KEY)
  x = jax.random.normal(KEY, (3, 4))
  want, _ = branch.apply(params, stats, x, False)
  for name in branch.pieces:
    x, _ = branch.piece(name, params[name], stats[name], x, False)
  np.testing.assert_array_equal(x, want)


def test_nothing_is_read_is_the_branch_itself():
  assert frozen.frozen(BRANCH, 0) is BRANCH


@pytest.mark.parametrize("reads", [8, 9, -1])
def test_as_many_as_there_are_is_refused(reads):
  words = f"network.reads={reads} is not fewer than the 8 .*network.reads=4"
  with pytest.raises(ValueError, match=words):
    frozen.frozen(BRANCH, reads)


def test_logits_that_are_normalised_are_refused():
  batch = networks.mlp(4, 3, hidden=(8,), norm="batch")
  assert frozen.frozen(batch, 2) is not batch
  normed = networks.mlp(4, 3, hidden=(8,), norm="batch", output_norm=True)
  assert frozen.frozen(normed, 0) is normed
  words = r"^network\.reads=2 .*; use network\.output_norm=false$"
  with pytest.raises(ValueError, match=words):
    frozen.frozen(normed, 2)
