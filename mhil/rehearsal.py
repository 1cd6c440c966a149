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
  released code draws otherwise. Missing rows have weight zero. A class that
  is not full stores every sample, so a sample that comes again in a later
  epoch may be held twice; rows differ, samples need not.
- Labels, numbers and counts of all slots are known to every worker, and only
  rows are spread. The labels of all workers' samples follow from the order of
  the epoch, so every worker works out what all of them store, and a draw needs
  no other traffic than its rows (`exchange`).
- The stated size is the whole mesh's, dealt to classes and workers (`buffer`);
  policies `balanced` and `reservoir`; rows as stored, not augmented; a save
  can be moved to other workers.
- Instead of what passes, the best samples of a class can be kept once it is
  learnt (`selection="herding"`, iCaRL's).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from mhil import (
  across,
  drawing,
  exchange,
  hosted,
  moving,
  populate,
  room,
  transforms,
)
from mhil import buffer as buffer_lib
from mhil.buffer import Buffer, Layout

P = jax.P


class Memory(NamedTuple):
  """The state of the transform.

  Attributes:
    buffer: what the workers keep.
    drawn: the rows for the next step.
    expected: `[c]` rows of each class in it, on average over draws.
    offered: `[c]` samples of each class that passed; of a reservoir.
  """

  buffer: Any
  drawn: Any
  expected: Any
  offered: Any


SPEC = Memory(buffer_lib.SPEC, drawing.SPEC, P(), P())


def transform(
  mesh: Mesh,
  dataset: Any,
  *,
  size: int,
  batch: int = 24,
  draws: int = 8,
  candidates: int = 8,
  policy: str = "balanced",
  selection: str = "stream",
  scope: str = "global",
  place: str = "device",
) -> transforms.Transform:
  """Rehearsal as a batch transform; every number is that of the whole mesh.

  Args:
    mesh: its `data` axis are the workers.
    dataset: its `train_images`, for the shape and type of a row, and the
      number of its `classes`.
    size: rows that the buffer can hold.
    batch: new samples of a step, `w b`.
    draws: rows drawn for a step, `w r`.
    candidates: new samples that replace a row of a full class, on average,
      in a step, `w c`.
    policy: see `buffer.layout`.
    selection: `stream` keeps what passes; `herding` the samples nearest to
      their class's mean, once it is learnt.
    scope: see `rehearse`.
    place: where rows lie, `device` or `host`; see `hosted`.

  Raises:
    ValueError: names the configuration's field, its value and the fix.
  """
  workers, classes = mesh.shape["data"], dataset.classes
  layout = buffer_lib.layout(policy, size, classes, workers)
  room.check(layout, batch, draws, candidates, selection, scope, place)
  images = dataset.train_images
  shape, dtype = tuple(images.shape[1:]), np.dtype(images.dtype)
  row_bytes = int(np.prod(shape)) * dtype.itemsize
  room.check_room(layout, row_bytes, *room.available(mesh, place))
  count, stream = draws // workers, selection == "stream"
  how: dict[str, Any] = {"count": count, "scope": scope}
  how["candidates"] = candidates // workers
  chunk = exchange.chunk_for(count, layout.slots, workers, row_bytes)
  on_host = (
    hosted.rows(mesh, layout, stream, **how) if place == "host" else None
  )

  def init():
    buffer = buffer_lib.init(layout, shape, dtype, mesh, place)
    return Memory(buffer, *nothing(mesh, draws, classes, shape, dtype))

  def apply(memory, batch, everyone, key):
    buffer, drawn, _, offered = memory
    fresh = everyone.fresh & stream
    later_on_average = expected(layout, buffer, offered, draws, scope)
    offer = populate.Offer(batch.rows, everyone.label, everyone.number, fresh)
    at = jnp.where(everyone.fresh, everyone.label, classes)
    offered += drawing.tally(at.reshape(-1), classes)
    if on_host:
      buffer, later = hosted.rehearse(layout, buffer, offer, key, **how)
    else:
      buffer, later = rehearse(layout, buffer, offer, key, chunk=chunk, **how)
    more = transforms.Batch(
      drawn.rows,
      drawn.label,
      everyone.label.size + drawn.order,
      drawn.weight,
      drawn.number,
    )
    memory = Memory(buffer, later, later_on_average, offered)
    return memory, transforms.join(batch, more)

  def refit(saved, like):
    if jax.tree.map(np.shape, saved) == jax.tree.map(np.shape, like):
      return saved
    w, known = len(saved.buffer.rows), len(saved.expected)
    old = buffer_lib.layout(policy, size, known, w)
    buffer = saved.buffer
    _check_alike(saved, like, old)
    if known != classes:
      longer = buffer_lib.layout(policy, size, classes, w)
      buffer, old = moving.widen(buffer, old, longer), longer
    if w != workers:
      buffer = moving.reshard(buffer, old, layout)
    whole, blank = NamedSharding(mesh, P()), [(0, classes - known)]
    counts = np.pad(saved.expected, blank), np.pad(saved.offered, blank)
    return Memory(
      buffer_lib.place(buffer, mesh, place),
      saved.drawn,
      *across.put(counts, whole),
    )

  def keep(memory, orders, read):
    buffer = moving.put(layout, memory.buffer, orders, read, mesh)
    return memory._replace(buffer=buffer)

  return transforms.Transform(
    added=draws,
    size=size,
    spec=SPEC,
    init=init,
    apply=apply,
    expected=lambda memory: memory.expected,
    held=lambda memory: held(layout, memory.buffer),
    keep=None if stream else keep,
    refit=refit,
    hosted=on_host,
    facts={
      "samples": size,
      "bytes": size * row_bytes,
      "bytes_per_device": 0 if on_host else layout.slots * row_bytes,
      "kind": f"{policy}, {selection}, {draws} rows a step, {scope} draws"
      + (", rows in the host's memory" if on_host else ""),
    },
  )


