"""Runs on noise that suites measure: one network, any number of tasks."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import optax

from mhil import (
  data,
  losses,
  networks,
  objectives,
  optimizers,
  prepare,
  sharding,
  streams,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

KINDS = {
  "D-CE": losses.dce(),
  "distributed CE": losses.distributed_ce(),
  "centralised CE": losses.ce(),
}


class Setup(NamedTuple):
  """What every program of a table shares."""

  name: str  # of the network, for the table
  branch: Callable[[int], networks.Branch]  # from the number of logits
  side: int = 32  # pixels
  batch: int = 32
  samples: int = 640  # in all, the same for any number of tasks
  each: int = 2  # classes of a task
  optimizer: optax.GradientTransformation = optimizers.adam()


class Parts(NamedTuple):
  """What `prepare.build` takes after the mesh."""

  stream: streams.Stream
  dataset: data.Dataset
  objective: objectives.Objective
  loss: losses.Loss
  recipe: Recipe


CONVNET = Setup(
  "convnet 16-32",
  lambda logits: networks.convnet((32, 32, 3), logits, (16, 32), axis="data"),
)
# Much state and little work: copying a bank would show here first.
MLP = Setup(
  "mlp 3072-256",
  lambda logits: networks.mlp(3072, logits, (256,), axis="data"),
)


def build(
  setup: Setup,
  heads: int,
  *,
  devices: int = 1,
  loss: losses.Loss | None = None,
  train_heads: str = "all",
) -> run_lib.Run:
  """A run over `heads` tasks, compiled only once."""
  return _build(setup, heads, devices, loss or losses.dce(), train_heads)


@functools.cache
def _build(setup, heads, devices, loss, train_heads) -> run_lib.Run:
  mesh = sharding.make_mesh(head=devices)
  return prepare.build(mesh, *parts(setup, heads, loss, train_heads), seed=0)


def parts(
  setup: Setup, heads: int, loss: losses.Loss, train_heads: str = "all"
) -> Parts:
  """What a run over `heads` tasks is built from."""
  classes = setup.each * heads
  rng = np.random.default_rng(0)
  shape = setup.samples, setup.side, setup.side, 3
  images = rng.integers(0, 256, shape, dtype=np.uint8)
  labels = np.arange(setup.samples, dtype=np.int32) % classes
  dataset = data.Dataset(
    *("noise", images, labels, images[:classes], labels[:classes], classes),
    *(255.0, (0.5,) * 3, (0.5,) * 3, 0, False),
  )
  recipe = Recipe(
    optimizer=setup.optimizer,
    batch=setup.batch,
    # A pass over every sample is equally long whatever the tasks.
    cumulative=True,
    train_heads=train_heads,
  )
  return Parts(
    streams.class_incremental(classes, increment=setup.each, order_seed=None),
    dataset,
    objectives.end_to_end(setup.branch(setup.each + 1)),
    loss,
    recipe,
  )
