"""Parts of a branch on devices of their own: what every such method needs.

A mesh with `stage > 1` is cut into sub-meshes, one a stage, each with all four
axes and a `stage` of size 1. Stages have different shapes, so each is a
program of its own, compiled for its sub-mesh with `jax.jit(jax.shard_map(..))`
and the specs that a mesh without stages has; programs sent to different
sub-meshes run side by side. Between programs the host moves arrays with
`send`, which does not wait.

A method for stages is a function `spread(run, mesh) -> run`, and
`Objective.spread` holds it; `prepare.build` calls it where `stage > 1`. The
run that it gets has `run.mesh = meshes(mesh)[0]`, home: data, task tables, the
memory and tests live there, and nowhere else. It returns the run with

  fresh     key on home -> the state's `bank`, any pytree that it likes
  step      (state, epoch, task, samples) -> state; may do all of the work
  exchange  (state, steps done) -> state, after each step: the host's number
  whole     bank -> one `Bank` of all pieces, at home, with the losses and the
            first bad step of all stages; it must not take the bank's buffers
  read      state -> (state with cleared losses, loss [l, h], bad_step [l, h])
  reset     bank -> bank with new optimiser state
  clocks    state -> arrays that are ready when each stage is done so far
  programs  the compiled programs of a step
  traffic   their collectives

and all else as it was. What is between stages when a step ends is state, has
to be part of `bank`, and so comes back after a kill. Leaves that are not
`[l, h, ...]` keep their shape when `mesh.head` changes. The optimiser is one
for each stage, so nothing that looks at a whole gradient (`optimizer.clip`)
fits. Below are the pieces that such methods share.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhil import across
from mhil.bank import Bank

Tree = Any


def meshes(mesh: Mesh) -> tuple[Mesh, ...]:
  """One sub-mesh for each place along `stage`, with all four axes."""
  axis = mesh.axis_names.index("stage")
  return tuple(
    Mesh(
      mesh.devices.take([s], axis=axis),
      mesh.axis_names,
      axis_types=mesh.axis_types,
    )
    for s in range(mesh.shape["stage"])
  )


def send(tree: Tree, mesh: Mesh) -> Tree:
  """Copies arrays to another sub-mesh, laid out as they were; waits for none.

  The copy survives when the original is donated.
  """
  return jax.tree.map(lambda x: across.send(x, mesh), tree)


def take(tree: Tree, names: Sequence[str]) -> Tree:
  """Some pieces of a tree that has one entry for each piece."""
  return {name: tree[name] for name in names}


def split(
  bank: Bank, owned: Sequence[Sequence[str]], meshes: Sequence[Mesh]
) -> tuple[Bank, ...]:
  """The pieces of a bank, each at its owner's; without optimiser and side.

  Args:
    bank: whole, on any sub-mesh.
    owned: names of each stage's pieces.
    meshes: of each stage.
  """
  return tuple(
    send(
      Bank(
        take(bank.params, names),
        take(bank.stats, names),
        (),
        (),
        # Copies, as each stage gives its own away where two share a device.
        bank.loss + 0,
        bank.bad_step + 0,
      ),
      mesh,
    )
    for names, mesh in zip(owned, meshes, strict=True)
  )


def whole(banks: Sequence[Bank], home: Mesh) -> Bank:
  """All pieces as one bank at home, without optimiser and side."""
  bare = [send(b._replace(opt=(), side=()), home) for b in banks]
  params: Tree = {}
  stats: Tree = {}
  for bank in bare:
    params |= bank.params
    stats |= bank.stats
  loss, bad = _combined(
    [bank.loss for bank in bare], [bank.bad_step for bank in bare]
  )
  return Bank(params, stats, (), (), loss, bad)


def read(
  banks: Sequence[Bank], home: Mesh
) -> tuple[tuple[Bank, ...], jax.Array, jax.Array]:
  """Banks with cleared losses, their sum and the first bad step, at home."""
  loss, bad = _combined(
    *(send([getattr(b, x) for b in banks], home) for x in ("loss", "bad_step"))
  )
  cleared = tuple(bank._replace(loss=_clear(bank.loss)) for bank in banks)
  return cleared, loss, bad


def traffic(tree: Tree) -> int:
  """Bytes of arrays on the way: what one device of a sub-mesh sends."""
  return sum(
    x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(tree)
  )


@jax.jit
def _clear(loss):
  # Not zeros_like: under jax 0.12 that forgets how `loss` lies on the mesh.
  return jnp.where(True, 0.0, loss)


@jax.jit
def _combined(losses, bad):
  """The sum of the losses; the first bad step, or -1."""
  never = jnp.iinfo(jnp.int32).max
  steps = [jnp.where(step < 0, never, step) for step in bad]
  first = functools.reduce(jnp.minimum, steps)
  total = functools.reduce(jnp.add, losses)
  return total, jnp.where(first == never, -1, first)