def _check_alike(saved, like, old):
  """Raises ValueError if a memory was kept otherwise than this run's."""
  for field, theirs, ours in (
    ("memory.size", saved.buffer.rows.shape[1], old.slots),
    ("memory.policy", saved.buffer.fill.shape[1], old.groups),
    ("memory.draws", saved.drawn.label.shape[0], like.drawn.label.shape[0]),
  ):
    if theirs != ours:
      raise ValueError(
        f"{field} is another than that of the run which is to go on: its "
        f"memory has {theirs} where this run's has {ours}; use the same"
      )


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
) -> tuple[Buffer, drawing.Drawn]:
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
  draw_key, store_key = drawing.keys(key)
  drawn, read = drawing.after(
    layout, buffer, draw_key, count=count, scope=scope, chunk=chunk
  )
  stored = populate.store(
    layout, buffer, offer, store_key, candidates=candidates, after=read
  )
  return stored, drawn


def nothing(
  mesh: Mesh, draws: int, classes: int, shape: tuple[int, ...], dtype: Any
) -> tuple[drawing.Drawn, Array, Array]:
  """All of `Memory` but the buffer, before anything was drawn."""
  spread, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
  blank = drawing.Drawn(
    rows=np.zeros((draws, *shape), dtype),
    label=np.zeros(draws, np.int32),
    number=np.zeros(draws, np.int32),
    order=np.arange(draws, dtype=np.int32),
    weight=np.zeros(draws, np.float32),
  )
  return (
    across.put(blank, spread),
    jnp.zeros(classes, device=whole),
    jnp.zeros(classes, jnp.int32, device=whole),
  )


def expected(
  layout: Layout,
  buffer: Buffer,
  offered: Int[Array, "c"],
  draws: int,
  scope: str,
) -> Float[Array, "c"]:
  """Rows of each class in a draw from the buffer, on average.

  A reservoir holds classes in the proportion in which they came, on average;
  to count them would take longer the more it holds.
  """
  filled = jnp.sum(buffer.fill, axis=1)
  if scope == "local":
    drawn = jnp.minimum(filled, draws // layout.workers)
    share = drawn / jnp.maximum(filled, 1)
    counts = jnp.sum(buffer.fill * share[:, None], axis=0)
    number = jnp.sum(drawn)
  else:
    counts = jnp.sum(buffer.fill, axis=0)
    number = jnp.minimum(jnp.sum(filled), draws)
  if layout.policy == "reservoir":
    counts = offered
  return counts * (number / jnp.maximum(jnp.sum(counts), 1e-9))


def held(layout: Layout, buffer: Buffer) -> Int[np.ndarray, " n"]:
  """Numbers of all filled rows, in the buffer's order; on the host."""
  fill, rank, number = map(
    np.asarray, (buffer.fill, buffer.rank, buffer.number)
  )
  return number[buffer_lib.filled(layout, fill, rank)]
