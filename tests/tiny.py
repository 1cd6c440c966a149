"""A stream small enough to train in a test: noisy blobs, one a class."""

import functools
from typing import NamedTuple

import numpy as np

from mhil import (
  data,
  inputs,
  losses,
  networks,
  objectives,
  phases,
  prepare,
  rehearsal,
  sharding,
  streams,
)
from mhil.recipe import Recipe

RECIPE = Recipe(epochs=2, batch=8, log_every=4)


class Memory(NamedTuple):
  """Of `rehearsal.transform`; size 0 stands for none."""

  size: int = 12
  draws: int = 4
  candidates: int = 2
  policy: str = "balanced"
  selection: str = "stream"
  scope: str = "global"
  place: str = "device"


MEMORY = Memory()
NONE = Memory(0)


@functools.cache
def dataset(classes=6, each=20, seed=0, shape=(2, 2, 1)):
  rng = np.random.default_rng(seed)
  centre = rng.uniform(60, 200, (classes, *shape))

  def split(n):
    labels = np.repeat(np.arange(classes, dtype=np.int32), n)
    noise = rng.normal(0, 15, (len(labels), *shape))
    pixels = np.clip(centre[labels] + noise, 0, 255)
    return pixels.astype(np.uint8), labels

  train, test = split(each), split(7)
  return data.Dataset(
    "tiny", *train, *test, classes, 255.0, (0.5,), (0.25,), 0, False
  )


def stream(sizes=(2, 2, 2)):
  return streams.class_incremental(sum(sizes), sizes=sizes, order_seed=0)


def objective(width=3, norm="none"):
  return objectives.end_to_end(
    networks.mlp(4, width, hidden=(8,), norm=norm, axis="data")
  )


def parts(
  *,
  head=1,
  data=1,
  sizes=(2, 2, 2),
  loss=None,
  norm="none",
  recipe=RECIPE,
  memory=MEMORY,
  devices=None,
):
  """The arguments of `trainer.train`."""
  s, d = stream(sizes), dataset(sum(sizes))
  mesh = sharding.make_mesh(head=head, data=data, devices=devices)
  transform = None
  if memory.size:
    how = {"batch": recipe.batch, **memory._asdict()}
    transform = rehearsal.transform(mesh, d, **how)
  branch = objective(s.head_width + 1, norm)
  return (mesh, s, d, branch, loss or losses.dce(), recipe, transform)


@functools.cache
def build(seed=0, **settings):
  """A `run.Run`: placed data and compiled programs, shared by all tests."""
  *most, transform = parts(**settings)
  return prepare.build(*most, seed, transform)


def feed(run, t):
  """The first phase of a task."""
  return phases.open_phase(run, run.phases_of(t)[0])


def steps(run, state, t, count):
  """Runs `count` steps of a task's first epoch."""
  phase = feed(run, t)
  batches = inputs.batches(run, phase, 0)
  first = np.int32(phase.phase.steps.start)
  state = state._replace(step=sharding.replicated(first, run.mesh))
  for _ in range(count):
    state = run.step(state, batches, phase.task, run.train_set)
    if run.one_at_a_time:
      state.step.block_until_ready()
  return state
