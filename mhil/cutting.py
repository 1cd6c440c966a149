"""How the arrays of a branch fall into parts: split, merge and exchange.

A branch has units (neurons of a layer, residual blocks of a section) that are
dealt to n parts, m a part. A leaf of its trees is one of three kinds:

  shared    no axis counts units; each part has a copy, and copies are averaged
  owned     one axis does; a unit's entries lie where the unit lies
  crossed   two do, [before, after]; a part has the block of its own units, and
            the blocks between parts stay behind

A crossed leaf has a home, where it lies in order of its second axis, an n-th
on each device. A part works on a copy of its block, which an exchange writes
home before it reads the next one. So blocks that nobody trains never move.

Here trees are flat, `{name: leaf}`, and see one head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mhil import dealing

Tree = Any
Flat = dict[str, Any]
Index = dict[str, Any]


class Cut(NamedTuple):
  """Which axes of which leaves count units.

  Attributes:
    parts: n.
    units: `{name: number}` of all units.
    axes: `leaf's name -> names of units` for its first axes; None for an axis
      that is not cut. The name is `outer|piece.layer.array`.
    flat: `trees -> {name: leaf}`.
    grow: `({name: leaf}, trees of the same form) -> trees`.
    pairs: names of units that crossed leaves lie between.
  """

  parts: int
  units: dict[str, int]
  axes: Callable[[str], tuple[str | None, ...]]
  flat: Callable[[Tree], Flat]
  grow: Callable[[Flat, Tree], Tree]
  pairs: tuple[tuple[str, str], ...] = ()


def name_of(path: Any) -> str:
  """A leaf's name: outer keys, then those of the nested dicts within."""
  first, *rest = path
  inner = [k.key for k in rest if isinstance(k, jax.tree_util.DictKey)]
  outer = [k for k in rest if not isinstance(k, jax.tree_util.DictKey)]
  return f"{first.key}{jax.tree_util.keystr(tuple(outer))}|{'.'.join(inner)}"


def flatten(trees: Tree) -> Flat:
  """`{name: leaf}` of trees whose pieces are not stacked."""
  return {name_of(path): x for path, x in jax.tree.leaves_with_path(trees)}


def regrow(flat: Flat, like: Tree) -> Tree:
  """The inverse of `flatten`."""
  return jax.tree_util.tree_map_with_path(lambda p, _: flat[name_of(p)], like)


def copies(parts: int) -> Cut:
  """Nothing is cut: every part is a copy of the branch."""
  return Cut(parts, {}, lambda name: (), flatten, regrow)


def home(cut: Cut) -> dict[str, np.ndarray]:
  """The index while every part holds its units in order, `{units: [n, m]}`."""
  return {
    name: np.arange(units, dtype=np.int32).reshape(cut.parts, -1)
    for name, units in cut.units.items()
  }


def take(cut: Cut, whole: Flat, mine: Index) -> Flat:
  """One part of a branch.

  Args:
    cut: what is cut.
    whole: the branch's leaves.
    mine: `{units: [m]}`, the units of this part.
  """
  part = {}
  for name, x in whole.items():
    for axis, units in enumerate(cut.axes(name)):
      x = x if units is None else jnp.take(x, mine[units], axis)
    part[name] = x
  return part


def left_behind(cut: Cut, whole: Flat) -> Flat:
  """The homes `[n, m after, before]` of a branch's crossed leaves."""
  return {
    name: jnp.asarray(x).T.reshape(cut.parts, -1, x.shape[0])
    for name, x in whole.items()
    if _kind(cut, name) == 2
  }


def merge(cut: Cut, parts: Flat, rest: Flat, index: Index) -> Flat:
  """The branch of which these are all the parts.

  Args:
    cut: what is cut.
    parts: leaves `[n, ...]` of the parts.
    rest: homes `[n, ...]`.
    index: `{units: [n, m]}`.
  """
  whole = {}
  for name, x in parts.items():
    axes = cut.axes(name)
    if _kind(cut, name) == 0:
      whole[name] = _mean(x)
    elif _kind(cut, name) == 1:
      ((axis, units),) = ((a, u) for a, u in enumerate(axes) if u)
      entries = jnp.moveaxis(x, axis + 1, 1)
      entries = entries.reshape(-1, *entries.shape[2:])
      blank = jnp.zeros_like(entries)
      ordered = blank.at[index[units].reshape(-1)].set(entries)
      whole[name] = jnp.moveaxis(ordered, 0, axis)
    else:
      before, after = (index[units] for units in axes if units)
      kernel = rest[name].reshape(-1, rest[name].shape[-1]).T
      where = before[:, :, None], after[:, None]
      whole[name] = kernel.at[where].set(x)
  return whole


