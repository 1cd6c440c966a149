"""Exact random choices on the device, without a loop over them."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Key, UInt32


def below(
  key: Key[Array, ""], shape: tuple[int, ...], limit: Int[Array, "..."] | int
) -> Int[Array, "..."]:
  """Whole numbers of `shape`, each uniform over 0 to its `limit - 1`.

  The high word of 64 random bits times the limit: no number is likelier than
  another by more than `limit / 2^64`. Bits are the one draw of jax's that the
  shape's cutting cannot move, and that other code can repeat.
  """
  high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
  limit = jnp.broadcast_to(jnp.asarray(limit, jnp.uint32), shape)
  middle = high * limit
  total = middle + _high(low, limit)
  carry = (total < middle).astype(jnp.uint32)
  return (_high(high, limit) + carry).astype(jnp.int32)


def _high(
  a: UInt32[Array, "..."], b: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
  """The high word of a product of two words, by halves of 16 bits."""
  a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
  one = a1 * b0 + (a0 * b0 >> 16)
  two = a0 * b1 + (one & 0xFFFF)
  return a1 * b1 + (one >> 16) + (two >> 16)


def without_replacement(
  key: Key[Array, ""], total: Int[Array, ""], count: int
) -> Int[Array, "{count}"]:
  """The first `count` of a random order of 0 to `total - 1`.

  Fisher and Yates: step i swaps place i with a place j_i drawn from i to
  `total - 1`, and takes what it finds. What that is follows from the j alone:
  place j_i has not been touched, or holds what was at place t before step t,
  where t is the last step with `j_t = j_i`; and place t then was untouched, or
  held what was at place u before step u, and so on. Pointers that double find
  the end of every chain at once, so the cost is that of sorting `count`
  numbers, whatever the total.

  Returns:
    `[count]`, all different; `i >= total` in place `i` where too few are left.
  """
  i = jnp.arange(count)
  drawn = i + below(key, (count,), jnp.maximum(total - i, 1))
  j = jnp.where(i < total, drawn, i)
  order = jnp.argsort(j, stable=True)
  same = j[order][1:] == j[order][:-1]
  nobody = jnp.full(count, -1)
  before = nobody.at[order[1:]].set(jnp.where(same, order[:-1], -1))
  # Who last put something into place i, for i within the places taken.
  came = nobody.at[jnp.where(j > i, j, count)].max(i, mode="drop")
  end = jnp.where(came < 0, i, came)
  for _ in range((count - 1).bit_length()):
    end = end[end]
  return jnp.where(before < 0, j, end[before])


def ties(
  keys: Int[Array, "w b"],
) -> tuple[Int[Array, "w b"], Bool[Array, "w b"]]:
  """Along each row: how many equal keys came before, and is this the last?"""
  order = jnp.argsort(keys, axis=1, stable=True)
  ranked = jnp.take_along_axis(keys, order, axis=1)
  change = ranked[:, 1:] != ranked[:, :-1]
  edge = jnp.ones_like(ranked[:, :1], bool)
  place = jnp.broadcast_to(jnp.arange(keys.shape[1])[None], keys.shape)
  first = jnp.where(jnp.concatenate([edge, change], 1), place, 0)
  before = place - lax.cummax(first, axis=1)
  last = jnp.concatenate([change, edge], 1)
  back = jnp.argsort(order, axis=1)
  return (
    jnp.take_along_axis(before, back, axis=1),
    jnp.take_along_axis(last, back, axis=1),
  )
