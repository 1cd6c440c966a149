"""The compiled programs of a run: one training step, one evaluation.

Data that fit live on the devices as they are stored (uint8), and a step
gathers its own samples; streamed data arrive batch by batch. A step augments
and normalises. Nothing else goes to or comes from the host in a step, and
nothing about a task is static, so each program compiles once for a whole
stream.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from mhil import augment, heads, losses, metrics, objectives
from mhil import bank as bank_lib
from mhil import data as data_lib

P = jax.P


class State(NamedTuple):
  """All arrays that a checkpoint needs.

  Attributes:
    step: `[]` global step, over all tasks.
    bank: the heads.
  """

  step: Any
  bank: Any


class Samples(NamedTuple):
  """A data set on the devices, whole on each of them.

  Attributes:
    images: `[n, ...]` as stored; of a streamed set, those of one batch
      `[b, ...]`, cut over `data`.
    owners: `[n]` head of each sample's class.
    columns: `[n]` column of each sample's class in its head.
    key: the run's root key.
  """

  images: Any
  owners: Any
  columns: Any
  key: Any


class Epoch(NamedTuple):
  """The batches of one pass.

  Attributes:
    order: `[steps, b]` row numbers; `~row` for a row of weight zero.
    first_step: `[]` global step of row 0.
  """

  order: Any
  first_step: Any


EPOCH_SPEC = Epoch(P(None, "data"), P())
STATE_SPEC = State(P(), bank_lib.SPEC)


def pixels(dataset: data_lib.Dataset) -> dict[str, Any]:
  """The set's own normalisation and augmentation, for `augment.prepare`."""
  names = "scale", "mean", "std", "pad", "flip"
  return {name: getattr(dataset, name) for name in names}


def train_step(
  mesh: Mesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
  optimizer: optax.GradientTransformation,
  rate: Callable[..., jax.Array],
  train_heads: str,
  streamed: bool = False,
) -> Callable[..., State]:
  """`(state, epoch, task, samples) -> state`; to be jitted.

  With `streamed`, the images of `samples` are this step's batch.
  """

  def local(state, epoch, task, samples):
    key = jax.random.fold_in(samples.key, state.step)
    images_key, heads_key = jax.random.split(key)
    bank = heads.update(
      state.bank,
      task,
      draw(state.step, epoch, samples, images_key, dataset, streamed),
      state.step,
      heads_key,
      objective=objective,
      loss=loss,
      optimizer=optimizer,
      rate=rate,
      train_heads=train_heads,
    )
    return State(state.step + 1, bank)

  samples = samples_spec(streamed)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(STATE_SPEC, EPOCH_SPEC, bank_lib.TASK_SPEC, samples),
    out_specs=STATE_SPEC,
  )


def draw(
  step: jax.Array,
  epoch: Epoch,
  samples: Samples,
  key: jax.Array,
  dataset: data_lib.Dataset,
  streamed: bool,
) -> objectives.Batch:
  """This device's samples of a step, augmented; runs in `shard_map`."""
  rows = epoch.order[step - epoch.first_step]
  position = lax.axis_index("data") * rows.size + jnp.arange(rows.size)
  taken = jnp.where(rows < 0, ~rows, rows)
  images = samples.images if streamed else samples.images[taken]
  images = augment.prepare(images, key, position, **pixels(dataset), train=True)
  weight = (rows >= 0).astype(jnp.float32)
  weight = weight / lax.psum(jnp.sum(weight), "data")
  owners, columns = samples.owners[taken], samples.columns[taken]
  return objectives.Batch(images, owners, columns, weight)


def samples_spec(streamed: bool) -> Samples:
  """How the samples of a step lie on the mesh."""
  return Samples(P("data") if streamed else P(), P(), P(), P())


def class_scores(
  mesh: Mesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
) -> Callable[..., jax.Array]:
  """`(bank, task, images [b, ...]) -> scores [b, heads, c]`, on all devices.

  One all-gather over `head`. Closed heads and padding score
  `losses.MASKED`.
  """

  def local(bank, task, images):
    images = augment.prepare(images, **pixels(dataset), train=False)
    return heads.scores(bank, task, images, objective=objective, loss=loss)

  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(bank_lib.SPEC, bank_lib.TASK_SPEC, P("data")),
    out_specs=P("data", None, "head"),
  )

  def scores(bank, task, images):
    images = jax.reshard(images, NamedSharding(mesh, P("data")))
    out = jax.reshard(spread(bank, task, images), NamedSharding(mesh, P()))
    return out.reshape(out.shape[0], -1, out.shape[-1])

  return scores


def head_features(
  mesh: Mesh, dataset: data_lib.Dataset, objective: objectives.Objective
) -> Callable[..., jax.Array]:
  """`(bank, head, images [b, ...]) -> [h, b, f]`; row `head % h` counts."""

  def local(bank, head, images):
    images = augment.prepare(images, **pixels(dataset), train=False)
    return heads.features(bank, head, images, objective=objective)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(bank_lib.SPEC, P(), P()),
    out_specs=P("head"),
  )


def evaluate(
  scores: Callable[..., jax.Array], batch: int
) -> Callable[..., metrics.Tally]:
  """`(bank, task, samples, seen) -> Tally` over the first `seen` samples.

  Samples are sorted by head, so what is not seen yet costs nothing. To be
  jitted; counts are the only thing that leaves the devices.
  """

  def run(bank, task, samples, seen):
    heads_in_all = bank.loss.size
    blank = _tally(heads_in_all)

    def add(i, tally):
      rows = i * batch + jnp.arange(batch)
      taken = jnp.minimum(rows, samples.owners.size - 1)
      table = scores(bank, task, samples.images[taken])
      return jax.tree.map(
        jnp.add,
        tally,
        _count(
          table, samples.owners[taken], samples.columns[taken], rows < seen
        ),
      )

    return lax.fori_loop(0, (seen + batch - 1) // batch, add, blank)

  return run


def _tally(n):
  row = jnp.zeros(n, jnp.int32)
  return metrics.Tally(row, row, row, row, row, jnp.zeros((n, n), jnp.int32))


def _count(table, owners, columns, counted) -> metrics.Tally:
  """Counts of one batch; `table` is `[b, heads, c]`."""
  best = jnp.max(table, axis=2)
  chosen = jnp.argmax(best, axis=1)
  column = jnp.argmax(table, axis=2)
  own = jnp.take_along_axis(table, owners[:, None, None], axis=1)[:, 0]
  true = jnp.take_along_axis(own, columns[:, None], axis=1)[:, 0]
  within = jnp.argmax(own, axis=1) == columns
  right_head = chosen == owners
  above = jnp.sum(table > true[:, None, None], axis=(1, 2))
  picked = jnp.take_along_axis(column, chosen[:, None], axis=1)[:, 0]
  by_head = jax.nn.one_hot(owners, table.shape[1], dtype=jnp.int32)
  by_head = by_head * counted[:, None].astype(jnp.int32)

  def count(hit):
    return jnp.sum(by_head * hit[:, None].astype(jnp.int32), axis=0)

  return metrics.Tally(
    jnp.sum(by_head, axis=0),
    count(right_head & (picked == columns)),
    count(right_head),
    count(within),
    count(above < 5),
    by_head.T @ jax.nn.one_hot(chosen, table.shape[1], dtype=jnp.int32),
  )
