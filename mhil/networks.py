"""Branches: the networks that carry one head each.

A branch is a chain of named pieces. Between two pieces lies an interface, a
feature map without pooling, and that is where local learning and
layer-parallel training cut. Pooling opens the last piece, `readout`, so that
the chain of all pieces is `apply`.

The pieces run on plain nested dicts: `params[piece][layer]...[array]`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mhil import layers
from mhil import pieces as pieces_lib
from mhil.counting import count_parameters as count_parameters
from mhil.counting import multiply_adds as multiply_adds
from mhil.counting import used_numbers as used_numbers
from mhil.layers import Numerics
from mhil.pieces import Maker

Tree = dict[str, Any]


class Branch(NamedTuple):
  """A network of one head, as pure functions over plain nested dicts.

  Attributes:
    name: what it is, for logs and tables.
    pieces: names of the pieces in order, `readout` last. `params` and `stats`
      have exactly these keys; a piece without statistics holds `{}`.
    init: `init(key) -> (params, stats)`. Piece `i` depends on the key and `i`
      alone; under `vmap` over keys the bits stay the same.
    piece: `piece(name, params, stats, x, train) -> (x, stats)` runs one piece
      on its own params and stats. Pieces of equal shapes may exchange names.
    apply: `apply(params, stats, x, train) -> (logits [b, c+1], stats)`, with
      logits in float32.
    features: `features(params, stats, x, train) -> (features [b, f], stats)`,
      all pieces but `readout`, then pooled, in float32.
    readout: `readout(params, features) -> logits`, from pooled features and
      the params of the whole branch.
    numerics: what its layers share.
  """

  name: str
  pieces: tuple[str, ...]
  init: Callable[[jax.Array], tuple[Tree, Tree]]
  piece: Callable[[str, Tree, Tree, ArrayLike, bool], tuple[Array, Tree]]
  apply: Callable[[Tree, Tree, ArrayLike, bool], tuple[Array, Tree]]
  features: Callable[[Tree, Tree, ArrayLike, bool], tuple[Array, Tree]]
  readout: Callable[[Tree, ArrayLike], Array]
  numerics: Numerics


def branch(
  name: str,
  trunk: Mapping[str, Maker],
  width: int,
  outputs: int,
  numerics: Numerics,
  norm: Callable[[], Any] | None = None,
) -> Branch:
  """Builds a branch of any pieces; the networks below are made by it.

  Args:
    name: what it is, for logs and tables.
    trunk: by the name of each piece, in order, what makes its module from
      `nnx.Rngs`. A module is called as `module(x, train)` and holds nothing
      but `nnx.Param` and `nnx.BatchStat`.
    width: features of what leaves the trunk, its last axis.
    outputs: width of the logits, the reference output included.
    numerics: what its layers share.
    norm: makes a normalisation of the logits; None for a bias instead.
  """
  sizes, makers = (width, outputs), dict(trunk)
  makers["readout"] = lambda rngs: layers.Readout(
    *sizes, norm and norm(), rngs=rngs
  )
  pieces, piece_init, run = pieces_lib.build(makers)

  def init(key: jax.Array) -> tuple[Tree, Tree]:
    params, stats = {}, {}
    for i, piece in enumerate(pieces):
      own = jax.random.fold_in(key, i)
      params[piece], stats[piece] = piece_init(piece, own)
    return params, stats

  def features(
    params: Tree, stats: Tree, x: ArrayLike, train: bool
  ) -> tuple[Float[Array, "b f"], Tree]:
    stats = dict(stats)
    for piece in pieces[:-1]:
      x, stats[piece] = run(piece, params[piece], stats[piece], x, train)
    return layers.global_mean(jnp.asarray(x)), stats

  def readout(params: Tree, x: ArrayLike) -> Float[Array, "b c"]:
    return run("readout", params["readout"], {}, x, False)[0]

  def apply(
    params: Tree, stats: Tree, x: ArrayLike, train: bool
  ) -> tuple[Float[Array, "b c"], Tree]:
    x, stats = features(params, stats, x, train)
    last = params["readout"], stats["readout"], x, train
    logits, stats["readout"] = run("readout", *last)
    return logits, stats

  return Branch(name, pieces, init, run, apply, features, readout, numerics)


def mlp(
  inputs: int,
  outputs: int,
  hidden: Sequence[int] = (64,),
  norm: str = "none",
  *,
  output_norm: bool = False,
  dtype: Any = jnp.float32,
  axis: str | None = None,
) -> Branch:
  """Builds dense layers with ReLU: pieces `dense0`, ..., `readout`.

  Args:
    inputs: numbers in a flattened sample.
    outputs: width of the logits, the reference output included.
    hidden: units of each hidden layer.
    norm: `none`, `batch` or `layer`, before the ReLU.
    output_norm: normalise logits by batch too, without scale and shift.
    dtype, axis: see `layers.Numerics`.
  """
  numerics = Numerics(norm, dtype, axis)
  sizes = [inputs, *hidden]

  def layer(i: int) -> Maker:
    return lambda rngs: layers.DenseLayer(
      sizes[i], sizes[i + 1], numerics, rngs=rngs
    )

  trunk = {f"dense{i}": layer(i) for i in range(len(hidden))}
  norms = partial(layers.BatchNorm, outputs, axis=axis, affine=False)
  last = norms if output_norm else None
  return branch("mlp", trunk, sizes[-1], outputs, numerics, last)


def convnet(
  shape: Sequence[int],
  outputs: int,
  widths: Sequence[int] = (32, 64, 128),
  norm: str = "group",
  *,
  dtype: Any = jnp.float32,
  axis: str | None = None,
) -> Branch:
  """Builds 3x3 convolutions with 2x2 maxima: `conv0`, ..., `readout`.

  Args:
    shape: height, width and channels of an image.
    outputs: width of the logits, the reference output included.
    widths: features of each layer; each halves the image.
    norm: `group`, `batch` or `none`.
    dtype, axis: see `layers.Numerics`.

  Raises:
    ValueError: if nothing is left of the image after the last maximum.
  """
  if min(shape[:2]) >> len(widths) == 0:
    raise ValueError(
      f"network.widths={tuple(widths)} halves an image of shape={tuple(shape)} "
      "to nothing; use fewer widths"
    )
  numerics = Numerics(norm, dtype, axis)
  sizes = [shape[2], *widths]

  def layer(i: int) -> Maker:
    options: Any = {"bias": norm == "none", "pool": True}
    return lambda rngs: layers.ConvLayer(
      sizes[i], sizes[i + 1], numerics, **options, rngs=rngs
    )

  trunk = {f"conv{i}": layer(i) for i in range(len(widths))}
  return branch("convnet", trunk, sizes[-1], outputs, numerics)


def resnet_cifar(
  depth: int | Sequence[int],
  outputs: int,
  widths: Sequence[int] = (16, 16, 32, 64),
  norm: str = "batch",
  channels: int = 3,
  *,
  dtype: Any = jnp.float32,
  axis: str | None = None,
) -> Branch:
  """Builds the ResNet for 32x32 images, He et al. 2016, section 4.2.

  Shortcuts are 1x1 convolutions where the shape changes. Pieces: `stem`,
  `stage1.block0`, ..., `stage3.block{n-1}`, `readout`.

  Args:
    depth: 6 n + 2 for n blocks a stage: 20, 32, 44, 56 or 110; or the blocks
      of each stage.
    outputs: width of the logits, the reference output included.
    widths: features of the stem and of each stage.
    norm: `batch` or `group`.
    channels: channels of an image.
    dtype, axis: see `layers.Numerics`.

  Raises:
    ValueError: for another depth.
  """
  if isinstance(depth, int):
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
      raise ValueError(f"depth={depth} is not 6 n + 2; use 20, 32 or 110")
    depth = (blocks,) * (len(widths) - 1)
  counts = tuple(depth)
  name, numerics = f"resnet{2 * sum(counts) + 2}", Numerics(norm, dtype, axis)
  return _resnet(name, counts, (channels, *widths), outputs, numerics)


def resnet18(
  outputs: int,
  norm: str = "batch",
  channels: int = 3,
  width: int = 64,
  *,
  stem: int = 3,
  dtype: Any = jnp.float32,
  axis: str | None = None,
) -> Branch:
  """Builds ResNet-18, with a stem for small images or for ImageNet's.

  Args:
    outputs: width of the logits, the reference output included.
    norm, channels: see `resnet_cifar`.
    width: features of the stem and the first stage; each later stage doubles.
    stem: 3 (3x3), or 7: 7x7 of stride 2, and 2x2 maxima (He et al.: 3x3).
    dtype, axis: see `layers.Numerics`.
  """
  widths = (channels, width, width, 2 * width, 4 * width, 8 * width)
  numerics = Numerics(norm, dtype, axis)
  return _resnet("resnet18", (2, 2, 2, 2), widths, outputs, numerics, stem)


def _resnet(
  name: str,
  counts: Sequence[int],
  widths: Sequence[int],
  outputs: int,
  numerics: Numerics,
  stem: int = 3,
) -> Branch:
  def block(stage: int, i: int) -> Maker:
    inputs = widths[stage] if i == 0 else widths[stage + 1]
    stride = 2 if i == 0 and stage > 1 else 1
    return lambda rngs: layers.Block(
      inputs, widths[stage + 1], stride, numerics, rngs=rngs
    )

  large: Any = {"k": stem, "stride": 1 + (stem > 3), "pool": stem > 3}
  trunk: dict[str, Maker] = {
    "stem": lambda rngs: layers.ConvLayer(
      widths[0], widths[1], numerics, **large, rngs=rngs
    )
  }
  for stage, count in enumerate(counts, 1):
    for i in range(count):
      trunk[f"stage{stage}.block{i}"] = block(stage, i)
  return branch(name, trunk, widths[-1], outputs, numerics)
