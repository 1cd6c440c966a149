"""A branch as a chain of stages: where it is cut, and what each part costs.

A cut is the number of the piece at which a stage begins. The last stage ends
with the readout and may hold nothing else.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mhil import cuts as cuts_lib
from mhil import networks

Tree = Any
Shape = tuple[int, ...]


class Chain(NamedTuple):
  """A branch in stages.

  Attributes:
    branch: what is cut.
    stages: names of each stage's pieces, in order.
    shapes: of one sample at the input of each stage; the first is an image.
    costs: multiply-adds of each stage for one sample, forwards.
    run: `run(k, params, stats, x, train) -> (x, stats)` of stage `k`; reads
      its own pieces of `params` and `stats` and returns the new ones of both.
  """

  branch: networks.Branch
  stages: tuple[tuple[str, ...], ...]
  shapes: tuple[Shape, ...]
  costs: tuple[int, ...]
  run: Callable[[int, Tree, Tree, Any, bool], tuple[Any, Tree]]


def chain(
  branch: networks.Branch,
  shape: Sequence[int],
  stages: int = 1,
  cuts: Sequence[int] = (),
) -> Chain:
  """Cuts a branch.

  Args:
    branch: what is cut.
    shape: of an image.
    stages: how many, such that the dearest is as cheap as can be.
    cuts: numbers of the pieces at which a stage begins, from 1; in place of
      `stages`.

  Raises:
    ValueError: for more stages than pieces, or cuts outside the branch.
  """
  names, last = branch.pieces, len(branch.pieces) - 1
  if not 1 <= stages <= len(names):
    raise ValueError(
      f"layer_parallel.stages={stages} are more than the {len(names)} pieces "
      f"of {branch.name}; use layer_parallel.stages={len(names)} or less"
    )
  if list(cuts) != sorted({*cuts} & {*range(1, last + 1)}):
    raise ValueError(
      f"layer_parallel.cuts={tuple(cuts)} is no list of rising numbers from 1 "
      f"to {last}, the pieces of {branch.name}: {', '.join(names)}; use for "
      f"instance layer_parallel.cuts=({last},)"
    )
  singly = tuple((name,) for name in names[:-1])
  shapes = cuts_lib.interfaces(branch, shape, singly)
  costs = _costs(branch, shapes)
  begins = [0, *(cuts or cuts_lib.balance(costs, stages))]
  bounds = list(itertools.pairwise([*begins, len(names)]))
  parts = tuple(names[a:b] for a, b in bounds)
  return Chain(
    branch,
    parts,
    tuple(shapes[a] for a in begins),
    tuple(sum(costs[a:b]) for a, b in bounds),
    partial(_run, branch, parts),
  )


def _run(branch, parts, k, params, stats, x, train):
  new = {}
  for name in parts[k]:
    x, new[name] = branch.piece(name, params[name], stats[name], x, train)
  return x, new


def _costs(branch, shapes) -> list[int]:
  """Multiply-adds of each piece, of which one sample has that shape."""
  params, stats = jax.eval_shape(branch.init, jax.random.key(0))

  def run(name, *given):
    return branch.piece(name, *given, False)[0]

  return [
    networks.multiply_adds(
      partial(run, name),
      params[name],
      stats[name],
      jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    )
    for name, shape in zip(branch.pieces, shapes)
  ]
