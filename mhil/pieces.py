"""Flax modules as pure functions over plain nested dicts.

NNX defines a module; it is split once, when it is built, because splitting it
at every step costs several times a small step itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array

Tree = dict[str, Any]
Maker = Callable[[nnx.Rngs], nnx.Module]


class Pieces(NamedTuple):
  """Named modules, each with parameters and statistics of its own.

  Attributes:
    names: in the order given.
    init: `init(name, key) -> (params, stats)`; under `vmap` over keys the
      bits stay the same.
    run: `run(name, params, stats, x, train) -> (y, stats)`. Modules of equal
      shapes may exchange names.
  """

  names: tuple[str, ...]
  init: Callable[[str, jax.Array], tuple[Tree, Tree]]
  run: Callable[[str, Tree, Tree, ArrayLike, bool], tuple[Array, Tree]]


def build(makers: Mapping[str, Maker]) -> Pieces:
  """Splits the modules that `makers` make; each maps one array to another."""
  graphs = {
    name: nnx.graphdef(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
    for name, make in makers.items()
  }

  def init(name: str, key: jax.Array) -> tuple[Tree, Tree]:
    module = makers[name](nnx.Rngs(params=key))
    params, stats = nnx.state(module, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

  def run(
    name: str, params: Tree, stats: Tree, x: ArrayLike, train: bool
  ) -> tuple[Array, Tree]:
    module: Any = nnx.merge(graphs[name], params, stats)
    y = module(jnp.asarray(x), train)
    return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

  return Pieces(tuple(makers), init, run)
