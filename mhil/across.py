"""Arrays on a mesh that several processes share.

Every process runs the same program and has the same values in hand; each gives
its own devices their part, and is asked for it where all are to be read. With
one process these are `jax.device_put` and `numpy.asarray`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

Tree = Any


def put(tree: Tree, where: Any) -> Tree:
  """Lays arrays out, like `jax.device_put`; no process waits for another.

  Where several processes share a mesh, `jax.device_put` sends values around to
  see that all have the same.

  Args:
    tree: arrays, the same in every process.
    where: a sharding for all, or a tree of them that begins like theirs.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, where)
  where = jax.tree.broadcast(where, tree)
  return jax.tree.map(_put, tree, where)


def _put(x: Any, where: Any) -> jax.Array:
  shared = isinstance(x, jax.Array) and not x.is_fully_addressable
  if shared or where.is_fully_addressable:
    return jax.device_put(x, where)
  if isinstance(x, jax.Array) and jax.dtypes.issubdtype(
    x.dtype, jax.dtypes.prng_key
  ):
    data = _put(jax.random.key_data(x), where)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def fetch(tree: Tree) -> Tree:
  """Numpy copies; of what lies in several processes all must ask for it."""

  def one(x):
    if isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(one, tree)


def send(x: jax.Array, mesh: Mesh) -> jax.Array:
  """Copies an array to a mesh of the same shape, each part where it is.

  Every process holds as much of one as of the other.
  """
  old = x.sharding
  assert isinstance(old, NamedSharding)
  where = NamedSharding(mesh, old.spec)
  if jax.process_count() == 1:
    return jax.device_put(x, where)
  to = dict(zip(old.mesh.devices.flat, mesh.devices.flat))
  parts = [jax.device_put(s.data, to[s.device]) for s in x.addressable_shards]
  return jax.make_array_from_single_device_arrays(x.shape, where, parts)


def rows_here(size: int, where: NamedSharding) -> slice:
  """The stretch of `size` rows that this process's devices hold."""
  spans = where.addressable_devices_indices_map((size,)).values()
  edges = [part[0].indices(size)[:2] for part in spans if part is not None]
  return slice(min(a for a, _ in edges), max(b for _, b in edges))


def put_rows(part: np.ndarray, size: int, where: NamedSharding) -> jax.Array:
  """An array of `size` rows, of which a process has those of `rows_here`."""
  if jax.process_count() == 1:
    return jax.device_put(part, where)
  first = rows_here(size, where).start

  def own(index):
    a, b, _ = index[0].indices(size)
    return part[a - first : b - first]

  return jax.make_array_from_callback((size, *part.shape[1:]), where, own)


def devices(wanted: int, stage: int = 1) -> list[Any]:
  """Devices for a mesh, as many of each process; process by process.

  Args:
    wanted: devices of the mesh.
    stage: of them along `stage`, which lie in one process.

  Raises:
    ValueError: if they cannot be shared out evenly.
  """
  found, count = jax.devices(), jax.process_count()
  if count == 1:
    return found
  if wanted % (count * stage):
    apart = f" with mesh.stage={stage} in one process" * (stage > 1)
    raise ValueError(
      f"a mesh of {wanted} devices{apart} cannot be shared out evenly to "
      f"{count} processes; use a number of processes that divides "
      f"{wanted // stage}"
    )
  return [d for i in range(count) for d in _of(found, i)[: wanted // count]]


def _of(found: Sequence[Any], process: int) -> list[Any]:
  return [device for device in found if device.process_index == process]
