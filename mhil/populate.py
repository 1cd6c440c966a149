"""What a buffer stores of a mini-batch: no traffic, and no loop over samples.

Samples come in turn. Since a class keeps its slots while a batch is stored,
where each goes follows from how many of its class stand before it, so all
are placed at once, and rows are written by one scatter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from mhil import buffer as buffer_lib
from mhil import choose
from mhil.buffer import Buffer, Layout

P = jax.P


class Offer(NamedTuple):
  """A mini-batch, of which the buffer may store.

  Attributes:
    rows: `[b, ...]` this worker's samples, not augmented.
    label: `[w, b]` classes of all workers' samples.
    number: `[w, b]` which samples they are.
    counted: `[w, b]` False for padding, which is never stored.
  """

  rows: Any
  label: Any
  number: Any
  counted: Any


SPEC = Offer(P("data"), P(), P(), P())


def store(
  layout: Layout,
  buffer: Buffer,
  offer: Offer,
  key: Key[Array, ""],
  *,
  candidates: int,
  after: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
) -> Buffer:
  """The buffer with what it stores of a batch, as if sample by sample.

  Under `shard_map` over `data`. Of `balanced`, classes that are new with the
  batch get their slots before any sample is stored.

  Args:
    layout: whose the slots are.
    buffer, offer: see there.
    key: this step's, the same on every worker.
    candidates: see `rehearsal.rehearse`.
    after: zeros, one a worker's and one the same for all, that depend on what
      is to be read before. XLA copies an array that one operation reads and
      another overwrites unless it knows which comes first, so where to write
      is made to depend on what was read.
  """
  slot, stored = slots(
    layout, buffer, offer, key, candidates=candidates, after=after
  )
  mine = 0 if after is None else after[0]
  own = slot[lax.axis_index("data")] + mine
  return stored._replace(rows=_write(buffer.rows, (0, own), offer.rows))


def slots(
  layout: Layout,
  buffer: Buffer,
  offer: Offer,
  key: Key[Array, ""],
  *,
  candidates: int,
  after: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
) -> tuple[Int[Array, "w b"], Buffer]:
  """Where `store` puts each sample, and the buffer but for its rows.

  Args:
    layout, buffer, offer, key, candidates, after: of `store`; no rows are
      needed.

  Returns:
    Slots `[w, b]`, beyond the last for what is not stored; the buffer.
  """
  worker = jnp.arange(layout.workers)[:, None]
  group = offer.label if layout.policy != "reservoir" else 0 * offer.label
  rank = buffer.rank
  if layout.policy == "balanced":
    rank = _arrive(rank, group, offer.counted)
  seen = jnp.maximum(jnp.sum(rank >= 0), 1)
  room = buffer_lib.portions(layout.size, rank, seen, layout.workers)
  fill = jnp.minimum(buffer.fill, room)
  group = jnp.where(offer.counted, group, layout.groups)
  place, keep = _decide(layout, buffer.seen, fill, room, group, key, candidates)

  slot = buffer_lib.slot_of(
    layout, worker, rank.at[group].get(mode="clip"), place
  )
  # Of several samples for one slot the last stays, as if they came in turn.
  last = choose.ties(jnp.where(keep, slot, layout.slots))[1]
  outside = layout.slots + jnp.arange(slot.shape[1])[None]
  slot = jnp.where(keep & last, slot, outside)

  table = 0 if after is None else after[1]
  added = jnp.zeros_like(fill).at[worker, group].add(1, mode="drop")
  return slot, buffer._replace(
    label=_write(buffer.label, (worker, slot + table), offer.label),
    number=_write(buffer.number, (worker, slot + table), offer.number),
    fill=jnp.minimum(fill + added, room),
    rank=rank,
    seen=buffer.seen + jnp.sum(offer.counted, axis=1),
  )


def _write(x, index, value):
  return x.at[index].set(value, mode="drop", unique_indices=True)


def _decide(layout, seen, fill, room, group, key, candidates):
  """Of each sample, its place `[w, b]` in its class's list; is it stored?"""
  slot_key, keep_key = jax.random.split(key)
  worker = jnp.arange(layout.workers)[:, None]
  counted = group < layout.groups
  earlier = choose.ties(group)[0]
  limit = room.at[worker, group].get(mode="clip")
  next_free = fill.at[worker, group].get(mode="clip") + earlier
  if layout.policy == "reservoir":
    # Vitter's algorithm R: sample t takes one of t + 1 places, if it exists.
    places = seen[:, None] + earlier + 1
    place = choose.below(slot_key, group.shape, places)
    keep = place < limit
  else:
    place = choose.below(slot_key, group.shape, jnp.maximum(limit, 1))
    chance = choose.below(keep_key, group.shape, group.shape[1])
    keep = (chance < candidates) & (limit > 0)
  fits = next_free < limit
  return jnp.where(fits, next_free, place), counted & (fits | keep)


def _arrive(rank, group, counted):
  """Ranks `[g]` once the classes of a batch have come, in its order."""
  g, n = rank.size, group.size
  position = jnp.arange(n).reshape(group.shape)
  kind = jnp.where(counted, group, g)
  first = jnp.full(g, n).at[kind].min(position, mode="drop")
  new = (rank < 0) & (first < n)
  behind = jnp.argsort(jnp.argsort(jnp.where(new, first, n)))
  return jnp.where(new, jnp.sum(rank >= 0) + behind, rank)
