"""Builds a run: checks its parts, places the data, compiles the programs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mhil import (
  compiling,
  heads,
  inputs,
  losses,
  objectives,
  phases,
  plan,
  programs,
  scoring,
  sharding,
  streams,
  transforms,
)
from mhil import data as data_lib
from mhil.recipe import Recipe
from mhil.run import Run, scalar, start


def build(
  mesh: Mesh,
  stream: streams.Stream,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
  recipe: Recipe,
  seed: int,
  transform: transforms.Transform | None = None,
) -> Run:
  """Checks that the parts fit, places the data, compiles the programs."""
  transform = transform or transforms.none(dataset.classes)
  check(mesh, stream, dataset, recipe, transform.size)
  run = Run(
    mesh,
    stream,
    dataset,
    objective,
    loss,
    transform,
    recipe,
    seed,
    plan.phases(stream, dataset.train_labels, recipe, transform.size),
    *inputs.resident(stream, dataset, recipe, seed, mesh),
    None,
    lambda state, done: state,
    lambda bank: bank,
    None,
    jax.jit(
      heads.initializer(objective, recipe.optimizer, len(stream.tasks), mesh)
    ),
    jax.jit(heads.each(recipe.optimizer.init, mesh)),
    jax.jit(scoring.of_head(heads.features, mesh, dataset, objective)),
    None,
    None,
    [],
    (0, 0),
  )
  feed = phases.open_phase(run, run.phases[0])
  state = start(run)

  def stepping(objective):
    return programs.train_step(
      mesh,
      dataset,
      objective,
      loss,
      recipe.optimizer,
      rate_of(recipe),
      recipe.train_heads,
      transform,
      recipe.correction,
      recipe.streamed,
    )

  step = stepping(objective)
  if objective.settle:
    settling = stepping(objectives.settling(objective))
    run = run._replace(
      settle=jax.jit(lambda *given: settling(*given).bank.stats)
    )
  if objective.probe:
    probe = scoring.of_head(heads.probe, mesh, dataset, objective)
    run = run._replace(probe=jax.jit(probe))
  given, tested = inputs.shapes(run)
  tally = scoring.evaluate(
    scoring.class_scores(mesh, dataset, objective, loss),
    test_batch(mesh, recipe),
  )
  lowered = jax.jit(step, donate_argnums=0).lower(
    state, inputs.batches(run, feed, 0), feed.task, given
  )
  before = compiling.count()
  compiled = lowered.compile()
  between = compiling.count()
  tallying = jax.jit(tally).lower(
    run.whole(state.bank), feed.task, tested, scalar(0, mesh)
  )
  counting = tallying.compile()
  after = compiling.count()
  return run._replace(
    step=compiled,
    tally=counting,
    # Now, for a resumed run needs it first in the middle of the stream.
    reset=run.reset.lower(state.bank.params).compile(),
    compiles=(between - before, after - between),
    traffic=sharding.collectives(compiled, mesh),
  )


def check(
  mesh: Mesh,
  stream: streams.Stream,
  dataset: data_lib.Dataset,
  recipe: Recipe,
  memory: int = 0,
) -> None:
  """Raises ValueError for parts that do not fit together.

  Args:
    mesh, stream, dataset, recipe: of a run.
    memory: samples that it can keep.
  """
  data = mesh.shape["data"]
  if recipe.batch < 1 or recipe.batch % data:
    raise ValueError(
      f"train.batch={recipe.batch} does not divide by mesh.data={data}; use "
      f"{max(1, round(recipe.batch / data)) * data}"
    )
  if sorted(stream.order) != list(range(dataset.classes)):
    raise ValueError(
      f"stream has {len(stream.order)} classes, data set {dataset.name} has "
      f"{dataset.classes}; build the stream for {dataset.classes} classes"
    )
  _check_tested(stream, dataset)
  if not recipe.streamed:
    stats = mesh.devices.flat[0].memory_stats() or {}
    check_room(dataset, stats.get("bytes_limit"))
  if recipe.train_heads not in heads.TRAIN_HEADS:
    raise ValueError(
      f"train.train_heads={recipe.train_heads!r} is not known; use one of "
      + ", ".join(heads.TRAIN_HEADS)
    )
  if recipe.from_scratch and recipe.train_heads != "all":
    raise ValueError(
      f"train.train_heads={recipe.train_heads} would never train the old heads "
      "that train.from_scratch=true draws anew; use train.train_heads=all"
    )
  if recipe.balanced_epochs and not memory:
    raise ValueError(
      f"train.balanced_epochs={recipe.balanced_epochs} has no exemplars to "
      "train on without a memory; use train.balanced_epochs=0"
    )
  _check_sizes(stream, dataset, recipe, memory)
  for name in ("epochs", "log_every"):
    if getattr(recipe, name) < 1:
      raise ValueError(
        f"train.{name}={getattr(recipe, name)} trains nothing; use 1 or more"
      )


def test_batch(mesh: Mesh, recipe: Recipe) -> int:
  """Samples of an evaluation step; a multiple of the `data` axis."""
  data = mesh.shape["data"]
  return -(-recipe.test_batch // data) * data


def _check_sizes(
  stream: streams.Stream, dataset: data_lib.Dataset, recipe: Recipe, memory: int
) -> None:
  there = len(dataset.train_labels)
  if memory > there:
    raise ValueError(
      f"memory.size={memory} is more than the {there} training samples in "
      f"{dataset.name}; use memory.size={there} or less, or -1 to train on "
      "every sample again"
    )
  for phase in plan.phases(stream, dataset.train_labels, recipe, memory):
    if not phase.balanced and phase.rows < recipe.batch:
      raise ValueError(
        f"train.batch={recipe.batch} is more than the {phase.rows} samples of "
        f"task {phase.task}; use train.batch={phase.rows} or less"
      )


def check_room(dataset: data_lib.Dataset, limit: int | None) -> None:
  """Raises ValueError if a device of `limit` bytes cannot hold the images."""
  sets = dataset.train_images, dataset.test_images
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in sets)
  if limit is not None and size > limit:
    raise ValueError(
      f"data.name={dataset.name} has {size:,} bytes of images, a device "
      f"{limit:,} bytes of memory; use data.streamed=true"
    )


def _check_tested(stream: streams.Stream, dataset: data_lib.Dataset) -> None:
  there = np.bincount(dataset.test_labels, minlength=dataset.classes)
  for t, classes in enumerate(stream.tasks):
    if not there[list(classes)].sum():
      raise ValueError(
        f"data.name={dataset.name} has no test image of classes {classes}, all "
        f"of task {t}; add some, or join tasks by stream.sizes"
      )


def rate_of(recipe: Recipe):
  """`(step, task) -> learning rate`, for training and balanced passes."""

  def rate(step, task):
    of = step - task.first_step, task.steps
    if not recipe.balanced_epochs:
      return recipe.rate(*of)
    balanced = recipe.balanced_rate(*of)
    return jnp.where(task.balanced, balanced, recipe.rate(*of))

  return rate
