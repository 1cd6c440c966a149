"""What a step works with: images on the devices, or images read in time."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mhil import across, pipeline, plan, programs, sharding, streams
from mhil import bank as bank_lib
from mhil import data as data_lib
from mhil import run as run_lib
from mhil.recipe import Recipe

P = jax.P
Given = tuple[programs.Epoch, programs.Samples]


class Feed(NamedTuple):
  """A phase with what it found in the memory.

  Attributes:
    phase: which.
    held: rows in the memory, of a balanced phase.
    task: its tables, on the devices.
  """

  phase: plan.Phase
  held: np.ndarray
  task: bank_lib.Task


def order_of(run: run_lib.Run, feed: Feed, epoch: int) -> np.ndarray:
  """The batches of one pass over a phase, as `plan.epoch` writes them."""
  return plan.epoch(
    feed.phase,
    run.stream,
    run.dataset.train_labels,
    run.recipe,
    feed.held,
    run.seed,
    epoch,
  )


def batches(run: run_lib.Run, feed: Feed, epoch: int) -> programs.Epoch:
  """The same on the devices."""
  order = order_of(run, feed, epoch)
  first = feed.phase.steps.start + epoch * len(order)
  # One shape for all phases, so that nothing compiles twice.
  longest = max(phase.per_epoch for phase in run.phases)
  padding = [(0, longest - len(order)), (0, 0)]
  order = np.pad(order, padding, constant_values=-1)
  return programs.Epoch(
    sharding.replicated(order, run.mesh),
    run_lib.scalar(first, run.mesh),
  )


def steps(run: run_lib.Run, feed: Feed, first: int) -> Iterator[Given]:
  """Yields the arguments of each step of a phase, from global step `first`.

  A streamed set is read ahead on threads, and its images are on their way to
  the devices when they are yielded.
  """
  phase, source = feed.phase, run.dataset.train_images
  order = functools.lru_cache(2)(functools.partial(order_of, run, feed))

  # Of several processes each reads what its own devices get.
  size, where = run.recipe.batch, jax.NamedSharding(run.mesh, P("data"))
  here = across.rows_here(size, where)

  def place_of(step: int) -> tuple[int, int]:
    return divmod(step - phase.steps.start, phase.per_epoch)

  def read(step: int) -> np.ndarray:
    epoch, i = place_of(step)
    return np.asarray(source[plan.rows(order(epoch)[i])[here]])

  todo = range(first, phase.steps.stop)
  images = pipeline.ahead(read, todo) if run.recipe.streamed else None
  epoch_batches = None
  for step in todo:
    epoch, i = place_of(step)
    if i == 0 or epoch_batches is None:
      epoch_batches = batches(run, feed, epoch)
    samples = run.train_set
    if images is not None:
      batch = across.put_rows(next(images), size, where)
      samples = samples._replace(images=batch)
    yield epoch_batches, samples


def tests(
  run: run_lib.Run, seen: int
) -> Iterator[tuple[programs.Samples, int]]:
  """Yields parts of the test set and how many of their samples count.

  Args:
    run: whose test set.
    seen: samples of the open heads' classes; they come first.
  """
  if not run.recipe.streamed:
    yield run.test_set, seen
    return
  order = by_task(run.stream, run.dataset)[:seen]
  size = run.recipe.test_batch
  todo = range(-(-seen // size))
  images, labels = run.dataset.test_images, run.dataset.test_labels

  def read(i: int) -> tuple[np.ndarray, np.ndarray]:
    # In turn, as `scoring.evaluate` deals them, and one shape for all, so that
    # nothing compiles twice.
    part = np.resize(order[i :: len(todo)], size)
    return np.asarray(images[part]), labels[part]

  for i, part in zip(todo, pipeline.ahead(read, todo)):
    samples = on_devices(*part, run.stream.by_task, run.seed, run.mesh)
    yield samples, len(order[i :: len(todo)])


def test_batch(mesh: Mesh, recipe: Recipe) -> int:
  """Samples of an evaluation step; a multiple of the `data` axis."""
  data = mesh.shape["data"]
  return -(-recipe.test_batch // data) * data


def resident(
  stream: streams.Stream,
  dataset: data_lib.Dataset,
  recipe: Recipe,
  seed: int,
  mesh: Mesh,
) -> tuple[programs.Samples, programs.Samples]:
  """The training and the test samples that stay on the devices.

  Of a streamed set these are the labels alone.
  """
  order = by_task(stream, dataset)
  train = test = None
  if not recipe.streamed:
    train, test = dataset.train_images, dataset.test_images[order]
  place = functools.partial(on_devices, seed=seed, mesh=mesh)
  return (
    place(train, dataset.train_labels, stream),
    place(test, dataset.test_labels[order], stream.by_task),
  )


def by_task(stream: streams.Stream, dataset: data_lib.Dataset) -> np.ndarray:
  """Test rows by task, so that unseen ones come last, and then by class."""
  labels = dataset.test_labels
  return np.lexsort((labels, stream.by_task.head_of[labels]))


def on_devices(
  images: Any, labels: np.ndarray, stream: streams.Stream, seed: int, mesh: Mesh
) -> programs.Samples:
  """Samples, whole on each device; `images` may be None."""
  samples = programs.Samples(
    images,
    labels.astype(np.int32),
    np.asarray(stream.head_of, np.int32),
    np.asarray(stream.column_of, np.int32),
    jax.random.key(seed),
  )
  return sharding.replicated(samples, mesh)


def shapes(run: run_lib.Run) -> tuple[programs.Samples, programs.Samples]:
  """Samples of a step and of a test: arrays, or shapes of what will come."""
  if not run.recipe.streamed:
    return run.train_set, run.test_set
  size = run.recipe.test_batch
  labels = np.resize(run.dataset.test_labels, size)
  test = on_devices(None, labels, run.stream.by_task, run.seed, run.mesh)
  return (
    run.train_set._replace(images=_shape(run, run.recipe.batch, P("data"))),
    test._replace(images=_shape(run, size, P())),
  )


def _shape(run: run_lib.Run, size: int, spec: P) -> jax.ShapeDtypeStruct:
  images = run.dataset.train_images
  shape = size, *images.shape[1:]
  where = jax.NamedSharding(run.mesh, spec)
  return jax.ShapeDtypeStruct(shape, images.dtype, sharding=where)
