"""Guesses: by networks and by sample, what they learn and what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import (
  auxnet,
  chain,
  coupling,
  guessing,
  layer_parallel,
  networks,
  objectives,
  sharding,
)

KEY = jax.random.key(0)
SAMPLES = 9


@functools.cache
def cut():
  return chain.chain(networks.mlp(4, 3, (8, 8)), (2, 2, 1), 3)


def batch_of(number=(3, 0, 7, 5), weight=(0.25,) * 4):
  images = jax.random.normal(KEY, (4, 2, 2, 1))
  zeros = jnp.zeros(4, jnp.int32)
  return objectives.Batch(
    images, zeros, zeros, jnp.asarray(weight), jnp.asarray(number, jnp.int32)
  )


def network(multipliers="none", **how):
  aux = auxnet.auxnet(cut(), 0.9, multipliers=multipliers == "network")
  return guessing.by_network(aux, cut(), multipliers=multipliers, **how)


def targets(value):
  return [jnp.full((4, 8), value)] * 2


def test_learning_moves_guesses_towards_what_was_mended():
  guesser, batch = network(), batch_of()
  goal = guessing.Guess(targets(2.0), [None, None])

  @jax.jit
  def steps(key, batch):
    params = guesser.params(key)

    def off(params):
      guess = guesser.guess(params, {}, {}, batch)
      return sum(jnp.mean((a - b) ** 2) for a, b in zip(guess.states, goal[0]))

    def one(_, params):
      grads = guesser.learn(params, batch, goal)
      return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    return off(params), off(jax.lax.fori_loop(0, 100, one, params))

  before, after = steps(KEY, batch)
  assert after < 0.2 * before


def test_learning_is_relative_to_the_size_of_states():
  """So that one rate fits layers of any scale."""
  guesser, batch = network(rate=3.0), batch_of()
  params = guesser.params(KEY)

  def total(size):
    goal = guessing.Guess(targets(size), [None, None])
    grads = jax.jit(guesser.learn)(params, batch, goal)
    return sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(grads))

  # Far from a small guess, the gradient falls as one over the size.
  assert total(1e4) == pytest.approx(10 * total(1e5), rel=0.01)


def test_both_heads_learn_where_there_are_two():
  guesser, batch = network("network"), batch_of()
  params = guesser.params(KEY)
  goal = guessing.Guess(targets(1.0), targets(0.5))
  grads = jax.jit(guesser.learn)(params, batch, goal)
  for name in "aux1", "aux2":
    for out in grads[name]["out"].values():
      assert np.abs(out["kernel"]).max() > 0


def test_a_guesser_of_one_interface_is_a_part_of_the_whole():
  guesser, batch = network(), batch_of()
  params = guesser.params(KEY)
  both = guesser.guess(params, {}, {}, batch)
  for k in (1, 2):
    one = guesser.at(k)
    alone = one.guess({f"aux{k}": params[f"aux{k}"]}, {}, {}, batch)
    np.testing.assert_array_equal(alone.states[0], both.states[k - 1])
    assert one.costs == guesser.costs[k - 1 : k]


def test_multipliers_by_sample_come_back_to_their_sample():
  guesser = network("sample", samples=SAMPLES)
  side, params = guesser.side(), guesser.params(KEY)
  assert guesser.at is None
  assert "seen" not in side and side["states"] == []
  mended = guessing.Guess(targets(0.0), targets(1.5))
  batch = batch_of(weight=(0.5, 0.5, 0.0, 0.0))
  side = guesser.store(side, batch, mended)
  again = guesser.guess(params, {}, side, batch_of(number=(0, 7, 3, 1)))
  # Sample 7 was padding.
  np.testing.assert_array_equal(
    again.multipliers[0][:, 0], [1.5, 0.0, 1.5, 0.0]
  )


def test_a_sample_twice_in_a_batch_counts_as_its_mean():
  guesser = network("sample", samples=SAMPLES)
  values = [jnp.arange(4.0)[:, None] * jnp.ones(8)] * 2
  side = guesser.store(
    guesser.side(),
    batch_of(number=(2, 2, 4, 5)),
    guessing.Guess(targets(0.0), values),
  )
  np.testing.assert_allclose(side["multipliers"][1][2], 0.5)
  np.testing.assert_allclose(side["multipliers"][1][5], 3.0)


def test_tables_hear_of_every_workers_samples():
  """Two workers of two samples each leave what one of four does."""
  guesser = network("sample", samples=SAMPLES)
  values = [jnp.arange(32.0).reshape(4, 8)] * 2
  mended = guessing.Guess(targets(0.0), values)
  # Sample 2 is at both.
  batch, side = batch_of(number=(2, 7, 2, 5)), guesser.side()
  want = guesser.store(side, batch, mended)
  mesh = sharding.make_mesh(data=2)

  def local(side, batch, mended):
    return guesser.store(side, batch, mended)

  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("data"), jax.P("data")),
    out_specs=jax.P(),
  )
  placed = sharding.place((batch, mended), mesh, jax.P("data"))
  found = jax.jit(spread)(sharding.replicated(side, mesh), *placed)
  jax.tree.map(np.testing.assert_allclose, found, want)
  mean = np.asarray(values[0])[[0, 2]].mean(0)
  np.testing.assert_array_equal(want["multipliers"][0][2], mean)


def test_states_by_sample_begin_as_the_chain_and_stay_as_mended():
  guesser = guessing.by_sample(cut(), SAMPLES, multipliers=False)
  params, stats = cut().branch.init(KEY)
  side, batch = guesser.side(), batch_of()
  first = guesser.guess(params, stats, side, batch)
  x, _ = cut().run(0, params, stats, batch.images, True)
  np.testing.assert_array_equal(first.states[0], x)
  assert first.multipliers == [None, None]
  mended = guessing.Guess(targets(4.0), [None, None])
  side = guesser.store(side, batch, mended)
  assert np.flatnonzero(side["seen"]).tolist() == [0, 3, 5, 7]
  second = guesser.guess(params, stats, side, batch_of(number=(3, 1, 7, 2)))
  assert np.all(np.asarray(second.states[1])[[0, 2]] == 4.0)
  assert not np.any(np.asarray(second.states[1])[[1, 3]] == 4.0)


@pytest.mark.parametrize("multipliers", [False, True])
def test_stored_variables_train_without_networks(multipliers):
  guesser = guessing.by_sample(cut(), SAMPLES, multipliers=multipliers)
  method = layer_parallel.layer_parallel(cut(), guesser, coupling.Method())
  params, stats, side = method.init(KEY)
  assert list(params) == list(cut().branch.pieces)

  def criterion(logits):
    return -jax.nn.log_softmax(logits)[:, 1]

  step = jax.jit(
    lambda side: method.step(params, stats, side, batch_of(), criterion, KEY)
  )
  out = step(side)
  assert int(out.side["step"]) == 1
  moved = [np.abs(t).max() for t in out.side["states"]]
  assert min(moved) > 0
  assert bool(out.side["multipliers"]) == multipliers
