"""Pixels to network inputs on the device: normalise, crop, flip.

    x = (pixels / scale - mean) / std

The draw for an image depends on the key and on the image's position in the
global batch, and on nothing else. So a batch cut over any number of devices
is augmented alike, and a resumed run sees the same images again.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

Pixels = Num[Array, "b height width channels"]


def prepare(
  images: Pixels,
  key: Key[Array, ""] | None = None,
  positions: Int[Array, "b"] | None = None,
  *,
  scale: float,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  pad: int = 0,
  flip: bool = False,
  train: bool,
) -> Float[Array, "b height width channels"]:
  """Returns the inputs of a network, augmented if `train`.

  Args:
    images: `[b, height, width, channels]`, uint8 or float32.
    key: this step's key, the same on every device.
    positions: `[b]`, where each image stands in the global batch.
    scale: pixels are divided by it.
    mean: per channel, of the scaled pixels.
    std: per channel, of the scaled pixels.
    pad: crop at random out of the image reflected by so many pixels.
    flip: mirror left and right with probability one half.
    train: whether to crop and flip at all.

  Raises:
    ValueError: if an argument does not fit the images or is missing.
  """
  if train and (pad or flip):
    if key is None or positions is None:
      raise ValueError(
        "key and positions are needed to augment; pass both or train=False"
      )
    images = _crop_and_flip(images, key, positions, pad, flip)
  return normalise(images, scale=scale, mean=mean, std=std)


def normalise(
  images: Pixels,
  *,
  scale: float,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> Float[Array, "b height width channels"]:
  """Returns `(images / scale - mean) / std` in float32.

  The 256 values of uint8 pixels are looked up: XLA would multiply with the
  reciprocals and round differently from program to program.
  """
  channels = images.shape[-1]
  if not len(mean) == len(std) == channels:
    raise ValueError(
      f"mean and std have {len(mean)} and {len(std)} entries, the images "
      f"{channels} channels; give one entry a channel"
    )
  shift, spread = (np.asarray(each, np.float32) for each in (mean, std))
  if images.dtype == jnp.uint8:
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(scale)
    table = jnp.asarray((values - shift) / spread)
    # Indices of rank four, so that rank promotion may be an error.
    channel = jnp.arange(channels)[None, None, None]
    # The table lies on every device, the result as the images do.
    return table.at[images.astype(jnp.int32), channel].get(
      out_sharding=jax.typeof(images).sharding
    )
  shift, spread = shift[None, None, None], spread[None, None, None]
  return (images.astype(jnp.float32) / scale - shift) / spread


def _crop_and_flip(
  images: Pixels,
  key: Key[Array, ""],
  positions: Int[Array, "b"],
  pad: int,
  flip: bool,
) -> Pixels:
  _, height, width, _ = images.shape
  if pad < 0 or pad >= min(height, width):
    raise ValueError(
      f"pad={pad} does not fit images of {height}x{width}; use 0 to "
      f"{min(height, width) - 1}"
    )
  bits = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (3,)))(
    positions
  )
  # The modulo's bias is (2 pad + 1) / 2^32.
  shifts = (bits % jnp.uint32(2 * pad + 1)).astype(jnp.int32) - pad
  rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
  if flip:
    mirrored = (bits[:, 2] >> 31).astype(bool)[:, None]
    columns = jnp.where(mirrored, width - 1 - columns, columns)
  rows = _reflect(shifts[:, 0, None] + rows, height)
  columns = _reflect(shifts[:, 1, None] + columns, width)
  # One gather: the padded images are never made.
  return jax.vmap(lambda image, y, x: image[y[:, None], x[None, :]])(
    images, rows, columns
  )


def _reflect(index: Int[Array, "b n"], size: int) -> Int[Array, "b n"]:
  return size - 1 - jnp.abs(size - 1 - jnp.abs(index))
