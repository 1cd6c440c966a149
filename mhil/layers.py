"""Layers of the branches: convolution, dense, normalisation, pooling.

Parameters are float32, whatever dtype a layer computes in.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mhil.convolution import conv


def _draw(rngs: nnx.Rngs, std: float, *shape: int) -> Array:
  # Without the barrier XLA merges `std` with constants of its own, and the
  # last bit depends on whether the caller compiles.
  return std * lax.optimization_barrier(jax.random.normal(rngs.params(), shape))


class Conv(nnx.Module):
  """Square convolution, zero-padded to keep the size at stride 1.

  The kernel starts as N(0, 2 / (k k out)), the fan-out form of He's rule.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    k: int = 3,
    *,
    stride: int = 1,
    bias: bool = False,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    std = (2 / (k * k * outputs)) ** 0.5
    self.kernel = nnx.Param(_draw(rngs, std, k, k, inputs, outputs))
    self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
    self.stride, self.padding, self.dtype = stride, k // 2, dtype

  def __call__(self, x: Array) -> Array:
    """Maps images `[b, height, width, d]` to `[b, ..., f]` in `dtype`."""
    kernel = self.kernel[...].astype(self.dtype)
    x = conv(x.astype(self.dtype), kernel, self.stride, self.padding)
    return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class Dense(nnx.Module):
  """Affine map; the kernel starts as N(0, gain / inputs), the bias at 0."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    gain: float = 1.0,
    bias: bool = True,
    dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
  ):
    std = (gain / inputs) ** 0.5
    self.kernel = nnx.Param(_draw(rngs, std, inputs, outputs))
    self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
    self.dtype = dtype

  def __call__(self, x: Array) -> Array:
    """Maps `[b, d]` to `[b, f]` in `dtype`."""
    x = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
    return x if self.bias is None else x + self.bias[...].astype(self.dtype)


class BatchNorm(nnx.Module):
  """Batch normalisation over all axes but the last.

  In training, `(x - mean) / sqrt(var + 1e-5)` takes the biased variance of
  the batch, and the running statistics move by 0.1 towards the batch's mean
  and its *unbiased* variance. Statistics are float32 whatever `x` is. With
  `axis`, the batch is spread over that mesh axis (inside `shard_map`); without
  `affine`, nothing is learnt.
  """

  def __init__(
    self, features: int, *, axis: str | None = None, affine: bool = True
  ):
    self.scale: Any = nnx.Param(jnp.ones(features)) if affine else None
    self.bias: Any = nnx.Param(jnp.zeros(features)) if affine else None
    self.mean = nnx.BatchStat(jnp.zeros(features))
    self.var = nnx.BatchStat(jnp.ones(features))
    self.axis = axis

  def __call__(self, x: Array, train: bool) -> Array:
    """Normalises `[b, ..., f]`; with `train`, by the batch's statistics."""
    y = x.astype(jnp.float32)
    mean, var = self._batch(y) if train else (self.mean[...], self.var[...])
    factor = lax.rsqrt(var + 1e-5)
    if self.scale is None:
      return ((y - mean) * factor).astype(x.dtype)
    factor *= self.scale[...]
    return ((y - mean) * factor + self.bias[...]).astype(x.dtype)

  def _batch(self, x: Array) -> tuple[Array, Array]:
    reduced = tuple(range(x.ndim - 1))
    mean = self._across(x.mean(reduced))
    # Two passes: a mean of squares less a squared mean cancels in float32.
    var = self._across(jnp.square(x - mean).mean(reduced))
    n = x.size // x.shape[-1]
    if self.axis is not None:
      n *= lax.axis_size(self.axis)
    unbiased = var * (n / max(n - 1, 1))
    self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
    self.var[...] = 0.9 * self.var[...] + 0.1 * unbiased
    return mean, var

  def _across(self, x: Array) -> Array:
    return x if self.axis is None else lax.pmean(x, self.axis)


