"""Image sets: scikit-learn's digits, plain arrays, TFDS.

`load` gives pixels as stored, labels 0 to classes-1, and what
`mhil.augment.prepare` needs to turn the pixels into inputs. Batches are made
by `mhil.pipeline`.
"""

import difflib
import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mhil import sources

SAMPLED = 2048
# How many ids of many are told.
FEW = 8


class Dataset(NamedTuple):
  """Images with labels, and the set's own normalisation and augmentation.

  `load(stream=True)` puts objects in place of the image arrays which decode
  when indexed and otherwise behave alike: shape, dtype, len, rows.
  """

  name: str
  train_images: np.ndarray  # [n, height, width, channels], uint8 or float32
  train_labels: np.ndarray  # [n] int32, 0 to classes - 1
  test_images: np.ndarray
  test_labels: np.ndarray
  classes: int
  scale: float  # pixels are divided by this
  mean: tuple[float, ...]  # per channel, of the scaled pixels
  std: tuple[float, ...]
  pad: int  # reflect so many pixels and crop at random; 0 is none
  flip: bool


def load(
  name: str,
  *,
  folder: str | None = None,
  image: str = "image",
  label: str = "label",
  limit: int | None = None,
  whole_test: bool = False,
  augment: bool = True,
  stream: bool = False,
) -> Dataset:
  """Returns a set of images.

  Args:
    name: `digits`, `arrays:FOLDER` or `tfds:NAME` with NAME as TFDS spells
      it, `cifar100` or `emnist/letters:3.1.0`. FOLDER holds
      train_images.npy, train_labels.npy, test_images.npy, test_labels.npy
      and, if wanted, meta.json with any of scale, mean, std, pad, flip.
      Images are `[n, height, width, channels]`, `[n, height, width]` or
      `[n, d]`; the last become 1x1 images of d channels. They are mapped,
      not read, so they may exceed the memory.
    folder: where TFDS keeps its sets; its own default if None.
    image: the images' feature in a TFDS set.
    label: the labels' feature in a TFDS set.
    limit: keep the first so many images of each class in each split.
    whole_test: in the training split only.
    augment: crop and flip as the set's settings say; False sets both to none.
    stream: leave a TFDS set on disk and decode images when indexed.

  Raises:
    ValueError: if there is no such set, or if it is damaged or unusable.
  """
  if limit is not None and limit < 1:
    raise ValueError(f"limit={limit} leaves no image; use 1 or more, or None")
  form, _, rest = name.partition(":")
  if name == "digits":
    parts, settings = sources.digits()
  elif form == "arrays" and rest:
    parts, settings = sources.arrays(rest)
  elif form == "tfds" and rest:
    parts, settings = sources.tfds(rest, folder, image, label)
  else:
    raise ValueError(_unknown(name))
  limits = limit, None if whole_test else limit
  splits = [
    _split(name, split, *part, most, stream)
    for split, part, most in zip(("train", "test"), parts, limits)
  ]
  if not augment:
    settings = {**settings, "pad": 0, "flip": False}
  return _dataset(name, splits[0], splits[1], settings)


def fingerprint(dataset: Dataset) -> str:
  """Returns the SHA-256 of images and labels: the same data, the same text.

  Of a large streamed split 2,048 images stand for all: to decode each of a
  million would take longer than to begin.
  """
  digest = hashlib.sha256()
  for field in ("train_images", "train_labels", "test_images", "test_labels"):
    array = getattr(dataset, field)
    digest.update(f"{field} {array.dtype.name} {array.shape}".encode())
    for part in _parts(_sample(array)):
      digest.update(part.astype(part.dtype.newbyteorder("<")).tobytes())
  return digest.hexdigest()


def _split(
  name: str,
  split: str,
  images: Any,
  labels: Any,
  limit: int | None,
  stream: bool,
) -> tuple[Any, np.ndarray]:
  field = f"data.name={name!r}: {split}_images"
  if images.ndim not in (2, 3, 4) or 0 in images.shape[1:]:
    raise ValueError(
      f"{field} has shape {list(images.shape)}; save [n, height, width, "
      "channels], [n, height, width] or [n, d], none of them 0"
    )
  labels = _checked_labels(name, split, labels)
  if len(images) != len(labels):
    raise ValueError(
      f"{field} has {len(images)} rows, {split}_labels {len(labels)}; save "
      "one label an image"
    )
  rows: Any = slice(None)
  if limit is not None:
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    rows = np.sort(order[np.arange(len(order)) - first < limit])
    labels = labels[rows]
  if isinstance(images, sources.Column):
    images = images.select(rows)
    images = images if stream else images[:]
  else:
    images = images[rows]
  return _checked_images(field, images), labels


def _checked_labels(name: str, split: str, labels: np.ndarray) -> np.ndarray:
  field = f"data.name={name!r}: {split}_labels"
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f"{field} is {labels.dtype}{list(labels.shape)}; save one integer an "
      "image"
    )
  if not len(labels):
    raise ValueError(f"{field} is empty; save at least one image a class")
  bad = (labels < 0) | (labels >= 2**31)
  if bad.any():
    raise ValueError(
      f"{field} holds {labels.min()} to {labels.max()}, the first that is no "
      f"class in row {bad.argmax()}; number the classes from 0"
    )
  return np.asarray(labels, np.int32)


