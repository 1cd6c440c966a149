"""The compiled programs of a run whose branches lie on one stage."""

from typing import Any

import jax
import numpy as np

from mhil import (
  compiling,
  heads,
  inputs,
  partitions,
  phases,
  programs,
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


def _served(run: Run, step: Any) -> Any:
  """The step, with the host's part where it holds the memory's rows."""
  if run.transform.hosted is None:
    return step
  images = run.dataset.train_images
  serve = run.transform.hosted.server(lambda rows: np.asarray(images[rows]))
  return served.Served(step, serve, run.mesh.shape["data"])
