"""The training step of a run, to be compiled.

Data that fit live on the devices as they are stored (uint8), and a step
gathers its own samples; streamed data arrive batch by batch. A step augments
and normalises. Nothing else goes to or comes from the host in a step, and
nothing about a task is static, so it compiles once for a whole stream.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from mhil import augment, heads, losses, objectives, partitions, transforms
from mhil import bank as bank_lib
from mhil import data as data_lib

P = jax.P
# Average counts of classes are whole numbers of this fraction of a sample, so
# that their sums are exact; a batch may hold 32,768 samples.
UNIT = 2**16


class State(NamedTuple):
  """All arrays that a checkpoint needs.

  Attributes:
    step: `[]` global step, over all tasks.
    bank: the heads.
    memory: what the batch transform remembers.
  """

  step: Any
  bank: Any
  memory: Any


class Samples(NamedTuple):
  """A data set on the devices, whole on each of them.

  Attributes:
    images: `[n, ...]` as stored; of a streamed set, those of one batch
      `[b, ...]`, cut over `data`.
    labels: `[n]` classes.
    owners: `[classes]` head of each class; in tests, task.
    columns: `[classes]` place of each class in it.
    key: the run's root key.
  """

  images: Any
  labels: Any
  owners: Any
  columns: Any
  key: Any


class Epoch(NamedTuple):
  """The batches of one pass.

  Attributes:
    order: `[steps, w b]` row numbers of all workers' samples, whole on each;
      `~row` for a row of weight zero.
    first_step: `[]` global step of row 0.
  """

  order: Any
  first_step: Any


def pixels(dataset: data_lib.Dataset) -> dict[str, Any]:
  """The set's own normalisation and augmentation, for `augment.prepare`."""
  names = "scale", "mean", "std", "pad", "flip"
  return {name: getattr(dataset, name) for name in names}


def train_step(
  mesh: Mesh | AbstractMesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
  optimizer: optax.GradientTransformation,
  rate: Callable[..., jax.Array],
  train_heads: str,
  transform: transforms.Transform,
  correction: bool = True,
  streamed: bool = False,
  partition: partitions.Partition = partitions.NONE,
) -> Callable[..., State]:
  """`(state, epoch, task, samples) -> state`; to be jitted.

  With `streamed`, the images of `samples` are this step's batch.
  """

  spec = state_spec(transform, partition)
  layout = partition.layout
  how = correction, streamed, layout
  begin = beginning(dataset, loss, transform, *how)

  def local(state, epoch, task, samples):
    memory, prior, batch, key = begin(
      state.step, state.memory, epoch, task, samples
    )
    bank = heads.update(
      layout.enter(partitions.bank_of(state.bank)),
      task,
      prior,
      batch,
      state.step,
      key,
      objective=objective,
      loss=loss,
      optimizer=optimizer,
      rate=rate,
      train_heads=train_heads,
      joint=layout.joint,
    )
    bank = partitions.with_bank(state.bank, layout.leave(bank))
    return State(state.step + 1, bank, memory)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      spec,
      Epoch(P(), P()),
      bank_lib.TASK_SPEC,
      samples_spec(streamed),
    ),
    out_specs=spec,
  )


def beginning(
  dataset: data_lib.Dataset,
  loss: losses.Loss,
  transform: transforms.Transform,
  correction: bool,
  streamed: bool,
  layout: bank_lib.Layout = bank_lib.WHOLE,
) -> Callable[..., tuple[Any, jax.Array, objectives.Batch, jax.Array]]:
  """What comes before the heads in a step; runs in `shard_map`.

  Returns:
    `(step, memory, epoch, task, samples) -> (memory, prior [l, c+1], batch,
    key)`, the batch and the key as `heads.update` takes them.
  """

  def begin(step, memory, epoch, task, samples):
    images_key, heads_key, memory_key = keys(samples.key, step)
    counts = task.counts + transform.expected(memory)
    batch, everyone = take(step, epoch, task, samples, streamed)
    memory, batch = transform.apply(memory, batch, everyone, memory_key)
    prior = priors(counts, task, samples, loss, correction)
    batch = share(batch, layout)
    over = layout.samples
    given = inputs_of(batch, samples, images_key, dataset, over)
    return memory, prior, given, heads_key

  return begin