def _checked_images(field: str, images: Any) -> Any:
  if images.dtype not in (np.uint8, np.float32):
    raise ValueError(f"{field} is {images.dtype}; save uint8 or float32")
  if images.ndim == 3:
    images = images[..., None]
  elif images.ndim == 2:
    images = images[:, None, None]
  if images.dtype == np.float32:
    for start, part in zip(_starts(images), _parts(images)):
      bad = ~np.isfinite(part).all((1, 2, 3))
      if bad.any():
        raise ValueError(
          f"{field} holds NaN or infinity, first in image "
          f"{start + int(bad.argmax())}; repair or drop such images"
        )
  return images


def _dataset(
  name: str, train: tuple, test: tuple, settings: dict[str, Any]
) -> Dataset:
  shapes = [tuple(images.shape[1:]) for images, _ in (train, test)]
  dtypes = [images.dtype for images, _ in (train, test)]
  if shapes[0] != shapes[1] or dtypes[0] != dtypes[1]:
    raise ValueError(
      f"data.name={name!r}: train_images are {dtypes[0]}{list(shapes[0])}, "
      f"test_images {dtypes[1]}{list(shapes[1])}; save both alike"
    )
  classes = _classes(name, train[1], test[1])
  scale = settings.get("scale", 255.0 if dtypes[0] == np.uint8 else 1.0)
  mean, std = settings.get("mean"), settings.get("std")
  if mean is None or std is None:
    mean, std = _moments(train[0], scale)
  augmentation = settings.get("pad", 0), settings.get("flip", False)
  dataset = Dataset(
    name,
    train[0],
    train[1],
    test[0],
    test[1],
    classes,
    float(scale),
    mean,
    std,
    *augmentation,
  )
  _check_settings(dataset)
  return dataset


def _classes(name: str, train: np.ndarray, test: np.ndarray) -> int:
  present = np.unique(train)
  classes = int(present[-1]) + 1
  if len(present) < classes:
    # A damaged label may be huge, and of so many ids a few are told.
    ids = np.arange(min(classes, len(present) + FEW))
    missing = _few(np.setdiff1d(ids, present), classes - len(present))
    raise ValueError(
      f"data.name={name!r}: train_labels lack {missing} of the ids 0 to "
      f"{classes - 1}; renumber the classes without holes"
    )
  extra = np.setdiff1d(test, present)
  if len(extra):
    raise ValueError(
      f"data.name={name!r}: test_labels hold {_few(extra, len(extra))}, which "
      "train_labels lack; drop these test images or add training images"
    )
  return classes


def _check_settings(dataset: Dataset) -> None:
  channels = dataset.train_images.shape[-1]
  size = min(dataset.train_images.shape[1:3])
  head = f"data.name={dataset.name!r}:"
  if not len(dataset.mean) == len(dataset.std) == channels:
    raise ValueError(
      f"{head} mean={dataset.mean} and std={dataset.std} need one entry for "
      f"each of the {channels} channels"
    )
  if not 0 <= dataset.pad < size:
    raise ValueError(
      f"{head} pad={dataset.pad} does not fit images of {size} pixels; use 0 "
      f"to {size - 1}"
    )


def _moments(images: Any, scale: float) -> tuple[tuple, tuple]:
  # Streamed images are dear to decode, and whether a set is streamed must not
  # matter; a sample gives three digits.
  images = images[_spread(len(images))]
  count, total, square = 0, np.zeros(images.shape[-1]), np.zeros(1)
  for part in _parts(images):
    pixels = part.reshape(-1, part.shape[-1]).astype(np.float64) / scale
    count += len(pixels)
    total = total + pixels.sum(0)
    square = square + (pixels**2).sum(0)
  mean = total / count
  std = np.sqrt(np.maximum(square / count - mean**2, 0))
  # A channel that never changes carries nothing; it must not divide by 0.
  std = np.where(std > 1e-6, std, 1.0)
  return tuple(mean.tolist()), tuple(std.tolist())


def _sample(array: Any) -> Any:
  """At most `SAMPLED` of the rows, where to see them is to decode them."""
  streamed = isinstance(array, sources.Column)
  return array[_spread(len(array))] if streamed else array


def _spread(rows: int) -> np.ndarray:
  """Numbers of at most `SAMPLED` rows, evenly spread."""
  return np.linspace(0, rows - 1, min(rows, SAMPLED)).astype(int)


def _starts(images: Any) -> range:
  step = max(1, 2**22 // math.prod(images.shape[1:]))
  return range(0, len(images), step)


def _parts(array: Any) -> Iterator[np.ndarray]:
  starts = _starts(array)
  for start in starts:
    yield np.asarray(array[start : start + starts.step])


def _unknown(name: str) -> str:
  forms = {known: f"tfds:{known}" for known in sources.KNOWN}
  forms |= {"digits": "digits", "arrays": "arrays:FOLDER", "tfds": "tfds:NAME"}
  stem = name.removeprefix("tfds:").removesuffix(":")
  close = difflib.get_close_matches(stem.lower(), forms, n=1)
  hint = f"; did you mean {forms[close[0]]}?" if close else ""
  known = f"use digits, arrays:FOLDER or tfds:NAME{hint}"
  return f"data.name={name!r} is unknown; {known}"


def _few(ids: np.ndarray, count: int) -> str:
  text = ", ".join(str(i) for i in ids[:FEW].tolist())
  return text + (f" and {count - FEW} more" if count > FEW else "")
