"""The rehearsal buffer: its arrays on the mesh, and whose its slots are.

All about slots follows from a few whole numbers:

  share    C = size // n + (rank < size mod n)    of one of n classes, in all
  portion  (C + (worker + rank) mod w) // w       what of it lies on a worker

The portions of a class add up to its share on any number of workers, so the
stated size is that of the whole mesh, and a buffer moves to other workers
without losing a row. What each policy calls a class:

  per_class   every class of the stream, from the start (rank: the class)
  balanced    the classes seen so far (rank: the order in which they came)
  reservoir   all samples together (rank 0)

Neither a share nor a portion grows when classes arrive. So a class of
`balanced` owns a list of slots that is only ever shortened, and a new class is
given what the older ones leave: a table, made once, says which.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from mhil import across

P = jax.P
POLICIES = ("per_class", "balanced", "reservoir")
Whole = Int[np.ndarray, "..."]


class Buffer(NamedTuple):
  """What the workers keep; only `rows` is spread over them.

  Attributes:
    rows: `[w, m, ...]` samples as stored.
    label: `[w, m]` class of each row.
    number: `[w, m]` which sample it is.
    fill: `[w, g]` filled rows of each class; of a reservoir, of all.
    rank: `[g]` when each class came; -1 for not yet.
    seen: `[w]` samples that each worker was offered.
  """

  rows: Any
  label: Any
  number: Any
  fill: Any
  rank: Any
  seen: Any


SPEC = Buffer(P("data"), P(), P(), P(), P(), P())


class Layout(NamedTuple):
  """Which slots there are, and whose they may become.

  Attributes:
    policy: one of `POLICIES`.
    size: rows in all, over the whole mesh.
    classes: of the whole stream.
    workers: devices along `data`.
    slots: on each worker, `m`. A worker's portions may sum to a few more than
      `size / workers`, so some slots can stay empty.
    starts: `[w, g]` where the list of the class of each rank begins.
    table: `[w, _]` slot numbers, list after list; None if they count up.
  """

  policy: str
  size: int
  classes: int
  workers: int
  slots: int
  starts: Whole
  table: Whole | None

  @property
  def groups(self) -> int:
    """What is counted apart, `g`: classes, or 1 for a reservoir."""
    return self.starts.shape[1]


def layout(policy: str, size: int, classes: int, workers: int) -> Layout:
  """Deals `size` slots to classes and workers.

  Args:
    policy: one of `POLICIES`.
    size: rows in all, over the whole mesh.
    classes: of the whole stream, seen or not.
    workers: devices along `data`.

  Raises:
    ValueError: for another policy, or less than a slot a class.
  """
  if policy not in POLICIES:
    raise ValueError(
      f"memory.policy={policy!r} is not known; use one of {', '.join(POLICIES)}"
    )
  groups = 1 if policy == "reservoir" else classes
  if size < groups:
    raise ValueError(
      f"memory.size={size} rows are less than a slot for each of {groups} "
      f"classes; use memory.size={groups} or more, or 0 for none"
    )
  if policy == "balanced":
    slots, starts, table = _shrinking(size, classes, workers)
    return Layout(policy, size, classes, workers, slots, starts, table)
  held = portions(size, np.arange(groups), groups, workers)
  slots = slots_for(policy, size, classes, workers)
  return Layout(policy, size, classes, workers, slots, _starts(held), None)


def slots_for(policy: str, size: int, classes: int, workers: int) -> int:
  """Slots of each worker, `m`: the most that its portions ever add up to.

  They never grow with workers, nor shrink with `size`.

  Args:
    policy, size, classes, workers: as `layout` has them.
  """
  groups = 1 if policy == "reservoir" else classes
  seen = range(1, groups + 1) if policy == "balanced" else (groups,)
  held = (portions(size, np.arange(n), n, workers) for n in seen)
  return max(int(each.sum(1).max()) for each in held)


def portions(size: int, rank: Any, seen: Any, workers: int) -> Any:
  """Slots `[w, g]` of each class on each worker; of numpy or jax numbers.

  Args:
    size, workers: of the layout.
    rank: `[g]`, negative for classes not seen yet, which have no slot.
    seen: `[]` classes that share the slots, at least 1.
  """
  share = (size // seen + (rank < size % seen)) * (rank >= 0)
  return dealt(share, rank, workers)


def dealt(counts: Any, rank: Any, workers: int) -> Any:
  """`[g]` rows of classes dealt to workers, `[w, g]`."""
  turn = (np.arange(workers)[:, None] + rank[None]) % workers
  return (counts[None] + turn) // workers


def init(
  layout: Layout,
  shape: tuple[int, ...],
  dtype: Any,
  mesh: Mesh,
  where: str = "device",
) -> Buffer:
  """An empty buffer for rows of `shape`, born where they lie; see `place`."""
  lead = layout.workers, layout.slots
  rank = np.arange(layout.groups, dtype=np.int32)
  full, spread = (*lead, *shape), NamedSharding(mesh, SPEC.rows)
  on_host = where == "host"
  empty = Buffer(
    np.zeros(full, dtype) if on_host else jnp.zeros(full, dtype, device=spread),
    np.zeros(lead, np.int32),
    np.zeros(lead, np.int32),
    np.zeros((layout.workers, layout.groups), np.int32),
    np.full_like(rank, -1) if layout.policy == "balanced" else rank,
    np.zeros(layout.workers, np.int32),
  )
  return place(empty, mesh, where)


def place(buffer: Buffer, mesh: Mesh, where: str = "device") -> Buffer:
  """Lays a buffer over the mesh's `data` axis.

  Args:
    buffer: its arrays.
    mesh: its `data` axis are the workers.
    where: `host` leaves the rows in a numpy array.
  """
  return Buffer(
    *(
      x if where == "host" and name == "rows" else _spread(x, mesh, spec)
      for name, x, spec in zip(Buffer._fields, buffer, SPEC)
    )
  )


def _spread(x, mesh, spec):
  return across.put(x, NamedSharding(mesh, spec))


def filled(layout: Layout, fill: Whole, rank: Whole) -> tuple[Whole, Whole]:
  """Workers and slots `[_]` of all filled rows, in the buffer's order.

  Class by class, in a class worker by worker, there by place in its list: the
  order in which a draw counts, which `reshard` keeps.
  """
  sizes = fill.T.ravel()
  cell = np.repeat(np.arange(sizes.size), sizes)
  group, worker = np.divmod(cell, layout.workers)
  inside = np.arange(len(cell)) - (np.cumsum(sizes) - sizes)[cell]
  place = layout.starts[worker, rank[group]] + inside
  if layout.table is not None:
    place = layout.table[worker, place]
  return worker, place


def slot_of(layout: Layout, worker: Any, rank: Any, place: Any) -> Any:
  """Which slot of a worker is at a place of the list of a class's rank."""
  place = jnp.asarray(layout.starts)[worker, rank] + place
  if layout.table is None:
    return place
  return jnp.asarray(layout.table)[worker, place]


