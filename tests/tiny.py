"""A stream small enough to train in a test: noisy blobs, one a class."""

import functools

import numpy as np

from mhil import (
  data,
  inputs,
  losses,
  memory,
  networks,
  objectives,
  phases,
  prepare,
  sharding,
  streams,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

RECIPE = Recipe(epochs=2, batch=8, memory=12, log_every=4)


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
  devices=None,
):
  """The arguments of `trainer.train`."""
  s = stream(sizes)
  return (
    sharding.make_mesh(head=head, data=data, devices=devices),
    s,
    dataset(sum(sizes)),
    objective(s.head_width + 1, norm),
    loss or losses.dce(),
    recipe,
  )


@functools.cache
def build(seed=0, **settings):
  """A `run.Run`: placed data and compiled programs, shared by all tests."""
  return prepare.build(*parts(**settings), seed)


def kept(run, t):
  """Rows in the memory when task `t` begins, chosen at random."""
  held = {}
  for earlier in range(t):
    held = phases.keep(run, run_lib.start(run), earlier, held)
  return memory.rows(held)


def feed(run, t):
  """The first phase of a task."""
  return phases.open_phase(run, run.phases_of(t)[0], kept(run, t))


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
