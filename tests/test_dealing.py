"""Units that change owner, against indexing on the host."""

import functools

import jax
import numpy as np
import pytest

from mhil import dealing, sharding

P = jax.P


@functools.cache
def mover(n, m):
  """`(units [n, m, 3], old, new) -> [n, m, 3]`, and its program."""
  mesh = sharding.make_mesh(subnet=n)

  def local(x, old, new):
    return dealing.move(x[0], dealing.route(old, new))[None]

  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(P("subnet"), P(), P()),
    out_specs=P("subnet"),
  )
  x = sharding.place(np.zeros((n, m, 3), np.float32), mesh, P("subnet"))
  table = sharding.replicated(np.zeros((n, m), np.int32), mesh)
  compiled = jax.jit(spread).lower(x, table, table).compile()

  def run(x, old, new):
    tables = (sharding.replicated(t, mesh) for t in (old, new))
    return np.asarray(compiled(sharding.place(x, mesh, P("subnet")), *tables))

  return run, sharding.collectives(compiled, mesh)


def drawn(rng, n, m):
  return rng.permutation(n * m).reshape(n, m).astype(np.int32)


def content(table):
  """What stands for each unit: its number and two more that follow from it."""
  return np.stack([table, 7 * table + 1, -table], -1).astype(np.float32)


def changing(old, new):
  """Units that change owner."""
  kept = (np.intersect1d(a, b).size for a, b in zip(old, new))
  return old.size - sum(kept)


SHAPES = [(1, 4), (2, 3), (4, 6), (4, 32)]


@pytest.mark.parametrize("n, m", SHAPES)
def test_every_unit_arrives(n, m):
  rng = np.random.default_rng(n + m)
  run, _ = mover(n, m)
  for _ in range(5):
    old, new = drawn(rng, n, m), drawn(rng, n, m)
    np.testing.assert_array_equal(run(content(old), old, new), content(new))


def test_where_a_pair_moves_more_than_there_is_room_for():
  """All units of a device go to one other: two exchanges instead of one."""
  n, m = 4, 32
  old = np.arange(n * m, dtype=np.int32).reshape(n, m)
  new = np.roll(old, 1, axis=0)
  assert dealing.room_for(n, m) < m
  assert dealing.trips(old, new) == 2
  run, _ = mover(n, m)
  np.testing.assert_array_equal(run(content(old), old, new), content(new))
  assert changing(old, new) == n * m
  assert changing(old, old) == 0


@pytest.mark.parametrize("n, m", SHAPES[1:])
def test_one_exchange_of_the_stated_size(n, m):
  _, found = mover(n, m)
  (only,) = found
  assert only.kind == "all-to-all" and only.axes == ("subnet",)
  assert only.bytes == n * dealing.room_for(n, m) * 3 * 4


def test_the_room_seldom_does_not_do():
  rng = np.random.default_rng(0)
  n, m = 8, 64
  trips = [
    dealing.trips(drawn(rng, n, m), drawn(rng, n, m)) for _ in range(200)
  ]
  assert set(trips) <= {1, 2}
  assert np.mean(np.array(trips) == 2) < 0.1


def test_half_of_a_uniform_permutation_changes_between_two():
  """The mean of what changes owner is 1 - 1/n of all units."""
  rng = np.random.default_rng(0)
  for n in 2, 4:
    m = 64
    moved = [changing(drawn(rng, n, m), drawn(rng, n, m)) for _ in range(100)]
    # Hypergeometric: four standard errors of a mean of 100.
    assert np.mean(moved) == pytest.approx(n * m * (1 - 1 / n), abs=0.4 * 8)
