"""Draws of a rehearsal buffer: which rows, and how they come to the workers.

Every worker works out alike, from a shared key and the counts of filled rows,
which rows the workers draw together: `w r` different ones, uniform over all
that are filled. Then rows move, in one all-to-all (`exchange`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from mhil import buffer as buffer_lib
from mhil import choose, exchange
from mhil.buffer import Buffer, Layout

P = jax.P


class Drawn(NamedTuple):
  """What a worker was dealt of a draw.

  Attributes:
    rows: `[r, ...]` samples as stored; any where they are missing.
    label: `[r]` their classes.
    number: `[r]` which samples they are.
    order: `[r]` place in the draw of all workers, the same on any mesh: what
      the randomness of an augmentation should depend on.
    weight: `[r]` 1, or 0 for a missing row.
  """

  rows: Any
  label: Any
  number: Any
  order: Any
  weight: Any


SPEC = Drawn(*(P("data"),) * 5)


def keys(key: Key[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
  """Of a step's key, those of its draw and of its store."""
  draw_key, store_key = jax.random.split(key)
  return draw_key, store_key


class _Picks(NamedTuple):
  """The draw of all workers, known to each: `[w * r]` in order."""

  owner: Any
  slot: Any
  label: Any
  number: Any
  valid: Any


def draw(
  layout: Layout,
  buffer: Buffer,
  key: Key[Array, ""],
  *,
  count: int,
  scope: str = "global",
  chunk: int | None = None,
) -> Drawn:
  """Rows for one step, `count` for each worker; see `rehearsal.rehearse`."""
  return after(layout, buffer, key, count=count, scope=scope, chunk=chunk)[0]


class Traffic(NamedTuple):
  """Bytes that a worker holds after an exchange, with its own part.

  Attributes:
    wanted: the rows that it was dealt.
    padding: the rest, so that every pair of workers exchanges alike.
  """

  wanted: int
  padding: int


def traffic(
  layout: Layout,
  row_bytes: int,
  *,
  count: int,
  scope: str = "global",
  chunk: int | None = None,
) -> Traffic:
  """What an exchange moves; nothing on one worker, or with a local scope."""
  w = layout.workers
  if w == 1 or scope == "local":
    return Traffic(0, 0)
  rows = w * exchange.room_for(count, layout.slots, w, chunk)
  return Traffic(count * row_bytes, (rows - count) * row_bytes)


def after(
  layout: Layout,
  buffer: Buffer,
  key: Key[Array, ""],
  *,
  count: int,
  scope: str,
  chunk: int | None,
  rows: Any = None,
) -> tuple[Drawn, tuple[Array, Array]]:
  """`draw`, and zeros that XLA cannot know before it has read the buffer.

  Args:
    layout, buffer, key, count, scope, chunk: of `rehearsal.rehearse`.
    rows: `[m, ...]` this worker's, or what stands for them; None for those of
      the buffer.
  """
  pick_key, deal_key = jax.random.split(key)
  w, me = layout.workers, lax.axis_index("data")
  rows = buffer.rows[0] if rows is None else rows
  picks = _pick(layout, buffer, pick_key, count, scope)
  if scope == "local" or w == 1:
    mine = me * count + jnp.arange(count)
    found = read = rows[picks.slot[mine]]
  else:
    owner = jnp.where(picks.valid, picks.owner, w)
    plan = exchange.deal(owner, w, deal_key, me)
    found, read = exchange.move(rows, picks.slot, plan, chunk)
    mine = plan.mine
  valid = picks.valid[mine]
  drawn = Drawn(
    found,
    picks.label[mine],
    picks.number[mine],
    mine,
    valid.astype(jnp.float32),
  )
  zero = (jnp.sum(buffer.fill) < 0).astype(jnp.int32)
  table = jnp.max(picks.label) + jnp.max(picks.number)
  return drawn, (zero * read.ravel()[0].astype(jnp.int32), zero * table)


def _pick(layout, buffer, key, count, scope) -> _Picks:
  """Which rows are drawn: uniform over those filled, in random order."""
  w = layout.workers
  i = jnp.arange(w * count)
  if scope == "global":
    total = jnp.sum(buffer.fill)
    chosen = choose.without_replacement(key, total, w * count)
    cell, place = _locate(buffer.fill.T.reshape(-1), chosen)
    (group, owner), valid = jnp.divmod(cell, w), i < total
  else:
    totals = jnp.sum(buffer.fill, axis=1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(w))
    each = jax.vmap(choose.without_replacement, (0, 0, None))
    cell, place = jax.vmap(_locate)(buffer.fill, each(keys, totals, count))
    group, place, owner = cell.reshape(-1), place.reshape(-1), i // count
    valid = i % count < totals[owner]
  owner, group, place = (jnp.where(valid, x, 0) for x in (owner, group, place))
  slot = buffer_lib.slot_of(layout, owner, buffer.rank[group], place)
  return _Picks(
    owner, slot, buffer.label[owner, slot], buffer.number[owner, slot], valid
  )


def _locate(sizes, chosen):
  """The cell, and the place in it, of rows counted through all cells."""
  ends = jnp.cumsum(sizes)
  cell = jnp.searchsorted(ends, chosen, side="right", method="scan_unrolled")
  cell = jnp.minimum(cell, sizes.size - 1)
  return cell, chosen - (ends - sizes)[cell]


def tally(values: Int[Array, "n"], kinds: int) -> Int[Array, "kinds"]:
  """How often each of `0 .. kinds - 1` occurs; other values do not count."""
  return jnp.zeros(kinds, jnp.int32).at[values].add(1, mode="drop")