def _starts(lengths: Whole) -> Whole:
  return (np.cumsum(lengths, 1) - lengths).astype(np.int32)


def _shrinking(
  size: int, classes: int, workers: int
) -> tuple[int, Whole, Whole]:
  """Slots a worker, starts `[w, g]` and table `[w, _]` of `balanced`."""
  free: list[list[int]] = [[] for _ in range(workers)]
  lists: list[list[list[int]]] = [[] for _ in range(workers)]
  used = [0] * workers
  before = np.zeros((workers, 0), int)
  for n in range(1, classes + 1):
    now = portions(size, np.arange(n), n, workers)
    for i, own in enumerate(lists):
      for a in np.flatnonzero(before[i] > now[i, :-1]):
        free[i] += own[a][now[i, a] : before[i, a]]
      more = max(int(now[i, -1]) - len(free[i]), 0)
      free[i] += range(used[i], used[i] + more)
      used[i] += more
      own.append(free[i][: now[i, -1]])
      del free[i][: now[i, -1]]
    before = now
  lengths = np.array([[len(part) for part in own] for own in lists])
  table = np.zeros((workers, lengths.sum(1).max()), np.int32)
  for i, own in enumerate(lists):
    table[i, : lengths[i].sum()] = np.concatenate(own)
  return max(used), _starts(lengths), table
