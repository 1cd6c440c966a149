"""PAPER 2: a rehearsal buffer spread over the workers, sampled as one.

Bouvier, Nicolae, Chaugier, Costan, Foster, Antoniu, "Efficient Data-Parallel
Continual Learning with Asynchronous Distributed Rehearsal Buffers", CCGrid
2024, arXiv 2406.03285.

  step i on each worker:  train on b samples and the r rows drawn in step i-1
    draw      r rows a worker for step i+1, from the rows of all workers
    populate  each (x, y) of the b samples: class y not full: store
              full: with probability c / b replace a random row of class y

Mesh axis: `data`. Collectives: populate none; a draw one all-to-all of rows,
with `scope="local"` none. Neither depends on a gradient.

The paper's: the above, with slots fixed for each class and worker. Ours:
- A draw is exact: `w r` different rows, uniform over all that are filled. The
  released code draws otherwise. Missing rows have weight zero.
- Labels, numbers and counts of all slots are known to every worker, and only
  rows are spread. The labels of all workers' samples follow from the order of
  the epoch, so every worker works out what all of them store, and a draw needs
  no other traffic than its rows (`exchange`).
- The stated size is the whole mesh's, dealt to classes and workers (`buffer`);
  policies `balanced` and `reservoir`; rows as stored, not augmented; a save
  can be moved to other workers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from mhil import buffer as buffer_lib
from mhil import choose, exchange, populate
from mhil.buffer import Buffer, Layout

P = jax.P
SCOPES = ("global", "local")


class Drawn(NamedTuple):
  """What a worker was dealt of a draw.

  Attributes:
    rows: `[r, ...]` samples as stored; any where they are missing.
    label: `[r]` their classes.
    number: `[r]` which samples they are.
    order: `[r]` place in the draw of all workers, the same on any mesh: what
      the randomness of an augmentation should depend on.
    weight: `[r]` 1, or 0 for a missing row.
    counts: `[c]` rows of each class in the draw of all workers.
  """

  rows: Any
  label: Any
  number: Any
  order: Any
  weight: Any
  counts: Any


DRAWN_SPEC = Drawn(*(P("data"),) * 5, P())


class _Picks(NamedTuple):
  """The draw of all workers, known to each: `[w * r]` in order."""

  owner: Any
  slot: Any
  label: Any
  number: Any
  valid: Any


def check(
  layout: Layout,
  *,
  batch: int,
  candidates: int,
  count: int,
  scope: str = "global",
  chunk: int | None = None,
) -> None:
  """Raises ValueError for numbers that do not fit; see `rehearse`.

  Args:
    batch: `b`, samples of a worker's mini-batch.
    layout, candidates, count, scope, chunk: as for `rehearse`.
  """
  most = layout.size // layout.workers
  if scope not in SCOPES:
    raise ValueError(f"scope={scope!r} is not known; use global or local")
  if not 0 <= candidates <= batch:
    raise ValueError(
      f"candidates={candidates} are not 0 to {batch}, the samples of a "
      f"worker's mini-batch; use candidates={batch // 4}"
    )
  if not 1 <= count <= most:
    raise ValueError(
      f"count={count} rows for each worker are not 1 to {most}, its share of "
      f"size={layout.size}; use count={max(1, min(count, most))}"
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk} moves nothing; use chunk=1 or None")


def rehearse(
  layout: Layout,
  buffer: Buffer,
  offer: populate.Offer,
  key: Key[Array, ""],
  *,
  candidates: int,
  count: int,
  scope: str = "global",
  chunk: int | None = None,
) -> tuple[Buffer, Drawn]:
  """Draws for the next step, then stores of this step's samples.

  To be called under `shard_map` over `data`, as all functions here.

  Args:
    layout: whose the slots are.
    buffer, offer: see there.
    key: this step's, the same on every worker.
    candidates: `c`, samples of a full class that replace a row, of a worker's
      mini-batch and on average; a reservoir has its own rule.
    count: `r`, rows drawn for each worker.
    scope: `global`, or `local`: each worker draws from its own rows only.
    chunk: rows that an exchange moves from a worker to another, repeated
      where a draw needs more; None for one exchange, large enough for all.
  """
  draw_key, store_key = jax.random.split(key)
  drawn, read = _draw(layout, buffer, draw_key, count, scope, chunk)
  stored = populate.store(
    layout, buffer, offer, store_key, candidates=candidates, after=read
  )
  return stored, drawn


def draw(
  layout: Layout,
  buffer: Buffer,
  key: Key[Array, ""],
  *,
  count: int,
  scope: str = "global",
  chunk: int | None = None,
) -> Drawn:
  """Rows for one step, `count` for each worker; arguments as of `rehearse`."""
  return _draw(layout, buffer, key, count, scope, chunk)[0]


def class_counts(layout: Layout, buffer: Buffer) -> Int[Array, "c"]:
  """Filled rows of each class, over all workers."""
  if layout.policy != "reservoir":
    return jnp.sum(buffer.fill, axis=0)
  held = jnp.arange(layout.slots)[None] < buffer.fill
  label = jnp.where(held, buffer.label, layout.classes)
  return _tally(label.reshape(-1), layout.classes)


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


def _draw(layout, buffer, key, count, scope, chunk):
  """`Drawn`, and zeros that XLA cannot know before it has read the buffer."""
  pick_key, deal_key = jax.random.split(key)
  w, rows, me = layout.workers, buffer.rows[0], lax.axis_index("data")
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
  label = jnp.where(picks.valid, picks.label, layout.classes)
  drawn = Drawn(
    found,
    picks.label[mine],
    picks.number[mine],
    mine,
    valid.astype(jnp.float32),
    _tally(label, layout.classes),
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


def _tally(values, kinds):
  """How often each of `0 .. kinds - 1` occurs; other values do not count."""
  return jnp.zeros(kinds, jnp.int32).at[values].add(1, mode="drop")