def keys(root: jax.Array, step: Any) -> jax.Array:
  """A step's keys `[3]`: of augmentation, of heads, of the memory."""
  return jax.random.split(jax.random.fold_in(root, step), 3)


def take(
  step: jax.Array,
  epoch: Epoch,
  task: bank_lib.Task,
  samples: Samples,
  streamed: bool,
) -> tuple[transforms.Batch, transforms.Everyone]:
  """This device's samples of a step; runs in `shard_map`."""
  order = epoch.order[step - epoch.first_step]
  order = order.reshape(lax.axis_size("data"), -1)
  everyone = known(order, samples.labels, task.balanced)
  number, label = everyone.number, everyone.label
  me = lax.axis_index("data")
  batch = transforms.Batch(
    samples.images if streamed else samples.images[number[me]],
    label[me],
    me * order.shape[1] + jnp.arange(order.shape[1]),
    (order[me] >= 0).astype(jnp.float32),
    number[me],
  )
  return batch, everyone


def known(order: Any, labels: Any, balanced: Any) -> transforms.Everyone:
  """What all workers know of a step's samples; of numpy or jax arrays.

  Args:
    order: `[w, b]` of the epoch; see `Epoch`.
    labels: `[n]` of the set.
    balanced: whether no sample is new, as in a balanced pass.
  """
  number = order ^ (order >> 31)  # ~order where it is negative.
  return transforms.Everyone(labels[number], number, (order >= 0) & ~balanced)


def share(batch: transforms.Batch, layout: bank_lib.Layout) -> transforms.Batch:
  """The samples of the part that this device trains: every n-th."""
  if "subnet" not in layout.axes:
    return batch
  n, me = lax.axis_size("subnet"), lax.axis_index("subnet")
  return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:])[:, me], batch)


def inputs_of(
  batch: transforms.Batch,
  samples: Samples,
  key: jax.Array,
  dataset: data_lib.Dataset,
  axes: tuple[str, ...] = ("data",),
) -> objectives.Batch:
  """What the heads see: augmented; weights sum to one over these axes."""
  images = augment.prepare(
    batch.rows, key, batch.position, **pixels(dataset), train=True
  )
  # The last batch of a pass may leave a part without any.
  total = jnp.maximum(lax.psum(jnp.sum(batch.weight), axes), 1.0)
  owners, columns = samples.owners[batch.label], samples.columns[batch.label]
  weight = batch.weight / total
  return objectives.Batch(images, owners, columns, weight, batch.number)


def priors(
  counts: jax.Array,
  task: bank_lib.Task,
  samples: Samples,
  loss: losses.Loss,
  correction: bool,
) -> jax.Array:
  """The loss's prior correction `[l, c+1]` of this device's heads.

  Args:
    counts: `[classes]` samples of each class in this step, on average.
    task, samples: the running task, and where classes are.
    loss: whose correction.
    correction: False for none.
  """
  l, _, c = task.valid.shape
  if not correction:
    return jnp.zeros((l, c + 1))
  whole = jnp.round(counts * UNIT).astype(jnp.int32)
  own, rest = loss.prior(whole, samples.owners, task.opened)
  # The row of each class's head, beyond the last if it is not on this device.
  heads_here = task.heads[:, 0]
  row = jnp.searchsorted(heads_here, samples.owners)
  here = heads_here[jnp.minimum(row, l - 1)] == samples.owners
  row = jnp.where(here, row, l)
  table = jnp.zeros((l, c + 1))
  table = table.at[row, samples.columns].set(own, mode="drop")
  return table.at[row, c].set(rest, mode="drop")


def samples_spec(streamed: bool) -> Samples:
  """How the samples of a step lie on the mesh."""
  return Samples(P("data") if streamed else P(), P(), P(), P(), P())


def state_spec(
  transform: transforms.Transform,
  partition: partitions.Partition = partitions.NONE,
) -> State:
  """How the state lies on the mesh."""
  return State(P(), partitions.spec(partition), transform.spec)
