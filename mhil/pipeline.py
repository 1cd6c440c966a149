"""Which image is in which batch, and reading ahead of the devices.

The order is a function of (seed, task, epoch) alone. A set that fits lives on
the devices, and the step gathers its rows; one that does not is read `ahead`.
Both go by `epoch_order`, hence see the same batches, and both resume from a
step number with nothing else stored.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import grain
import numpy as np
from jaxtyping import Int

T = TypeVar("T")


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


def ahead(
  read: Callable[[int], T], steps: range, *, threads: int = 4, ready: int = 8
) -> Iterator[T]:
  """Yields `read(step)` of each step in order, read before it is asked for.

  Args:
    read: a function of the step alone, called on several threads.
    steps: which; a stream resumes by starting at another one.
    threads: that call `read`.
    ready: results that wait to be used, at most.
  """
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ready)
  # An element is a whole batch: a Python call per image would be dearer than
  # its decoding.
  whole = grain.MapDataset.range(steps.start, steps.stop, steps.step).map(read)
  results = iter(whole.to_iter_dataset(options))
  try:
    yield from results
  finally:
    results.close()
