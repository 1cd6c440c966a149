"""The compiled programs of a run whose branches lie on one stage."""

from typing import Any

import jax
import numpy as np
import optax

from mhil import (
  compiling,
  heads,
  inputs,
  objectives,
  partitions,
  phases,
  programs,
  scoring,
  served,
  sharding,
)
from mhil.run import Run, rate_of, shown, start


def whole(run: Run) -> Run:
  """The run with its programs, where a branch is one part."""
  recipe = run.recipe
  step = programs.train_step(
    run.mesh,
    run.dataset,
    run.partition.part or run.objective,
    run.loss,
    recipe.optimizer,
    rate_of(recipe),
    recipe.train_heads,
    run.transform,
    recipe.correction,
    recipe.streamed,
    run.partition,
  )
  state, feed = start(run), phases.open_phase(run, run.phases[0])
  lowered = jax.jit(step, donate_argnums=0).lower(
    shown(run, state),
    inputs.batches(run, feed, 0),
    feed.task,
    inputs.shapes(run)[0],
  )
  before = compiling.count()
  compiled = lowered.compile()
  compiles = compiling.count() - before
  # Now, for a resumed run needs it first in the middle of the stream.
  how = recipe.optimizer.init, run.mesh, run.partition.layout
  params = partitions.bank_of(state.bank).params
  optimizer = jax.jit(heads.each(*how)).lower(params).compile()
  return run._replace(
    step=_served(run, compiled),
    reset=lambda held: partitions.renewed(held, optimizer),
    compiles=(compiles, 0),
    programs=(compiled,),
    traffic=sharding.collectives(compiled, run.mesh),
  )


def settling(run: Run) -> Any:
  """Jitted `(state, epoch, task, samples) -> stats`; None if none differ."""
  recipe = run.recipe
  if run.objective.settle is None:
    return None
  step = programs.train_step(
    run.mesh,
    run.dataset,
    objectives.settling(run.objective),
    run.loss,
    optax.identity(),
    rate_of(recipe),
    recipe.train_heads,
    run.transform,
    recipe.correction,
    recipe.streamed,
  )
  return jax.jit(lambda *given: step(*given).bank.stats)


def probing(run: Run) -> Any:
  """Jitted `(bank, head, images) -> {name: ..}`; None if none is asked."""
  if run.objective.probe is None:
    return None
  how = run.mesh, run.dataset, run.objective
  return jax.jit(scoring.of_head(heads.probe, *how))


def _served(run: Run, step: Any) -> Any:
  """The step, with the host's part where it holds the memory's rows."""
  if run.transform.hosted is None:
    return step
  images = run.dataset.train_images
  serve = run.transform.hosted.server(lambda rows: np.asarray(images[rows]))
  return served.Served(step, serve, run.mesh.shape["data"])
