"""What an objective asks for around tests: new statistics, more numbers."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mhil import data as data_lib
from mhil import heads, losses, objectives, programs, scoring, transforms
from mhil import run as run_lib
from mhil.recipe import Recipe


def new_stats(
  mesh: Mesh,
  dataset: data_lib.Dataset,
  objective: objectives.Objective,
  loss: losses.Loss,
  recipe: Recipe,
  transform: transforms.Transform,
) -> Callable[..., Any] | None:
  """`(state, epoch, task, samples) -> stats`, a step that learns nothing.

  None for an objective that does not `settle`.
  """
  if objective.settle is None:
    return None
  step = programs.train_step(
    mesh,
    dataset,
    objectives.settling(objective),
    loss,
    optax.identity(),
    run_lib.rate_of(recipe),
    recipe.train_heads,
    transform,
    recipe.correction,
    recipe.streamed,
  )
  return jax.jit(lambda *given: step(*given).bank.stats)


def probe(
  mesh: Mesh, dataset: data_lib.Dataset, objective: objectives.Objective
) -> Callable[..., Any] | None:
  """`(bank, head, images) -> {name: [h, b, ...]}`; None without a probe."""
  if objective.probe is None:
    return None
  return jax.jit(scoring.of_head(heads.probe, mesh, dataset, objective))
