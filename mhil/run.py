"""A run's parts, built once: the plan, the data in place, the programs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mhil import data as data_lib
from mhil import (
  heads,
  losses,
  memory,
  objectives,
  pipeline,
  programs,
  sharding,
  streams,
)
from mhil.recipe import Recipe

P = jax.P


class Run(NamedTuple):
  """What the loop over tasks works with.

  Attributes:
    mesh, stream, dataset, objective, loss, recipe, seed: as handed in.
    rows: row numbers that each task trains on, exemplars last.
    plan: global steps of each task.
    train_set, test_set: samples on the devices; tests sorted by head.
    step: compiled `(state, epoch, task, samples) -> state`.
    tally: compiled `(bank, task, samples, seen) -> metrics.Tally`.
    fresh: jitted `key -> Bank`.
    reset: jitted `parameters -> optimiser states`, for every head.
    traffic: the collectives of `step`, read from its optimised program.
  """

  mesh: Mesh
  stream: streams.Stream
  dataset: data_lib.Dataset
  objective: objectives.Objective
  loss: losses.Loss
  recipe: Recipe
  seed: int
  rows: tuple[np.ndarray, ...]
  plan: tuple[range, ...]
  train_set: programs.Samples
  test_set: programs.Samples
  step: Any
  tally: Any
  fresh: Any
  reset: Any
  traffic: list[sharding.Collective]

  @property
  def one_at_a_time(self) -> bool:
    """Whether the host must wait for each step.

    XLA's simulated CPU devices share one pool of threads, and two programs
    with collectives in flight can each hold the threads that the other waits
    for. Real devices, and programs without collectives, run ahead.
    """
    return bool(self.traffic) and (
      self.mesh.devices.flat[0].platform == "cpu"
    )


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
  rows = tuple(
    task_rows(dataset, stream, recipe.memory, seed, t)
    for t in range(len(stream.tasks))
  )
  ends = np.cumsum([recipe.epochs * -(-len(r) // recipe.batch) for r in rows])
  plan = tuple(range(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends))
  by_head = np.argsort(stream.head_of[dataset.test_labels], kind="stable")
  run = Run(
    mesh,
    stream,
    dataset,
    objective,
    loss,
    recipe,
    seed,
    rows,
    plan,
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
    [],
  )
  state, task = start(run), open_task(run, 0)
  step = programs.train_step(
    mesh,
    dataset,
    objective,
    loss,
    recipe.optimizer,
    recipe.rate,
    recipe.train_heads,
  )
  tally = programs.evaluate(
    programs.class_scores(mesh, dataset, objective, loss), recipe.test_batch
  )
  compiled = (
    jax.jit(step, donate_argnums=0)
    .lower(state, batches(run, 0, 0), task, run.train_set)
    .compile()
  )
  return run._replace(
    step=compiled,
    tally=jax.jit(tally)
    .lower(state.bank, task, run.test_set, _scalar(0, mesh))
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


def task_rows(
  dataset: data_lib.Dataset,
  stream: streams.Stream,
  size: int | None,
  seed: int,
  t: int,
) -> np.ndarray:
  """Rows that task `t` trains on: its own samples, then exemplars.

  Args:
    dataset, stream: what there is, and when it arrives.
    size: exemplars in all; None keeps every sample.
    seed: moves which exemplars are kept.
    t: the task.
  """
  old = stream.seen(t - 1) if t else ()
  labels = dataset.train_labels
  kept = memory.balanced(
    labels, old, len(labels) * len(old) if size is None else size, seed
  )
  new = np.flatnonzero(np.isin(labels, stream.tasks[t])).astype(np.int32)
  return np.concatenate([new, kept])


def start(run: Run, generation: int = 0) -> programs.State:
  """The state before the first step; `generation` draws other parameters."""
  key = jax.random.fold_in(jax.random.key(run.seed), generation)
  bank = run.fresh(sharding.replicated(key, run.mesh))
  return programs.State(_scalar(0, run.mesh), bank)


def open_task(run: Run, t: int) -> heads.Task:
  """Tables of task `t` on the devices: who is open, and class priors."""
  stream = run.stream
  shape = len(stream.tasks), stream.head_width
  counts, seen = np.zeros(shape), np.zeros(shape, bool)
  of_class = np.bincount(
    run.dataset.train_labels[run.rows[t]], minlength=run.dataset.classes
  )
  for c in stream.seen(t):
    place = stream.head_of[c], stream.column_of[c]
    counts[place], seen[place] = of_class[c], True
  prior = np.zeros((shape[0], shape[1] + 1), np.float32)
  if run.recipe.correction:
    prior = run.loss.prior(counts, seen)
  return heads.Task(
    _scalar(t + 1, run.mesh),
    _scalar(run.plan[t].start, run.mesh),
    _scalar(len(run.plan[t]), run.mesh),
    heads.place(heads.arrange(prior, run.mesh), run.mesh),
    heads.place(heads.arrange(seen, run.mesh), run.mesh),
  )


def renew(run: Run, state: programs.State, t: int) -> programs.State:
  """New optimiser state for task `t`; from scratch, new parameters too."""
  if run.recipe.from_scratch and t:
    return state._replace(bank=start(run, t).bank)
  opt = run.reset(state.bank.params)
  return state._replace(bank=state.bank._replace(opt=opt))


def batches(run: Run, t: int, epoch: int) -> programs.Epoch:
  """The batches of one pass over task `t`, on the devices."""
  order = pipeline.epoch_order(
    run.rows[t], seed=run.seed, task=t, epoch=epoch, batch=run.recipe.batch
  )
  first = run.plan[t].start + epoch * len(order)
  longest = max(len(p) for p in run.plan) // run.recipe.epochs
  padding = [(0, longest - len(order)), (0, 0)]
  order = np.pad(order, padding, constant_values=-1)
  return programs.Epoch(
    sharding.place(order, run.mesh, P(None, "data")), _scalar(first, run.mesh)
  )


def per_epoch(run: Run, t: int) -> int:
  """Steps of one pass over task `t`."""
  return len(run.plan[t]) // run.recipe.epochs


def training(run: Run, t: int) -> tuple[int, ...]:
  """Heads that learn in task `t`."""
  return (t,) if run.recipe.train_heads == "new" else tuple(range(t + 1))


def evaluate(run: Run, state: programs.State, t: int, task: heads.Task):
  """Test counts, `metrics.Tally`, over all classes seen after task `t`."""
  seen = np.isin(run.dataset.test_labels, run.stream.seen(t)).sum()
  return run.tally(state.bank, task, run.test_set, _scalar(seen, run.mesh))


@jax.jit
def read(state: programs.State):
  """The state with cleared losses, and copies of losses and bad steps."""
  bank = state.bank
  clear = state._replace(bank=bank._replace(loss=jnp.zeros_like(bank.loss)))
  return clear, bank.loss, bank.bad_step + 0


@jax.jit
def finite(params):
  """`[l, h]` True for heads all of whose parameters are finite."""
  return jax.tree.reduce(
    jnp.logical_and,
    jax.tree.map(
      lambda x: jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim))), params
    ),
  )


def predictor(run: Run, state: programs.State, t: int):
  """`images [b, ...] -> classes [b]` over the heads open after task `t`."""
  task = open_task(run, t)
  scores = jax.jit(
    programs.class_scores(run.mesh, run.dataset, run.objective, run.loss)
  )
  class_of = np.zeros((len(run.stream.tasks), run.stream.head_width), np.int32)
  for c in range(run.dataset.classes):
    class_of[run.stream.head_of[c], run.stream.column_of[c]] = c

  def predict(images: np.ndarray) -> np.ndarray:
    padding = -len(images) % run.mesh.shape["data"]
    padded = np.concatenate([images, images[:1].repeat(padding, 0)])
    placed = sharding.place(padded, run.mesh, P())
    table = np.asarray(scores(state.bank, task, placed))[: len(images)]
    best = table[:, : len(class_of)].reshape(len(images), -1).argmax(1)
    return class_of.reshape(-1)[best]

  return predict


def _samples(images, labels, stream, seed, mesh) -> programs.Samples:
  samples = programs.Samples(
    images,
    stream.head_of[labels].astype(np.int32),
    stream.column_of[labels].astype(np.int32),
    jax.random.key(seed),
  )
  return sharding.place(samples, mesh, P())


def _scalar(x, mesh: Mesh) -> jax.Array:
  return sharding.place(np.int32(x), mesh, P())
