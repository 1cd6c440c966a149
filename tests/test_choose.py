"""Random choices against the same choices made one after the other."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import choose

TOP = 2**32 - 1


def words(key, shape):
  """The 64 random bits behind each number of `choose.below`, as integers."""
  high, low = np.asarray(jax.random.bits(key, (2, *shape), jnp.uint32)).astype(
    object
  )
  return high * 2**32 + low


def far(counts, expected, variance):
  """Deviations from a chi-square's mean; its squares are not independent."""
  # Their sum is fixed, hence one degree of freedom less than counts.
  counts = np.asarray(counts, float)
  n = counts.size
  statistic = ((counts - expected) ** 2 / variance).sum() * (n - 1) / n
  return (statistic - (n - 1)) / np.sqrt(2 * (n - 1))


class TestBelow:
  @pytest.mark.parametrize("limit", [1, 2, 7, 1000, 65537, 2**31 - 1])
  def test_is_the_high_word_of_the_product(self, limit):
    key = jax.random.key(limit)
    found = jax.jit(lambda k: choose.below(k, (200,), limit))(key)
    want = [word * limit >> 64 for word in words(key, (200,))]
    assert found.dtype == jnp.int32
    assert found.tolist() == want

  @pytest.mark.parametrize("a", [0, 1, 0xFFFF, 0x10000, TOP - 1, TOP])
  @pytest.mark.parametrize("b", [0, 1, 0xFFFF, 0x10000, 2**31, TOP])
  def test_high_word_at_the_edges(self, a, b):
    found = choose._high(jnp.uint32(a), jnp.uint32(b))
    assert int(found) == a * b >> 32

  def test_each_entry_has_its_own_limit(self):
    limits = jnp.arange(1, 301).reshape(3, 100)
    key = jax.random.key(0)
    found = np.asarray(choose.below(key, (3, 100), limits))
    assert (found == words(key, (3, 100)) * np.asarray(limits) // 2**64).all()
    assert (found < np.asarray(limits)).all()

  def test_even(self):
    found = choose.below(jax.random.key(1), (70_000,), 7)
    counts = np.bincount(found, minlength=7)
    assert far(counts, 10_000, 10_000 * 6 / 7) < 5

  def test_cutting_the_shape_moves_no_number(self):
    """Samples keep their draws, over however many workers they are cut."""
    key = jax.random.key(2)
    one = choose.below(key, (1, 24), 1000).ravel()
    assert one.tolist() == choose.below(key, (8, 3), 1000).ravel().tolist()


def one_by_one(drawn, total):
  """Fisher and Yates, with a dictionary for the places that were touched."""
  touched, found = {}, []
  for i, word in enumerate(drawn):
    if i >= total:
      found.append(i)
      continue
    j = i + (word * (total - i) >> 64)
    found.append(touched.get(j, j))
    touched[j] = touched.get(i, i)
  return found


@functools.partial(jax.jit, static_argnums=2)
def chosen(key, total, count):
  return choose.without_replacement(key, total, count)


@functools.partial(jax.jit, static_argnums=2)
def many(keys, total, count):
  return jax.vmap(lambda key: chosen(key, total, count))(keys)


class TestWithoutReplacement:
  @pytest.mark.parametrize("count", [1, 2, 33])
  def test_equals_the_shuffle_step_by_step(self, count):
    keys = jax.random.split(jax.random.key(5), 20)
    drawn = [words(key, (count,)) for key in keys]
    for total in 0, 1, 2, 7, 8, 9, 32, 34, 100, 10**6:
      found = many(keys, jnp.int32(total), count).tolist()
      assert found == [one_by_one(each, total) for each in drawn]
      for each in found:
        assert len(set(each)) == count
        assert set(each[: min(total, count)]) <= set(range(total))

  def test_every_order_is_as_likely(self):
    keys = jax.random.split(jax.random.key(3), 24_000)
    drawn = np.asarray(many(keys, jnp.int32(4), 4)).tolist()
    found = collections.Counter(map(tuple, drawn))
    assert set(found) == set(itertools.permutations(range(4)))
    assert far(list(found.values()), 1000, 1000 * 23 / 24) < 5

  def test_every_pair_is_as_likely(self):
    keys = jax.random.split(jax.random.key(4), 30_000)
    drawn = np.asarray(many(keys, jnp.int32(6), 2)).tolist()
    found = collections.Counter(map(tuple, drawn))
    assert set(found) == set(itertools.permutations(range(6), 2))
    assert far(list(found.values()), 1000, 1000 * 29 / 30) < 5

  def test_cost_does_not_know_the_total(self):
    """The control: with the places made, memory would be 4 MB at least."""
    compiled = chosen.lower(jax.random.key(0), jnp.int32(10**6), 64).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20_000


class TestTies:
  def test_equals_counting(self):
    keys = np.random.default_rng(0).integers(0, 5, (4, 30))
    before, last = jax.jit(choose.ties)(jnp.asarray(keys))
    for row, (b, l) in enumerate(zip(before.tolist(), last.tolist())):
      own = keys[row].tolist()
      assert b == [own[:i].count(k) for i, k in enumerate(own)]
      assert l == [k not in own[i + 1 :] for i, k in enumerate(own)]

  def test_one_key(self):
    before, last = choose.ties(jnp.array([[9]]))
    assert (before.tolist(), last.tolist()) == ([[0]], [[True]])
