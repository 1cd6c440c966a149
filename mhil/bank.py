"""The bank of heads: its arrays, and how they lie on the mesh.

Every leaf is `[l, h, ...]`, laid over the mesh's `head` axis; head `i` is
entry `divmod(i, h)`. Dealt in turn, so that a young stream uses every device;
in order when flattened, so that a bank moves to another mesh by a reshape. A
process that trains some of the heads deals these in the same way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from mhil import across, manual

P = jax.P
Tree = Any
SPEC = P(None, "head")


class Layout(NamedTuple):
  """How the leaves of a bank begin, and over which mesh axes they lie.

  Attributes:
    axes: `("head",)` for `[l, h, ...]`, or `("head", "subnet")` where parts of
      a head are trained apart, `[l, h, n, ...]`.
    joint: the parts are copies that take each step on one batch together.
  """

  axes: tuple[str, ...] = ("head",)
  joint: bool = False

  @property
  def samples(self) -> tuple[str, ...]:
    """The mesh axes over which a batch lies."""
    return ("data", "subnet") if self.joint else ("data",)

  @property
  def spec(self) -> P:
    """The partition spec of every leaf."""
    return P(None, *self.axes)

  def enter(self, tree: Tree) -> Tree:
    """A device's leaves `[l, 1, .., ...]` as `[l, 1, ...]`; in `shard_map`."""
    skip = 1 + len(self.axes)
    return jax.tree.map(
      lambda x: x.reshape(x.shape[0], 1, *x.shape[skip:]), tree
    )

  def leave(self, tree: Tree) -> Tree:
    """The inverse of `enter`."""
    ones = (1,) * len(self.axes)

    def widen(x):
      x = manual.vary(x, *self.axes)
      return x.reshape(x.shape[0], *ones, *x.shape[2:])

    return jax.tree.map(widen, tree)


WHOLE = Layout()
PARTS = Layout(("head", "subnet"))
COPIES = Layout(("head", "subnet"), joint=True)


class Bank(NamedTuple):
  """All heads; every leaf is `[l, h, ...]`, laid over the `head` axis.

  Attributes:
    params: trainable parameters.
    stats: normalisation statistics.
    opt: optimiser state, one for each head.
    side: the objective's own state.
    loss: sum of the losses of the steps since it was last cleared.
    bad_step: first step whose loss was not finite, else -1.
  """

  params: Tree
  stats: Tree
  opt: Tree
  side: Tree
  loss: jax.Array
  bad_step: jax.Array


class Task(NamedTuple):
  """What a step must know of the running task; arrays, so nothing recompiles.

  Attributes:
    opened: `[]` number of open heads.
    first_step: `[]` global step at which the phase began.
    steps: `[]` number of steps of the phase.
    balanced: `[]` True in the balanced passes after a task.
    counts: `[classes]` new samples of each class in a step, on average.
    heads: `[l, h]` number of the head in each entry; of none, a number that
      is never opened.
    valid: `[l, h, c]` classes that exist in open heads.
  """

  opened: Any
  first_step: Any
  steps: Any
  balanced: Any
  counts: Any
  heads: Any
  valid: Any


TASK_SPEC = Task(P(), P(), P(), P(), P(), SPEC, SPEC)


def rows(heads: int, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
  """The bank's leading shape `(l, h)` for at least `heads` heads."""
  h = mesh.shape["head"]
  return -(-heads // h), h


def numbers(
  heads: Sequence[int], count: int, mesh: Mesh | AbstractMesh
) -> np.ndarray:
  """Which head an entry `[l, h]` holds, of `count` in all; then `count`, .."""
  l, h = rows(len(heads), mesh)
  beyond = range(count, count + l * h - len(heads))
  return np.array([*heads, *beyond], np.int32).reshape(l, h)


def arrange(per_head: np.ndarray, mesh: Mesh, fill=0) -> np.ndarray:
  """`[heads, ...]` to `[l, h, ...]`, padded with `fill` at the end."""
  l, h = rows(len(per_head), mesh)
  shape = (l * h - len(per_head), *per_head.shape[1:])
  padding = np.full(shape, fill, per_head.dtype)
  whole = np.concatenate([per_head, padding])
  return whole.reshape(l, h, *per_head.shape[1:])


def flatten(leaf):
  """`[l, h, ...]` to `[l*h, ...]`: heads in the order of their tasks."""
  return leaf.reshape(-1, *leaf.shape[2:])


def place(tree: Tree, mesh: Mesh) -> Tree:
  """Lays arrays `[l, h, ...]` over the mesh's `head` axis."""
  return across.put(tree, NamedSharding(mesh, SPEC))


def deal(saved: jax.Array | np.ndarray, like: jax.Array) -> Any:
  """Rows of `[l, h, ...]` in another `[l', h', ...]`; new ones stay `like`.

  Where the shapes are equal, nothing is moved.
  """
  if saved.shape == like.shape:
    return saved
  if saved.shape[2:] != like.shape[2:]:
    raise ValueError(
      f"a saved array is {saved.shape}, and {like.shape} here; heads move to "
      "another mesh.head, but use the saved run's mesh.subnet and network"
    )
  rows = np.array(across.fetch(like)).reshape(-1, *like.shape[2:])
  old = across.fetch(saved).reshape(-1, *saved.shape[2:])
  n = min(len(rows), len(old))
  rows[:n] = old[:n]
  return across.put(rows.reshape(like.shape), like.sharding)
