"""Which image is in which batch, and batches of sets too large for memory.

The order is a function of (seed, task, epoch) alone. A set that fits lives on
the devices, and the step gathers its rows; one that does not is read by
`StreamedBatches`. Both go by `epoch_order`, hence see the same batches, and
both resume from a step number with nothing else stored.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def steps_per_epoch(rows: int, batch: int) -> int:
  """Returns the number of batches that hold `rows` images."""
  if batch < 1:
    raise ValueError(f"batch={batch} holds no image; use 1 or more")
  if rows < 1:
    raise ValueError("rows is empty: a task needs at least one image")
  return -(-rows // batch)


def epoch_order(
  rows: Int[np.ndarray, "n"],
  *,
  seed: int,
  task: int,
  epoch: int,
  batch: int,
) -> Int[np.ndarray, "steps batch"]:
  """Returns the shuffled rows of one epoch, a row of the result a batch.

  Args:
    rows: `[n]`, the images of the task.
    seed: the run's seed, 0 to 2^64 - 1.
    task: index of the task, 0 to 2^32 - 1.
    epoch: index of the epoch in its task, 0 to 2^32 - 1.
    batch: images in a batch.

  Returns:
    int32 `[ceil(n / batch), batch]`; the last batch is filled up with -1,
    which stands for weight zero.
  """
  steps = steps_per_epoch(len(rows), batch)
  bounds = {"seed": (seed, 64), "task": (task, 32), "epoch": (epoch, 32)}
  for name, (value, bits) in bounds.items():
    if not 0 <= value < 2**bits:
      raise ValueError(f"{name}={value} is outside 0 to 2^{bits} - 1")
  key = np.array([seed, task << 32 | epoch], np.uint64)
  # Numpy promises the raw stream of Philox for ever, a permutation's not.
  draws = np.random.Philox(key=key).random_raw(len(rows))
  order = np.full(steps * batch, -1, np.int32)
  order[: len(rows)] = rows[np.argsort(draws, kind="stable")]
  return order.reshape(steps, batch)


class StreamedBatches:
  """The batches of one task, read from a source while the devices compute.

  `batches[step]` reads one batch, `batches.iterate(start)` all from a step
  on, ahead of their use and on threads. A batch is `(images, labels, index)`:
  `[batch, ...]` as stored, int32 `[batch]` and int32 `[batch]`, where index
  -1 marks padding, whose image and label are those of row 0.
  """

  def __init__(
    self,
    images: Any,
    labels: Int[np.ndarray, "n"],
    rows: Int[np.ndarray, "m"],
    *,
    seed: int,
    task: int,
    batch: int,
    epochs: int,
    image_key: str = "image",
    columns: slice = slice(None),
  ):
    """Prepares the order; reads nothing.

    Args:
      images: the source: an array, a memory map, or any object with
        `__len__` and `__getitem__` whose items are images or dictionaries
        of features (a TFDS data source).
      labels: `[n]`, of every image in the source.
      rows: the images of the task.
      seed: as for `epoch_order`.
      task: as for `epoch_order`.
      batch: images in a global batch.
      epochs: how often the task's images are seen.
      image_key: name of the image among the features.
      columns: the part of each batch that this process feeds.
    """
    if len(images) != len(labels):
      raise ValueError(
        f"images has {len(images)} rows, labels {len(labels)}; one label an "
        "image is needed"
      )
    if epochs < 1:
      raise ValueError(f"epochs={epochs} trains nothing; use 1 or more")
    self._images, self._labels, self._key = images, labels, image_key
    self._columns, self._epochs = columns, epochs
    self._steps = steps_per_epoch(len(rows), batch)
    # Two epochs, since reading ahead crosses the border between them.
    self._order = functools.lru_cache(maxsize=2)(
      lambda epoch: epoch_order(
        rows, seed=seed, task=task, epoch=epoch, batch=batch
      )
    )

  def __len__(self) -> int:
    """Returns the steps of the task."""
    return self._steps * self._epochs

  def __getitem__(self, step: int) -> Batch:
    """Returns the batch of a step, counted from the start of the task."""
    if not 0 <= step < len(self):
      raise IndexError(f"step={step} is outside 0 to {len(self) - 1}")
    epoch, inner = divmod(step, self._steps)
    index = self._order(epoch)[inner, self._columns]
    rows = np.maximum(index, 0)
    return self._read(rows), self._labels[rows].astype(np.int32), index

  def iterate(
    self, start: int = 0, *, threads: int = 4, ahead: int = 8
  ) -> Iterator[Batch]:
    """Yields the batches from step `start` on, at most `ahead` of them early.

    Raises:
      ValueError: if `start` lies past the last step.
    """
    if not 0 <= start <= len(self):
      raise ValueError(
        f"start={start} is outside the task's {len(self)} steps; the first "
        "step of a task is 0"
      )
    return self._iterate(start, threads, ahead)

  def _iterate(self, start: int, threads: int, ahead: int) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    # An element is a whole batch: a Python call per image would be dearer
    # than its decoding.
    steps = grain.MapDataset.range(start, len(self)).map(self.__getitem__)
    batches = iter(steps.to_iter_dataset(options))
    try:
      yield from batches
    finally:
      batches.close()

  def _read(self, rows: np.ndarray) -> np.ndarray:
    if hasattr(self._images, "shape"):
      return np.asarray(self._images[rows])
    if hasattr(self._images, "__getitems__"):
      items = self._images.__getitems__(rows.tolist())
    else:
      items = [self._images[row] for row in rows.tolist()]
    return np.stack([_image(item, self._key) for item in items])


def _image(item: Any, key: str) -> np.ndarray:
  return np.asarray(item[key] if isinstance(item, Mapping) else item)