class GroupNorm(nnx.Module):
  """Normalisation within a sample, over pixels and groups of features.

  One group makes it layer normalisation. It has no running statistics, so
  training and evaluation agree.
  """

  def __init__(self, features: int, *, groups: int):
    self.scale = nnx.Param(jnp.ones(features))
    self.bias = nnx.Param(jnp.zeros(features))
    self.groups = groups

  def __call__(self, x: Array, train: bool) -> Array:
    """Normalises `[b, ..., f]`; `train` changes nothing."""
    y = x.astype(jnp.float32).reshape(
      x.shape[0], -1, self.groups, x.shape[-1] // self.groups
    )
    mean = y.mean((1, 3), keepdims=True)
    var = jnp.square(y - mean).mean((1, 3), keepdims=True)
    y = ((y - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape)
    return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Identity(nnx.Module):
  """Stands where a network has no normalisation."""

  def __call__(self, x: Array, train: bool) -> Array:
    """Returns `x`."""
    return x


class Numerics(NamedTuple):
  """What the layers of a branch share.

  Attributes:
    norm: `batch`, `group` (up to 8 groups, as many as divide the features),
      `layer` or `none`.
    dtype: in which layers compute and hand on; parameters, statistics and
      logits are float32.
    axis: mesh axis over which batch norm shares its statistics in training,
      or None; needs `shard_map`.
  """

  norm: str
  dtype: Any = jnp.float32
  axis: str | None = None


def make_norm(
  features: int, numerics: Numerics
) -> BatchNorm | GroupNorm | Identity:
  """Builds the normalisation that `numerics` asks for."""
  if numerics.norm == "batch":
    return BatchNorm(features, axis=numerics.axis)
  if numerics.norm == "group":
    groups = next(g for g in range(8, 0, -1) if features % g == 0)
    return GroupNorm(features, groups=groups)
  if numerics.norm == "layer":
    return GroupNorm(features, groups=1)
  if numerics.norm == "none":
    return Identity()
  raise ValueError(
    f"norm={numerics.norm!r} is unknown; use batch, group, layer or none"
  )


def max_pool(
  x: Float[Array, "b height width f"],
) -> Float[Array, "b half_height half_width f"]:
  """Takes the largest of every 2x2 pixels; an odd last row or column falls.

  By reshaping, because the gradient of XLA's windowed maximum is a scatter.
  """
  b, height, width, f = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  return x.reshape(b, height // 2, 2, width // 2, 2, f).max((2, 4))


def global_mean(x: Array) -> Float[Array, "b f"]:
  """Averages feature maps over their pixels in float32; keeps `[b, f]`."""
  x = x.astype(jnp.float32)
  return x if x.ndim == 2 else x.mean((1, 2))


class Readout(nnx.Module):
  """Averages over pixels, maps to logits in float32; `norm` is for its bias."""

  def __init__(
    self, inputs: int, outputs: int, norm: Any = None, *, rngs: nnx.Rngs
  ):
    self.dense = Dense(inputs, outputs, bias=norm is None, rngs=rngs)
    self.norm = norm

  def __call__(self, x: Array, train: bool) -> Float[Array, "b c"]:
    """Maps features `[b, f]` or a feature map to logits."""
    x = self.dense(global_mean(x))
    return self.norm(x, train) if self.norm else x


class DenseLayer(nnx.Module):
  """Flattens; dense, normalisation, ReLU. A bias where nothing normalises."""

  def __init__(
    self, inputs: int, outputs: int, numerics: Numerics, *, rngs: nnx.Rngs
  ):
    make = partial(Dense, gain=2.0, dtype=numerics.dtype, rngs=rngs)
    self.dense = make(inputs, outputs, bias=numerics.norm == "none")
    self.norm = make_norm(outputs, numerics)

  def __call__(self, x: Array, train: bool) -> Float[Array, "b f"]:
    """Maps `[b, ...]` to `[b, f]`."""
    return nnx.relu(self.norm(self.dense(x.reshape(x.shape[0], -1)), train))


class ConvLayer(nnx.Module):
  """Convolution, normalisation, then ReLU and 2x2 maxima as asked."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    numerics: Numerics,
    *,
    k: int = 3,
    stride: int = 1,
    bias: bool = False,
    relu: bool = True,
    pool: bool = False,
    rngs: nnx.Rngs,
  ):
    make = partial(Conv, bias=bias, dtype=numerics.dtype, rngs=rngs)
    self.conv = make(inputs, outputs, k, stride=stride)
    self.norm = make_norm(outputs, numerics)
    self.relu, self.pool = relu, pool

  def __call__(self, x: Array, train: bool) -> Array:
    """Maps images `[b, height, width, d]` to `[b, ..., f]`."""
    x = self.norm(self.conv(x), train)
    x = nnx.relu(x) if self.relu else x
    return max_pool(x) if self.pool else x


class Block(nnx.Module):
  """Residual block of two 3x3 convolutions, with a ReLU after the sum.

  Where it changes the shape, a 1x1 convolution is on its shortcut.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    stride: int,
    numerics: Numerics,
    *,
    rngs: nnx.Rngs,
  ):
    make = partial(Conv, dtype=numerics.dtype, rngs=rngs)
    self.conv1 = make(inputs, outputs, stride=stride)
    self.norm1 = make_norm(outputs, numerics)
    self.conv2 = make(outputs, outputs)
    self.norm2 = make_norm(outputs, numerics)
    changes = stride != 1 or inputs != outputs
    self.downsample = (
      ConvLayer(
        inputs, outputs, numerics, k=1, stride=stride, relu=False, rngs=rngs
      )
      if changes
      else None
    )

  def __call__(self, x: Array, train: bool) -> Array:
    """Maps `[b, height, width, d]` to `[b, height / stride, ..., f]`."""
    y = nnx.relu(self.norm1(self.conv1(x), train))
    y = self.norm2(self.conv2(y), train)
    shortcut = x if self.downsample is None else self.downsample(x, train)
    return nnx.relu(y + shortcut)
