"""A stream small enough to train in a test: noisy blobs, one a class."""

import functools

import numpy as np

from mhil import data, losses, networks, objectives, sharding, streams
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
  return run_lib.build(*parts(**settings), seed)


def steps(run, state, task, count):
  """Runs `count` steps of a task's first epoch."""
  opened = run_lib.open_task(run, task)
  batches = run_lib.batches(run, task, 0)
  first = np.int32(run.plan[task].start)
  state = state._replace(step=sharding.replicated(first, run.mesh))
  for _ in range(count):
    state = run.step(state, batches, opened, run.train_set)
    if run.one_at_a_time:
      state.step.block_until_ready()
  return state
