"""Layer-parallel steps to be measured, whole and piece by piece."""

import collections
import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import measure
from mhil import (
  abreast,
  auxnet,
  chain,
  coupling,
  data,
  guessing,
  layer_parallel,
  losses,
  networks,
  objectives,
  optimizers,
  prepare,
  sharding,
  stage_steps,
  stages,
  streams,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

SHAPE = 16, 16, 2


class Setup(NamedTuple):
  """Equal dense layers, large enough that sending programs is little of it."""

  layers: int = 12
  hidden: int = 1024
  batch: int = 512


SETUP = Setup()


def one_correction(count: int) -> coupling.Method:
  """A pass, whose lower stages get no credit from the batch."""
  del count
  return coupling.Method(beta=0.01, eta=100.0)


def as_serial(count: int) -> coupling.Method:
  """Back-propagation in the form of messages."""
  return coupling.Method(30.0, 1 / 30, corrections=count, sweeps=count - 1)


METHODS = {
  "1 correction": one_correction,
  "K - 1 sweeps, K corrections": as_serial,
}


class Parallel(NamedTuple):
  """A run in stages, and what it is made of."""

  run: run_lib.Run
  cut: chain.Chain
  guesser: guessing.Guesser
  method: coupling.Method


def named(
  run: run_lib.Run, method: coupling.Method
) -> dict[stage_steps.Name, Any]:
  """The compiled programs of a run in stages."""
  names = stage_steps.names(method, run.grid.shape["stage"])
  return dict(zip(names, run.programs, strict=True))


def branch_of(setup: Setup) -> networks.Branch:
  """A stack of equal dense layers, so that stages come out equal."""
  hidden = (setup.hidden,) * setup.layers
  return networks.mlp(math.prod(SHAPE), 11, hidden, norm="layer", axis="data")


def parallel(
  setup: Setup,
  method: coupling.Method,
  count: int,
  devices: Sequence[jax.Device] | None = None,
) -> Parallel:
  """Layer-parallel training with networks of at most a tenth of the cost."""
  cut = chain.chain(branch_of(setup), SHAPE, count)
  guesser = guessing.by_network(auxnet.auxnet(cut), cut)
  objective = layer_parallel.layer_parallel(cut, guesser, method)
  spread = functools.partial(
    abreast.spread, chain=cut, guesser=guesser, method=method
  )
  mesh = sharding.make_mesh(stage=count, devices=devices)
  run = build(objective._replace(spread=spread), setup, mesh)
  return Parallel(run, cut, guesser, method)


def build(
  objective: objectives.Objective,
  setup: Setup,
  mesh: jax.sharding.Mesh | None = None,
) -> run_lib.Run:
  """A run over noise in ten classes, one head."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (4 * setup.batch, *SHAPE), dtype=np.uint8)
  labels = np.arange(len(images), dtype=np.int32) % 10
  dataset = data.Dataset(
    *("noise", images, labels, images[:10], labels[:10], 10),
    *(255.0, (0.5,) * SHAPE[2], (0.5,) * SHAPE[2], 0, False),
  )
  return prepare.build(
    mesh or sharding.make_mesh(),
    streams.class_incremental(10, increment=10, order_seed=None),
    dataset,
    objective,
    losses.dce("none"),
    Recipe(batch=setup.batch, optimizer=optimizers.sgd(), epochs=100),
    seed=0,
  )


class Pieces:
  """Takes a step piece by piece and notes how long each took.

  Attributes:
    steps: of each step `{what: [ms]}`: `send`, and a program's name; where the
      programs of a phase run at once, the names of all.
    bytes: of each message to another stage, of the last step.
  """

  def __init__(
    self, run: run_lib.Run, method: coupling.Method, at_once: bool = False
  ):
    """Programs are sent alone, or all of a phase at once."""
    self._programs, self._at_once = named(run, method), at_once
    self.steps: list[dict[Any, list[float]]] = []
    self.bytes: list[int] = []
    meshes = stages.meshes(run.grid)
    step = stage_steps.step(self._work, meshes, method, self._send)
    self._stepper = measure.Stepper(run._replace(step=step), 0)

  def __call__(self) -> None:
    """Takes one step."""
    self.steps.append(collections.defaultdict(list))
    self.bytes = []
    self._stepper()

  def _work(self, jobs):
    def one(name):
      return self._programs[name](*jobs[name])

    if self._at_once:
      all_of = lambda: {name: one(name) for name in jobs}  # noqa: E731
      return self._timed(tuple(jobs), all_of, jobs)
    return {
      name: self._timed(name, functools.partial(one, name), jobs[name])
      for name in jobs
    }

  def _send(self, tree, mesh):
    self.bytes.append(stages.traffic(tree))
    return self._timed("send", lambda: stages.send(tree, mesh), tree)

  def _timed(self, what, function, given):
    jax.block_until_ready(given)
    begun = time.perf_counter()
    made = jax.block_until_ready(function())
    self.steps[-1][what].append(1e3 * (time.perf_counter() - begun))
    return made


def modelled(
  alone: dict[Any, list[float]],
  at_once: dict[Any, list[float]],
  method: coupling.Method,
  count: int,
) -> tuple[float, float, float]:
  """What a step should take, in milliseconds.

  Returns:
    By the programs alone; with the copies, one after the other; and with the
    programs of each phase as long as they take beside each other.
  """
  mean = {what: statistics.mean(ms) for what, ms in alone.items()}
  cost = lambda name, k: mean[name, k]  # noqa: E731
  programs = mean["begin", 0] + coupling.longest(cost, method, count)
  phases = sum(sum(ms) for what, ms in at_once.items() if what != "send")
  sends = sum(alone["send"])
  return programs, programs + sends, phases + sends


def way(made: Parallel) -> float:
  """FLOPs from a step's begin to its end, if each stage has a device."""
  programs = named(made.run, made.method)
  counted = {name: flops(program) for name, program in programs.items()}
  count = len(made.cut.stages)
  cost = lambda name, k: counted[name, k]  # noqa: E731
  return counted["begin", 0] + coupling.longest(cost, made.method, count)


def flops(program: Any) -> float:
  """Operations of a compiled program, by XLA's count; a loop's body once."""
  return program.cost_analysis()["flops"]
