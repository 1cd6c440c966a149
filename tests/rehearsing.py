"""Small buffers whose rows say which sample they are, and their programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mhil import buffer, drawing, populate, rehearsal, sharding

P = jax.P
SHAPE = (2, 1)


def images(number):
  """Rows `[..., 2, 1]` that hold the number of their sample."""
  number = np.asarray(number)
  return np.stack([number // 256, number % 256], -1)[..., None].astype(np.uint8)


def numbers(rows):
  """The inverse of `images`."""
  rows = np.asarray(rows)[..., 0].astype(int)
  return rows[..., 0] * 256 + rows[..., 1]


class Kit:
  """A layout on a mesh, and what is compiled for it; shared by `kit`."""

  def __init__(self, policy, size, classes, w, b, c, r, scope, chunk, head):
    self.mesh = sharding.make_mesh(data=w, head=head)
    self.layout = buffer.layout(policy, size, classes, w)
    self.w, self.b = w, b
    draws = {"count": r, "scope": scope, "chunk": chunk}

    def jitted(f, offered, out):
      ins = (buffer.SPEC, populate.SPEC, P()) if offered else (buffer.SPEC, P())
      f = functools.partial(f, self.layout)
      f = jax.shard_map(f, mesh=self.mesh, in_specs=ins, out_specs=out)
      return jax.jit(f, donate_argnums=0 if offered else ())

    store = functools.partial(populate.store, candidates=c)
    draw = functools.partial(drawing.draw, **draws)
    both = functools.partial(rehearsal.rehearse, candidates=c, **draws)
    self.store = jitted(store, True, buffer.SPEC)
    self.draw = jitted(draw, False, drawing.SPEC)
    # Many draws in one program, which moves no row as none is asked for.
    self.draws = self._draws(functools.partial(draw, self.layout))
    self.both = jitted(both, True, (buffer.SPEC, drawing.SPEC))

  def _draws(self, draw):
    def local(held, keys):
      return jax.lax.map(lambda key: draw(held, key)._replace(rows=()), keys)

    specs = (P(None, "data") if s == P("data") else s for s in drawing.SPEC)
    out = drawing.Drawn(*specs)._replace(rows=())
    ins = (buffer.SPEC, P())
    return jax.jit(
      jax.shard_map(local, mesh=self.mesh, in_specs=ins, out_specs=out)
    )

  def empty(self, shape=SHAPE, dtype=jnp.uint8):
    return buffer.init(self.layout, shape, dtype, self.mesh)

  def offer(self, label, number, counted=None, rows=None):
    """A mini-batch `[w, b]` of samples known by their numbers."""
    counted = np.ones(label.shape, bool) if counted is None else counted
    rows = images(number) if rows is None else rows
    rows = rows.reshape(-1, *rows.shape[2:])
    parts = rows, label.astype(np.int32), number.astype(np.int32), counted
    return populate.Offer(
      *(sharding.place(x, self.mesh, s) for x, s in zip(parts, populate.SPEC))
    )

  def with_fill(self, fill, rank=None):
    """A buffer with `fill` `[w, g]` rows, numbered from 1 on in its order."""
    blank = jax.tree.map(np.array, self.empty())
    fill = np.asarray(fill, np.int32)
    rank = np.arange(fill.shape[1]) if rank is None else rank
    at = buffer.filled(self.layout, fill, rank)
    number, label = blank.number, blank.label
    number[at] = np.arange(1, len(at[0]) + 1)
    kind = np.repeat(np.arange(fill.shape[1]), fill.sum(0))
    label[at] = kind if fill.shape[1] > 1 else number[at] % self.layout.classes
    seen = fill.sum(1, dtype=np.int32)
    return buffer.place(
      buffer.Buffer(
        images(number), label, number, fill, rank.astype(np.int32), seen
      ),
      self.mesh,
    )


@functools.cache
def kit(
  policy="per_class",
  size=40,
  classes=5,
  w=1,
  *,
  b=7,
  c=3,
  r=4,
  scope="global",
  chunk=None,
  head=1,
):
  """The `Kit` of these numbers."""
  return Kit(policy, size, classes, w, b, c, r, scope, chunk, head)


def contents(layout, held):
  """Labels and numbers of all filled rows, in the buffer's order."""
  fill, rank = np.asarray(held.fill), np.asarray(held.rank)
  at = buffer.filled(layout, fill, rank)
  # No slot serves two classes, and a row is what its number says.
  assert len(set(zip(*map(np.ndarray.tolist, at)))) == len(at[0])
  number = np.asarray(held.number)[at]
  assert (numbers(held.rows)[at] == number).all()
  return np.asarray(held.label)[at].tolist(), number.tolist()
