"""Auxiliary networks: from an image to the state at one interface.

One small network for each interface, of a stated cost, so that each can live
and learn beside the stage that it feeds:

  dense: image -> f -> .. -> state            (f units, ReLU)
  conv:  image -> conv, stride to the interface's size -> conv -> 1x1 -> state
         (means over windows where that size does not divide the image's)

The width `f` is the largest whose multiply-adds fit the share of the branch's
own that it is given. With multipliers, the last layer has twice the outputs:
state, and scaled multiplier, which starts at 0.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from mhil import auxiliary, layers, networks, pieces
from mhil.chain import Chain, Shape
from mhil.layers import Numerics

Tree = Any
WIDEST = 4096


class AuxNet(NamedTuple):
  """The auxiliary networks of a chain.

  Attributes:
    names: of their parameters, one for each interface.
    costs: their multiply-adds for one sample, forwards.
    widths: their hidden units.
    init: `key -> {name: params}`.
    run: `run(name, params, images) -> (state, scaled multiplier)` of one
      interface, the multiplier None without a head for it.
  """

  names: tuple[str, ...]
  costs: tuple[int, ...]
  widths: tuple[int, ...]
  init: Callable[[Array], Tree]
  run: Callable[[str, Tree, Array], tuple[Array, Array | None]]


class _Net(nnx.Module):
  """Hidden layers, then a linear map to the state and its multiplier."""

  def __init__(
    self,
    shape: Shape,
    state: Shape,
    width: int,
    depth: int,
    heads: int,
    *,
    rngs: nnx.Rngs,
  ):
    # Targets move as stages learn; unnormalised layers died under SGD.
    numerics = Numerics("layer")
    self.state = state
    if len(state) == 1:
      sizes = [math.prod(shape), *[width] * depth]
      hidden: list[Any] = [
        layers.DenseLayer(a, b, numerics, rngs=rngs)
        for a, b in itertools.pairwise(sizes)
      ]
      make: Any = layers.Dense
    else:
      stride = max(1, min(a // b for a, b in zip(shape[:2], state[:2])))
      sizes = [shape[2], *[width] * depth]
      hidden = [
        layers.ConvLayer(
          sizes[i],
          sizes[i + 1],
          numerics,
          k=3 if i or stride < 3 else 5,
          stride=1 if i else stride,
          rngs=rngs,
        )
        for i in range(depth)
      ]
      make = partial(layers.Conv, k=1, bias=True)
    self.hidden = nnx.List(hidden)
    self.out = nnx.List(
      [make(sizes[-1], state[-1], rngs=rngs) for _ in range(heads)]
    )
    for out in self.out[1:]:
      out.kernel[...] = jnp.zeros_like(out.kernel[...])

  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images to `[heads, b, ...]`."""
    for layer in self.hidden:
      x = layer(x, train)
      if len(self.state) > 1:
        x = auxiliary.mean_pool(x, (self.state[0], self.state[1]))
    return jnp.stack([out(x) for out in self.out])


def auxnet(
  chain: Chain, cost: float = 0.1, depth: int = 2, multipliers: bool = False
) -> AuxNet:
  """Auxiliary networks for every interface of a chain.

  Args:
    chain: the stages.
    cost: multiply-adds of all of them together, as a share of the branch's.
    depth: hidden layers of each.
    multipliers: whether a second head gives the scaled multiplier.

  Raises:
    ValueError: if not even one hidden unit fits the cost.
  """
  image, states = chain.shapes[0], chain.shapes[1:]
  names = tuple(f"aux{k}" for k in range(1, len(states) + 1))
  each = sum(chain.costs) / max(len(states), 1)
  heads = 2 if multipliers else 1

  def make(state: Shape, width: int) -> pieces.Maker:
    return lambda rngs: _Net(image, state, width, depth, heads, rngs=rngs)

  def price(state: Shape, width: int) -> int:
    one = pieces.build({"aux": make(state, width)})
    params = jax.eval_shape(partial(one.init, "aux"), jax.random.key(0))[0]
    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    run = lambda p, x: one.run("aux", p, {}, x, False)[0]  # noqa: E731
    return networks.multiply_adds(run, params, x)

  widths = tuple(_widest(partial(price, state), each, cost) for state in states)
  nets = pieces.build(
    {n: make(s, w) for n, s, w in zip(names, states, widths, strict=True)}
  )

  def init(key: Array) -> Tree:
    # Apart from the keys of the branch's pieces, which are counted up from 0.
    keys = [jax.random.fold_in(key, 2**31 + i) for i in range(len(names))]
    return {n: nets.init(n, k)[0] for n, k in zip(names, keys, strict=True)}

  def run(name: str, params: Tree, images: Array) -> tuple[Array, Array | None]:
    out = nets.run(name, params, {}, images, True)[0]
    return out[0], out[1] if multipliers else None

  costs = tuple(price(s, w) for s, w in zip(states, widths, strict=True))
  return AuxNet(names, costs, widths, init, run)


def _widest(price: Callable[[int], int], each: float, cost: float) -> int:
  """The largest width within the share `cost` of `each`, found by halving."""
  low, high, room = 0, WIDEST, cost * each
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if price(middle) <= room else (low, middle)
  if not low:
    raise ValueError(
      f"layer_parallel.cost={cost} leaves {room:.0f} multiply-adds to each "
      f"auxiliary network, which needs {price(1)} for one hidden unit; use "
      f"layer_parallel.cost={math.ceil(1e4 * price(1) / each) / 1e4}"
    )
  return low
