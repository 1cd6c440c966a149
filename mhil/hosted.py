"""Rows of the rehearsal buffer in the host's memory, not in the devices'.

The devices decide as ever what is drawn and stored, and exchange what is
drawn; only rows come from elsewhere. Before a step the host hands each worker
the rows that the draw of this step will read, and after it writes those that
the step stores. Which they are it works out by itself, with the same program
over the labels, so no step waits for an answer from a device, and draws are
those of a buffer on the devices, bit for bit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key

from mhil import drawing, exchange, populate, transforms
from mhil.buffer import Buffer, Layout

SPEC = jax.P("data")


class Given(NamedTuple):
  """Stands for a worker's rows where those to be read were handed over.

  Attributes:
    found: `[k, ...]` rows, in the order in which a draw reads them.
    slots: that the worker has.
  """

  found: Any
  slots: int

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the rows which it stands for."""
    return self.slots, *self.found.shape[1:]

  def __getitem__(self, slot: Any) -> Any:
    return self.found.reshape(*slot.shape, *self.found.shape[1:])


class _Asked(list):
  """Notes which slots a draw reads, and answers with nothing."""

  def __init__(self, slots: int):
    super().__init__()
    self.shape = (slots, 1)

  def __getitem__(self, slot: Any) -> Any:
    self.append(slot.reshape(-1))
    return jnp.zeros((*slot.shape, 1), jnp.uint8)


def width(layout: Layout, count: int, scope: str) -> int:
  """Rows that a draw reads from each worker, those of padding among them."""
  w = layout.workers
  if w == 1 or scope == "local":
    return count
  return w * exchange.room_for(count, layout.slots, w, None)


def rehearse(
  layout: Layout,
  buffer: Buffer,
  offer: populate.Offer,
  key: Key[Array, ""],
  *,
  candidates: int,
  count: int,
  scope: str,
) -> tuple[Buffer, drawing.Drawn]:
  """`rehearsal.rehearse` of a buffer whose rows are those handed over."""
  draw_key, store_key = drawing.keys(key)
  given = Given(buffer.rows[0], layout.slots)
  how: dict[str, Any] = {"count": count, "scope": scope, "chunk": None}
  drawn, _ = drawing.after(layout, buffer, draw_key, rows=given, **how)
  _, stored = populate.slots(
    layout, buffer, offer, store_key, candidates=candidates
  )
  return stored, drawn


def decider(
  layout: Layout, *, candidates: int, count: int, scope: str
) -> Callable[..., tuple[Any, Any, Buffer]]:
  """`(buffer, everyone, key) -> (reads [w, k], writes [w, b], buffer)`.

  The slots that `rehearse` reads and `rehearsal.rehearse` would write, and the
  buffer after it; of a buffer without rows, on one device, to be jitted.
  """
  how: dict[str, Any] = {"count": count, "scope": scope, "chunk": None}

  def local(me, buffer, everyone, key):
    del me  # Mapped over, so that the axis has its size.
    asked = _Asked(layout.slots)
    draw_key, store_key = drawing.keys(key)
    drawing.after(layout, buffer, draw_key, rows=asked, **how)
    offer = populate.Offer((), everyone.label, everyone.number, everyone.fresh)
    writes, stored = populate.slots(
      layout, buffer, offer, store_key, candidates=candidates
    )
    return asked.pop(), writes, stored

  each = jax.vmap(
    local, (0, None, None, None), (0, None, None), axis_name="data"
  )
  return functools.partial(each, jnp.arange(layout.workers))


def rows(
  mesh: Mesh, layout: Layout, stream: bool, **how: Any
) -> transforms.Hosted:
  """The host's part in the steps of a run.

  Args:
    mesh: whose workers.
    layout: of the buffer.
    stream: whether what passes is stored.
    **how: of `rehearse`.
  """
  place = functools.partial(jax.device_put, device=NamedSharding(mesh, SPEC))
  k = width(layout, how["count"], how["scope"])

  def shown(memory):
    rows = memory.buffer.rows
    blank = np.zeros((rows.shape[0], k, *rows.shape[2:]), rows.dtype)
    return memory._replace(buffer=memory.buffer._replace(rows=place(blank)))

  def server(read):
    decide = jax.jit(decider(layout, **how))
    known = after = None

    def serve(memory, everyone, key):
      nonlocal after
      buffer = memory.buffer
      if known is not buffer.fill:
        # At the start, after a restore, and once herding has chosen.
        after = jax.tree.map(np.asarray, buffer._replace(rows=()))
      everyone = everyone._replace(fresh=everyone.fresh & stream)
      reads, writes, after = decide(after, everyone, key)
      kept = buffer.rows
      found = kept[np.arange(len(kept))[:, None], np.asarray(reads)]

      def done(memory):
        nonlocal known
        known = memory.buffer.fill
        slot = np.asarray(writes)
        at = np.nonzero(slot < layout.slots)
        kept[at[0], slot[at]] = read(everyone.number[at])
        return memory._replace(buffer=memory.buffer._replace(rows=kept))

      given = buffer._replace(rows=place(found))
      return memory._replace(buffer=given), done

    return serve

  return transforms.Hosted(shown, server)
