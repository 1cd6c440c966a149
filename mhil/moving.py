"""Rows that the host moves: to other workers, to make room for more classes,
or in from the data set.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mhil import across
from mhil import buffer as buffer_lib
from mhil.buffer import Buffer, Layout, Whole

# Rows that go to the devices at once when a class is put in.
CHUNK = 64


def reshard(buffer: Buffer, old: Layout, new: Layout) -> Buffer:
  """The same rows, in the same order, for other workers; on the host.

  Where the sizes are equal there is room for every row.

  Args:
    buffer: of `old`.
    old, new: layouts that differ in size or workers.

  Returns:
    Numpy arrays, to be placed. Draws from it are those from `buffer`.

  Raises:
    ValueError: if the layouts differ in more, or `new` cannot hold every row.
  """
  if (old.policy, old.classes) != (new.policy, new.classes):
    raise ValueError(
      f"memory.policy={new.policy} of {new.classes} classes cannot take rows "
      f"of memory.policy={old.policy} of {old.classes} classes; keep the latter"
    )
  rows, label, number, fill, rank, seen = across.fetch(buffer)
  counts, arrived = fill.sum(0), max(int((rank >= 0).sum()), 1)
  share = buffer_lib.portions(new.size, rank, arrived, new.workers).sum(0)
  if (counts > share).any():
    raise ValueError(
      f"memory.size={new.size} cannot hold all {counts.sum()} rows of the "
      f"buffer, as {np.maximum(counts - share, 0).sum()} find no slot of their "
      f"class; use memory.size={old.size}"
    )
  source = buffer_lib.filled(old, fill, rank)
  fill = buffer_lib.dealt(counts, rank, new.workers).astype(np.int32)
  target = buffer_lib.filled(new, fill, rank)

  def move(x):
    out = np.zeros((new.workers, new.slots, *x.shape[2:]), x.dtype)
    out[target] = x[source]
    return out

  seen = buffer_lib.dealt(
    seen.sum(keepdims=True), np.zeros(1, int), new.workers
  )
  seen = seen[:, 0].astype(np.int32)
  return Buffer(move(rows), move(label), move(number), fill, rank, seen)


def widen(buffer: Buffer, old: Layout, new: Layout) -> Buffer:
  """The buffer of a stream with more classes, for as many workers; on the host.

  A class of `per_class` has fewer slots then, and keeps the rows that stand
  first in the lists of its workers. Of the other policies every row stays where
  it is, and all is as if the new classes had been planned from the start.

  Args:
    buffer: of `old`.
    old, new: layouts that differ in classes only.

  Returns:
    Numpy arrays, to be placed.

  Raises:
    ValueError: if the layouts differ in more, or `new` has fewer classes.
  """
  same = [(x.policy, x.size, x.workers) for x in (old, new)]
  if new.classes < old.classes or same[0] != same[1]:
    raise ValueError(
      f"a buffer of {old.classes} classes does not go on with {new.classes}; "
      "use more, and the same memory.policy, memory.size and mesh.data"
    )
  rows, label, number, fill, rank, seen = across.fetch(buffer)
  source = buffer_lib.filled(old, fill, rank)
  more = new.groups - old.groups
  later = np.arange(old.groups, new.groups, dtype=np.int32)
  if new.policy == "balanced":
    later = np.full_like(later, -1)
  fill = np.pad(fill, [(0, 0), (0, more)])
  rank = np.concatenate([rank, later])
  kept = _kept(new, fill, rank)
  counts = np.minimum(fill.sum(0), kept.sum(0))
  stays = _first(fill, rank, counts)
  source = source[0][stays], source[1][stays]
  target = buffer_lib.filled(new, kept, rank)
  there = min(old.slots, new.slots)

  def move(x):
    out = np.zeros((new.workers, new.slots, *x.shape[2:]), x.dtype)
    out[:, :there] = x[:, :there]
    out[target] = x[source]
    return out

  return Buffer(move(rows), move(label), move(number), kept, rank, seen)


def _kept(layout, fill, rank):
  """Rows `[w, g]` that stay: where they are, or dealt anew if one must move."""
  arrived = max(int((rank >= 0).sum()), 1)
  room = buffer_lib.portions(layout.size, rank, arrived, layout.workers)
  counts = np.minimum(fill.sum(0), room.sum(0))
  anew = buffer_lib.dealt(counts, rank, layout.workers)
  return np.where((fill <= room).all(0), fill, anew).astype(np.int32)


def _first(fill, rank, counts):
  """Which of all filled rows `[_]` are the first `counts` of their class.

  Place by place, and of one place in the order in which `put` deals.
  """
  sizes = fill.T.ravel()
  cell = np.repeat(np.arange(sizes.size), sizes)
  group, worker = np.divmod(cell, len(fill))
  place = np.arange(len(cell)) - (np.cumsum(sizes) - sizes)[cell]
  turn = (-1 - worker - rank[group]) % len(fill)
  order = np.lexsort((turn, place, group))
  before = np.cumsum(fill.sum(0)) - fill.sum(0)
  nth = np.empty(len(cell), int)
  nth[order] = np.arange(len(cell)) - before[group[order]]
  return nth < counts[group]


def put(
  layout: Layout,
  buffer: Buffer,
  orders: Mapping[int, Whole],
  read: Callable[[Whole], np.ndarray],
  mesh: Mesh,
) -> Buffer:
  """The buffer with the first samples of classes, in place of what it held.

  Args:
    layout: of `per_class` or `balanced`.
    buffer: may be overwritten.
    orders: of each class that has been learnt, its samples, best first; a
      class keeps the first of them when its share shrinks.
    read: `numbers [k] -> rows [k, ...]`.
    mesh: where the buffer lies.
  """
  fill, rank = np.array(buffer.fill), np.array(buffer.rank)
  label, number = np.array(buffer.label), np.array(buffer.number)
  for c in orders:
    rank[c] = rank.max() + 1 if rank[c] < 0 else rank[c]
  seen = int((rank >= 0).sum())
  room = buffer_lib.portions(layout.size, rank, seen, layout.workers)
  fill = np.minimum(fill, room).astype(np.int32)
  rows = buffer.rows
  for c, order in orders.items():
    first = order[: room[:, c].sum()]
    place, turn = np.divmod(np.arange(len(first)), layout.workers)
    worker = (-1 - turn - rank[c]) % layout.workers
    slot = layout.starts[worker, rank[c]] + place
    if layout.table is not None:
      slot = layout.table[worker, slot]
    label[worker, slot], number[worker, slot] = c, first
    fill[:, c] = buffer_lib.dealt(
      np.array([len(first)]), rank[c : c + 1], layout.workers
    )[:, 0]
    rows = _write(rows, worker, slot, first, read, mesh)
  parts = Buffer((), label, number, fill, rank, np.asarray(buffer.seen))
  return buffer_lib.place(parts, mesh)._replace(rows=rows)


def _write(rows, worker, slot, numbers, read, mesh):
  """Rows with those of `numbers` in their slots, some at a time."""
  w, m = rows.shape[:2]
  if isinstance(rows, np.ndarray):
    rows[worker, slot] = read(numbers)
    return rows
  for start in range(0, len(numbers), CHUNK):
    part = slice(start, start + CHUNK)
    new = np.zeros((w, CHUNK, *rows.shape[2:]), rows.dtype)
    at = np.tile(m + np.arange(CHUNK, dtype=np.int32), (w, 1))
    here = worker[part], np.arange(len(worker[part]))
    new[here], at[here] = read(numbers[part]), slot[part]
    spread = NamedSharding(mesh, buffer_lib.SPEC.rows)
    rows = _scatter(rows, *across.put((at, new), spread), mesh)
  return rows


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _scatter(rows, at, new, mesh):
  def local(rows, at, new):
    return rows.at[0, at[0]].set(new[0], mode="drop", unique_indices=True)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(buffer_lib.SPEC.rows,) * 3,
    out_specs=buffer_lib.SPEC.rows,
  )(rows, at, new)
