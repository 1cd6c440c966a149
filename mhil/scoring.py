"""What open heads make of images: scores, features, and counts of a test.

Each is a program to be compiled, once for a whole stream.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from mhil import (
  augment,
  heads,
  losses,
  metrics,
  objectives,
  programs,
  streams,
)
from mhil import bank as bank_lib
from mhil import data as data_lib

P = jax.P


def class_scores(
  mesh: Mesh | AbstractMesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
  numbers: np.ndarray | None = None,
  count: int = 0,
) -> Callable[..., jax.Array]:
  """`(bank, task, images [b, ...]) -> scores [b, heads, c]`, on all devices.

  One all-gather over `head`. Closed heads, padding and heads that are not here
  score `losses.MASKED`.

  Args:
    mesh, dataset, objective, loss: of the run.
    numbers: `[l, h]` of the bank's heads, see `bank.numbers`; None for all.
    count: of heads in all; there are as many in the result, or as the bank has
      entries where these are more.
  """
  parts = mesh, dataset, objective, loss
  table = of_scores(lambda x: x, P("data", None, "head"), *parts)

  def scores(bank, task, images):
    out = table(bank, task, images)
    out = out.reshape(out.shape[0], -1, out.shape[-1])
    whole = numbers is None or (
      numbers.size >= count
      and np.array_equal(numbers.flat, range(numbers.size))
    )
    if whole:
      return out
    assert numbers is not None
    wide = out.shape[0], max(count, numbers.size), out.shape[-1]
    blank = jnp.full(wide, losses.MASKED)
    return blank.at[:, numbers.flatten()].set(out, mode="drop")

  return scores


def by_task(
  scores: Callable[..., jax.Array], stream: streams.Stream
) -> Callable[..., jax.Array]:
  """A program of scores whose results have a row a task.

  Args:
    scores: `(bank, task, images [b, ...]) -> [b, heads, c]`.
    stream: of the run; one that is not fixed has its tasks' heads already.

  Returns:
    `(bank, task, images) -> [b, tasks, c]`, with `c` the classes of the largest
    task; padding scores `losses.MASKED`.
  """
  if not stream.fixed:
    return scores
  class_of = stream.by_task.class_of
  columns = stream.column_of[class_of]

  def run(bank, task, images):
    table = scores(bank, task, images)[:, 0, columns]
    return jnp.where(class_of < 0, losses.MASKED, table)

  return run


def winner(
  mesh: Mesh | AbstractMesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
) -> Callable[..., jax.Array]:
  """`(bank, task, images [b, ...]) -> [b]`, where the best score stands.

  The place in the flat scores `[heads * c]` of an image, the first of equal
  ones. Two all-reduces over `head` of a number an image, whatever the heads.
  """
  return of_scores(first_best, P("data"), mesh, dataset, objective, loss)


def first_best(table: jax.Array) -> jax.Array:
  """Scores `[b, l, 1, c]` of a device to their `winner`; in `shard_map`."""
  b, l, _, c = table.shape
  h = lax.axis_size("head")
  head = jnp.arange(l) * h + lax.axis_index("head")
  places = (head[:, None] * c + jnp.arange(c)[None]).reshape(1, l * c)
  flat = table.reshape(b, l * c)
  top = lax.pmax(jnp.max(flat, axis=1), "head")
  # Of scores that are not numbers none is the best: then the last place.
  best = jnp.where(flat == top[:, None], places, l * h * c - 1)
  return lax.pmin(jnp.min(best, axis=1), "head")


def of_scores(
  function: Callable[[jax.Array], Any],
  spec: P,
  mesh: Mesh | AbstractMesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
) -> Callable[..., Any]:
  """`(bank, task, images [b, ...]) -> tree`, whole on all devices.

  Args:
    function: scores `[b, l, 1, c]` of a device to a tree; in `shard_map`.
    spec: how its arrays lie on the mesh, before they go to all devices.
    mesh, dataset, objective, loss: of the run.
  """

  def local(bank, task, images):
    images = augment.prepare(images, **programs.pixels(dataset), train=False)
    scores = heads.scores(bank, task, images, objective=objective, loss=loss)
    return function(scores)

  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(bank_lib.SPEC, bank_lib.TASK_SPEC, P("data")),
    out_specs=spec,
  )

  def run(bank, task, images):
    images = jax.reshard(images, NamedSharding(mesh, P("data")))
    everywhere = NamedSharding(mesh, P())
    out = spread(bank, task, images)
    return jax.tree.map(lambda x: jax.reshard(x, everywhere), out)

  return run


def of_head(
  function: Callable[..., Any],
  mesh: Mesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
) -> Callable[..., Any]:
  """`(bank, head, images [b, ...]) -> [h, b, ...]`; row `head % h` counts.

  Args:
    function: `heads.features` or `heads.probe`.
    mesh, dataset, objective: of the run.
  """

  def local(bank, head, images):
    images = augment.prepare(images, **programs.pixels(dataset), train=False)
    return function(bank, head, images, objective=objective)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(bank_lib.SPEC, P(), P()),
    out_specs=P("head"),
  )


def collect(
  mesh: Mesh, dataset: data_lib.Dataset, objective: objectives.Objective
) -> Callable[..., bank_lib.Bank]:
  """`(bank, images [b, ...]) -> bank` with statistics of these images.

  Closed heads get some too, which does them no harm.
  """
  assert objective.collect is not None
  one = objective.collect

  def local(bank, images):
    images = augment.prepare(images, **programs.pixels(dataset), train=False)
    rows = jax.tree.map(lambda x: x[:, 0], (bank.params, bank.stats))
    stats = lax.map(lambda held: one(*held, images), rows)
    return bank._replace(stats=jax.tree.map(lambda x: x[:, None], stats))

  spec = bank_lib.SPEC
  return jax.shard_map(
    local, mesh=mesh, in_specs=(spec, P("data")), out_specs=spec
  )


def evaluate(
  scores: Callable[..., jax.Array], batch: int, tasks: int
) -> Callable[..., metrics.Tally]:
  """`(bank, task, samples, seen) -> Tally` over the first `seen` samples.

  Samples are sorted by task and class, so what is not seen yet costs nothing.
  They are dealt to batches in turn: each has its share of every class seen, as
  a test by the batch's own statistics needs. To be jitted; counts are the only
  thing that leaves the devices.
  """

  def run(bank, task, samples, seen):
    blank, batches = _tally(tasks), (seen + batch - 1) // batch

    def add(i, tally):
      rows = i + batches * jnp.arange(batch)
      # Filled up with others that are seen, for statistics of a batch.
      taken = rows % seen
      table = scores(bank, task, samples.images[taken])
      label = samples.labels[taken]
      owners, columns = samples.owners[label], samples.columns[label]
      more = count(table, owners, columns, rows < seen)
      return jax.tree.map(jnp.add, tally, more)

    return lax.fori_loop(0, batches, add, blank)

  return run


def _tally(n):
  row = jnp.zeros(n, jnp.int32)
  return metrics.Tally(row, row, row, row, row, jnp.zeros((n, n), jnp.int32))


def count(table, owners, columns, counted) -> metrics.Tally:
  """Counts of one batch; `table` is `[b, heads, c]`."""
  best = jnp.max(table, axis=2)
  # Where no head has a score, none is chosen.
  known = jnp.max(best, axis=1) > losses.MASKED
  chosen = jnp.where(known, jnp.argmax(best, axis=1), -1)
  column = jnp.argmax(table, axis=2)
  own = jnp.take_along_axis(table, owners[:, None, None], axis=1)[:, 0]
  true = jnp.take_along_axis(own, columns[:, None], axis=1)[:, 0]
  # A head that is not here knows nothing.
  here = true > losses.MASKED
  within = here & (jnp.argmax(own, axis=1) == columns)
  right_head = here & (chosen == owners)
  above = jnp.sum(table > true[:, None, None], axis=(1, 2))
  picked = jnp.take_along_axis(column, chosen[:, None], axis=1)[:, 0]
  by_head = jax.nn.one_hot(owners, table.shape[1], dtype=jnp.int32)
  by_head = by_head * counted[:, None].astype(jnp.int32)

  def add(hit):
    return jnp.sum(by_head * hit[:, None].astype(jnp.int32), axis=0)

  return metrics.Tally(
    jnp.sum(by_head, axis=0),
    add(right_head & (picked == columns)),
    add(right_head),
    add(within),
    add(here & (above < 5)),
    by_head.T @ jax.nn.one_hot(chosen, table.shape[1], dtype=jnp.int32),
  )
