"""Builds a run: checks its parts, places the data, compiles the programs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mhil import data as data_lib
from mhil import (
  heads,
  losses,
  objectives,
  phases,
  plan,
  programs,
  sharding,
  streams,
)
from mhil.recipe import Recipe
from mhil.run import Run, scalar, start

P = jax.P


def build(
  mesh: Mesh,
  stream: streams.Stream,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
  recipe: Recipe,
  seed: int,
) -> Run:
  """Checks that the parts fit, places the data, compiles the programs."""
  check(mesh, stream, dataset, recipe)
  by_head = np.argsort(stream.head_of[dataset.test_labels], kind="stable")
  run = Run(
    mesh,
    stream,
    dataset,
    objective,
    loss,
    recipe,
    seed,
    plan.phases(stream, dataset.train_labels, recipe),
    _samples(dataset.train_images, dataset.train_labels, stream, seed, mesh),
    _samples(
      dataset.test_images[by_head],
      dataset.test_labels[by_head],
      stream,
      seed,
      mesh,
    ),
    None,
    None,
    jax.jit(
      heads.initializer(objective, recipe.optimizer, len(stream.tasks), mesh)
    ),
    jax.jit(heads.each(recipe.optimizer.init, mesh)),
    jax.jit(programs.head_features(mesh, dataset, objective)),
    [],
  )
  feed = phases.open_phase(run, run.phases[0], phases.NOTHING)
  state = start(run)
  step = programs.train_step(
    mesh,
    dataset,
    objective,
    loss,
    recipe.optimizer,
    rate_of(recipe),
    recipe.train_heads,
  )
  tally = programs.evaluate(
    programs.class_scores(mesh, dataset, objective, loss), recipe.test_batch
  )
  compiled = (
    jax.jit(step, donate_argnums=0)
    .lower(state, phases.batches(run, feed, 0), feed.task, run.train_set)
    .compile()
  )
  return run._replace(
    step=compiled,
    tally=jax.jit(tally)
    .lower(state.bank, feed.task, run.test_set, scalar(0, mesh))
    .compile(),
    traffic=sharding.collectives(compiled, mesh),
  )


def check(
  mesh: Mesh,
  stream: streams.Stream,
  dataset: data_lib.Dataset,
  recipe: Recipe,
) -> None:
  """Raises ValueError for parts that do not fit together."""
  data = mesh.shape["data"]
  for name, size in ("batch", recipe.batch), ("test_batch", recipe.test_batch):
    if size < 1 or size % data:
      raise ValueError(
        f"train.{name}={size} does not divide by the mesh's data axis of "
        f"{data}; use {max(1, round(size / data)) * data}"
      )
  if sorted(stream.order) != list(range(dataset.classes)):
    raise ValueError(
      f"stream has {len(stream.order)} classes, data set {dataset.name} has "
      f"{dataset.classes}; build the stream for {dataset.classes} classes"
    )
  if recipe.train_heads not in heads.TRAIN_HEADS:
    raise ValueError(
      f"train.train_heads={recipe.train_heads!r} is not known; use one of "
      + ", ".join(heads.TRAIN_HEADS)
    )
  for name in ("epochs", "log_every"):
    if getattr(recipe, name) < 1:
      raise ValueError(
        f"train.{name}={getattr(recipe, name)} trains nothing; use 1 or more"
      )


def _samples(images, labels, stream, seed, mesh) -> programs.Samples:
  samples = programs.Samples(
    images,
    stream.head_of[labels].astype(np.int32),
    stream.column_of[labels].astype(np.int32),
    jax.random.key(seed),
  )
  return sharding.place(samples, mesh, P())


def rate_of(recipe: Recipe):
  """`(step, task) -> learning rate`, for training and balanced passes."""

  def rate(step, task):
    of = step - task.first_step, task.steps
    if not recipe.balanced_epochs:
      return recipe.rate(*of)
    balanced = recipe.balanced_rate(*of)
    return jnp.where(task.balanced, balanced, recipe.rate(*of))

  return rate
