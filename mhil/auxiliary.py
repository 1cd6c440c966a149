"""Small networks at the interfaces of local learning, and their losses.

Sizes and strides are those of the released code of ContSup (arXiv 2312.07636)
and InfoPro (ICLR 2021); for widths other than its 16, 32 and 64 they follow
the rule that those three share.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mhil import layers, objectives
from mhil.layers import Numerics

# `{n}c{m}f`: n convolutions, then m dense layers.
CLASSIFIERS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")
Shape = tuple[int, int, int]  # Height, width, features.
NARROW = 12  # Features between the two convolutions of an encoder or decoder.


class Classifier(nnx.Module):
  """Auxiliary classifier: convolutions, mean over pixels, dense layers.

  The first convolution doubles the features and halves the image, up to the
  branch's widest interface, where it keeps both.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    kind: str,
    widest: int,
    hidden: int,
    numerics: Numerics,
    *,
    rngs: nnx.Rngs,
  ):
    self.convolutions, self.dense = int(kind[0]), int(kind[2])
    stride, bias = (2 if inputs < widest else 1), numerics.norm == "none"
    wide = min(2 * inputs, widest)
    for i in range(self.convolutions):
      conv = layers.ConvLayer(
        inputs, wide, numerics, stride=stride, bias=bias, rngs=rngs
      )
      setattr(self, f"conv{i + 1}", conv)
      inputs, stride = wide, 1
    sizes = [inputs, *[hidden] * (self.dense - 1)]
    for i, (size, out) in enumerate(zip(sizes, [*sizes[1:], outputs])):
      gain = 2.0 if i < self.dense - 1 else 1.0
      dense = layers.Dense(size, out, gain=gain, rngs=rngs)
      setattr(self, f"dense{i + 1}", dense)

  def __call__(self, x: Array, train: bool) -> Float[Array, "b c"]:
    """Maps features `[b, ...]` to logits, the dense layers in float32."""
    for i in range(self.convolutions):
      x = getattr(self, f"conv{i + 1}")(x, train)
    x = layers.global_mean(x)
    for i in range(self.dense - 1):
      x = nnx.relu(getattr(self, f"dense{i + 1}")(x))
    return getattr(self, f"dense{self.dense}")(x)


class Encoder(nnx.Module):
  """Brings features (`k`=1) or an image (`k`=3) to an interface.

  One convolution, or a narrow one and another; then the mean over windows.
  """

  def __init__(
    self,
    inputs: int,
    shape: Shape,
    k: int,
    numerics: Numerics,
    *,
    rngs: nnx.Rngs,
  ):
    self.size = shape[:2]
    make = partial(layers.ConvLayer, numerics=numerics, bias=True, rngs=rngs)
    self.narrow = make(inputs, NARROW, k=k) if k > 1 else None
    self.conv = make(NARROW if k > 1 else inputs, shape[2], k=k)

  def __call__(self, x: Array, train: bool) -> Float[Array, "b height width f"]:
    """Maps `[b, ...]` to the interface's height, width and features."""
    x = x if self.narrow is None else self.narrow(x, train)
    return mean_pool(self.conv(x, train), self.size)


class Decoder(nnx.Module):
  """Guesses an image from features: up-sampling, two 3x3 convolutions."""

  def __init__(
    self, inputs: int, shape: Shape, numerics: Numerics, *, rngs: nnx.Rngs
  ):
    self.size = shape[:2]
    self.conv1 = layers.ConvLayer(
      inputs, NARROW, numerics, bias=True, rngs=rngs
    )
    self.conv2 = layers.Conv(
      NARROW, shape[2], bias=True, dtype=numerics.dtype, rngs=rngs
    )

  def __call__(self, x: Array, train: bool) -> Float[Array, "b height width d"]:
    """Maps a feature map to the logits of pixels in [0, 1]."""
    x = self.conv1(up_sample(x, self.size), train)
    return self.conv2(x).astype(jnp.float32)


