"""Builds a run: checks its parts, places the data, compiles the programs."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mhil import (
  alone,
  assembly,
  compiling,
  heads,
  inputs,
  losses,
  measuring,
  objectives,
  parting,
  partitions,
  phases,
  plan,
  scoring,
  stages,
  streams,
  transforms,
)
from mhil import bank as bank_lib
from mhil import data as data_lib
from mhil import run as run_lib
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
  partition: partitions.Partition = partitions.NONE,
  heads_here: Sequence[int] = (),
) -> Run:
  """Checks that the parts fit, places the data, compiles the programs.

  With `heads_here`, only these are trained and tested, as if alone.
  """
  transform = transform or transforms.none(dataset.classes)
  check(mesh, stream, dataset, recipe, transform.size)
  check_spread(mesh, objective, transform)
  check_side(mesh, objective, len(heads_here) or len(stream.heads))
  check_parts(mesh, recipe, transform, partition)
  alone.check(heads_here, mesh, stream, loss, transform)
  home, count = stages.meshes(mesh)[0], len(stream.heads)
  here = tuple(sorted(heads_here)) or tuple(range(count))
  numbers = bank_lib.numbers(here, count, home)
  run = Run(
    home,
    stream,
    dataset,
    objective,
    loss,
    transform,
    recipe,
    seed,
    plan.phases(stream, dataset.train_labels, recipe, transform.size),
    *inputs.resident(stream, dataset, recipe, seed, home),
    None,
    lambda state, done: state,
    lambda bank: bank,
    run_lib.read,
    lambda state: [state.step],
    None,
    partitions.fresh(partition, objective, recipe.optimizer, numbers, home),
    None,
    jax.jit(scoring.of_head(heads.features, home, dataset, objective)),
    measuring.new_stats(home, dataset, objective, loss, recipe, transform),
    measuring.probe(home, dataset, objective),
    lambda bank, stats: bank._replace(stats=stats),
    [],
    (0, 0),
    (),
    mesh,
    partition,
    heads=here,
  )
  run = parting.attach(run)
  if objective.spread is not None and mesh.shape["stage"] > 1:
    run = objective.spread(run, mesh)
  else:
    run = assembly.whole(run)
  bank = start(run).bank
  tally = scoring.evaluate(
    phases.class_scores(run),
    inputs.test_batch(home, recipe),
    max(len(stream.tasks), numbers.size),
  )
  tallying = jax.jit(tally).lower(
    run.whole(bank),
    phases.open_phase(run, run.phases[0]).task,
    inputs.shapes(run)[1],
    scalar(0, home),
  )
  before = compiling.count()
  counting = tallying.compile()
  compiles = run.compiles[0], compiling.count() - before
  return run._replace(tally=counting, compiles=compiles)


def check_spread(
  mesh: Mesh, objective: objectives.Objective, transform: transforms.Transform
) -> None:
  """Raises ValueError where a step cannot lie along `stage`."""
  stage = mesh.shape["stage"]
  if stage > 1 and objective.spread is None:
    raise ValueError(
      f"mesh.stage={stage} would do the same work several times, since "
      f"{objective.name} learning has no parts for it; use mesh.stage=1"
    )
  if stage > 1 and transform.hosted:
    raise ValueError(
      f"memory.place=host does not serve mesh.stage={stage}; use "
      "memory.place=device or mesh.stage=1"
    )


def check_side(
  mesh: Mesh,
  objective: objectives.Objective,
  heads: int,
  limit: int | None = None,
) -> None:
  """Raises ValueError if a device cannot hold what heads keep by sample.

  Args:
    mesh: over whose `head` axis the heads are dealt.
    objective: whose side state.
    heads: of the stream.
    limit: bytes of a device; None asks it, and where it does not know, passes.
  """
  stats = mesh.local_mesh.devices.flat[0].memory_stats() or {}
  limit = limit or stats.get("bytes_limit")
  side = jax.eval_shape(objective.init, jax.random.key(0))[2]
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(side))
  size *= -(-heads // mesh.shape["head"])
  if limit is not None and size > limit:
    raise ValueError(
      f"objective.name={objective.name} keeps {size:,} bytes by sample on a "
      f"device of {limit:,}; use layer_parallel.states=network with "
      "layer_parallel.multipliers=network, or fewer samples"
    )


def check_parts(
  mesh: Mesh,
  recipe: Recipe,
  transform: transforms.Transform,
  partition: partitions.Partition,
) -> None:
  """Raises ValueError unless each part gets as many samples as any other."""
  subnet, data = mesh.shape["subnet"], mesh.shape["data"]
  if partition.parts != subnet:
    raise ValueError(
      f"mesh.subnet={subnet} is not the {partition.parts} parts of the "
      f"partition {partition.name}; use mesh.subnet={partition.parts}"
    )
  if subnet > 1 and mesh.shape["stage"] > 1:
    raise ValueError(
      f"mesh.stage={mesh.shape['stage']} cuts a branch that mesh.subnet="
      f"{subnet} cuts too; use mesh.stage=1"
    )
  each = data * subnet
  sizes = {"train.batch": recipe.batch, "memory.draws": transform.added}
  for field, size in sizes.items():
    if size % each:
      raise ValueError(
        f"{field}={size} does not divide by mesh.data={data} times "
        f"mesh.subnet={subnet}; use {max(1, round(size / each)) * each}"
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
  if stream.fixed and mesh.shape["head"] > 1:
    raise ValueError(
      f"mesh.head={mesh.shape['head']} is more than the one head of a fixed "
      "network; use mesh.head=1"
    )
  if sorted(stream.order) != list(range(dataset.classes)):
    raise ValueError(
      f"stream has {len(stream.order)} classes, data set {dataset.name} has "
      f"{dataset.classes}; build the stream for {dataset.classes} classes"
    )
  _check_tested(stream, dataset)
  if not recipe.streamed:
    stats = mesh.local_mesh.devices.flat[0].memory_stats() or {}
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
  planned = plan.phases(stream, dataset.train_labels, recipe, memory)
  if (last := planned[-1].steps.stop) >= 2**31:
    raise ValueError(
      f"train.epochs={recipe.epochs} and train.balanced_epochs="
      f"{recipe.balanced_epochs} make {last:,} steps, and devices count to "
      f"{2**31 - 1:,}; use fewer"
    )
  for phase in planned:
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