def exchange(
  cut: Cut, held: Flat, rest: Flat, old: Index, new: Index
) -> tuple[Flat, Flat]:
  """What this device holds in the next round; in `shard_map` over `subnet`.

  Args:
    cut: what is cut.
    held: leaves of this device's part.
    rest: this device's homes.
    old, new: the units of all parts, now and then.

  Returns:
    The same for the next round. Collectives over `subnet`: an all-reduce of
    shared leaves; an all-to-all for each kind of units, of all that they own;
    two for each crossed leaf. Where the index stays, only the first.
  """
  ways = {} if new is old else {u: dealing.route(old[u], new[u]) for u in new}
  order, then, rest = home(cut), dict(held), dict(rest)
  owned: dict[str, list[str]] = {}
  for name, x in held.items():
    axes, kind = cut.axes(name), _kind(cut, name)
    if kind == 0:
      then[name] = _average(x)
    elif new is old:
      continue
    elif kind == 1:
      owned.setdefault(next(u for u in axes if u), []).append(name)
    else:
      before, after = axes
      assert before and after
      back = dealing.route(old[after], order[after])
      away = dealing.route(order[after], new[after])
      whole = _write(rest[name], x, back, old[before])
      then[name] = _read(whole, away, new[before])
      rest[name] = whole
  for units, names in owned.items():
    axis = {name: cut.axes(name).index(units) for name in names}
    leaves = [jnp.moveaxis(held[name], axis[name], 0) for name in names]
    for name, x in zip(names, _move(leaves, ways[units])):
      then[name] = jnp.moveaxis(x, 0, axis[name])
  return then, rest


def _move(leaves, way):
  """Units with all that is theirs, `[m, ...]` each, in one all-to-all."""
  rows = [x.reshape(x.shape[0], -1) for x in leaves]
  moved = dealing.move(jnp.concatenate(rows, axis=1), way)
  ends = np.cumsum([x.shape[1] for x in rows])[:-1]
  return [
    new.reshape(x.shape)
    for x, new in zip(leaves, jnp.split(moved, ends, axis=1))
  ]


def _write(whole, block, back, before):
  # Rows of `came` are this device's units of the second axis, in order.
  me = lax.axis_index("subnet")
  came = dealing.move(block.T, back)
  columns = jnp.asarray(before)[back.owner[me]]
  return whole.at[jnp.arange(len(whole))[:, None], columns].set(came)


def _read(whole, away, before):
  me, (n, m) = lax.axis_index("subnet"), away.owner.shape
  # Who will have each unit that is at home here, and so which columns of it.
  wants = jnp.zeros((n, m), jnp.int32)
  parts = jnp.broadcast_to(jnp.arange(n)[:, None], (n, m))
  wants = wants.at[away.owner, away.place].set(parts)
  columns = jnp.asarray(before)[wants[me]]
  sent = jnp.take_along_axis(whole, columns, axis=1)
  return dealing.move(sent, away).T


def traffic(cut: Cut, held: Flat) -> int:
  """Bytes that an exchange gives a device, if no all-to-all is repeated.

  With the room r of a pair for units of which a part has m, an all-to-all
  gives `n r` units, and a unit's entry in a leaf of a part is the leaf's size
  over m: the sum over leaves is

    shared    its size
    owned     n r / m  of its size
    crossed   2 n r / m  of its size

  Args:
    cut: what is cut.
    held: leaves of a part, or their shapes.
  """
  total = 0
  for name, x in held.items():
    size, kind = int(np.prod(x.shape)) * x.dtype.itemsize, _kind(cut, name)
    if kind == 0:
      total += size if jnp.issubdtype(x.dtype, jnp.floating) else 0
      continue
    units = [u for u in cut.axes(name) if u][-1]
    m = cut.units[units] // cut.parts
    total += kind * cut.parts * dealing.room_for(cut.parts, m) * size // m
  return total


def _kind(cut: Cut, name: str) -> int:
  return sum(units is not None for units in cut.axes(name))


def _mean(x):
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return x.mean(0) if floating else x[0]


def _average(x):
  # Counters of steps are alike everywhere.
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return lax.pmean(x, "subnet") if floating else x