def mean_pool(
  x: Float[Array, "b height width f"], size: tuple[int, int]
) -> Float[Array, "b new_height new_width f"]:
  """Averages over windows, so that an image of `size` is left.

  Windows are equal, and touch where `size` divides the image's. Where it does
  not, they overlap and every pixel is still in one.
  """
  b, height, width, f = x.shape
  if (height, width) == size:
    return x
  strides = height // size[0], width // size[1]
  if height % size[0] == 0 and width % size[1] == 0:
    parts = x.reshape(b, size[0], strides[0], size[1], strides[1], f)
    return parts.mean((2, 4))
  window = tuple(
    old - stride * (new - 1)
    for old, new, stride in zip((height, width), size, strides)
  )
  total = lax.reduce_window(
    x,
    jnp.zeros((), x.dtype),
    lax.add,
    (1, *window, 1),
    (1, *strides, 1),
    "VALID",
  )
  return total / (window[0] * window[1])


def up_sample(
  x: Float[Array, "b height width f"], size: tuple[int, int]
) -> Float[Array, "b new_height new_width f"]:
  """Interpolates between pixels, with the corners' pixels in the corners."""
  if x.shape[1:3] == size:
    return x
  rows, columns = (
    jnp.asarray(_hats(old, new), x.dtype)
    for old, new in zip(x.shape[1:3], size)
  )
  return jnp.einsum("bijf,hi,wj->bhwf", x, rows, columns)


def _hats(old: int, new: int) -> np.ndarray:
  at = np.linspace(0, old - 1, new)[:, None]
  return np.maximum(0, 1 - np.abs(at - np.arange(old)))


def contrast(
  features: Float[Array, "b f"],
  batch: objectives.Batch,
  axis: str | None,
  temperature: float = 0.07,
) -> Float[Array, " b"]:
  """Supervised contrast (Khosla et al. 2020), one view of each sample.

    z = features / |features|;  s_ij = z_i z_j / temperature
    l_i = -mean_{j != i, y_j = y_i} (s_ij - log sum_{k != i} exp s_ik)

  and 0 where no other sample has the class of i. Rows of weight 0 are padding
  and compare with nobody.

  Args:
    features: of this device's samples.
    batch: their classes and weights.
    axis: mesh axis over which the batch is spread, or None. Every sample is
      compared with the whole batch, which is gathered over it.
    temperature: of the softmax.
  """
  z = features * lax.rsqrt(
    jnp.maximum(jnp.sum(features**2, axis=1, keepdims=True), 1e-24)
  )
  own: Any = (z, batch.owners, batch.columns, batch.weight)
  first, everyone = jnp.zeros((), int), own
  if axis is not None:
    first = lax.axis_index(axis) * z.shape[0]
    everyone = jax.tree.map(
      lambda x: lax.all_gather(x, axis, tiled=True), everyone
    )
  others, owners, columns, weight = everyone
  # The temperature magnifies what a faster product would round away.
  s = jnp.matmul(z, others.T, precision="highest") / temperature
  rows = jnp.arange(z.shape[0]) + first
  counted = (weight > 0)[None] & (
    rows[:, None] != jnp.arange(len(others))[None]
  )
  alike = counted & (batch.owners[:, None] == owners[None])
  alike &= batch.columns[:, None] == columns[None]
  logp = s - jax.nn.logsumexp(jnp.where(counted, s, -1e30), 1, keepdims=True)
  total = jnp.sum(jnp.where(alike, logp, 0), axis=1)
  return -total / jnp.maximum(jnp.sum(alike, axis=1), 1)


def restoration(
  guess: Float[Array, "b height width d"],
  images: Float[Array, "b height width d"],
  pixels: tuple[Sequence[float], Sequence[float]],
) -> Float[Array, " b"]:
  """Binary cross-entropy of guessed pixels, mean over an image, in nats.

  Args:
    guess: logits.
    images: normalised; `images * std + mean` is in [0, 1].
    pixels: `(mean, std)` of each channel.
  """
  mean, std = (jnp.asarray(x)[None, None, None] for x in pixels)
  target = jnp.clip(images * std + mean, 0, 1)
  return (jax.nn.softplus(guess) - guess * target).mean((1, 2, 3))
