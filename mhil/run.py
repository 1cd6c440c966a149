"""The parts of a run, and what is done to its state between steps."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mhil import bank as bank_lib
from mhil import data as data_lib
from mhil import (
  losses,
  objectives,
  partitions,
  plan,
  programs,
  sharding,
  streams,
  transforms,
)
from mhil.recipe import Recipe

P = jax.P


class Run(NamedTuple):
  """What the loop over tasks works with.

  Attributes:
    mesh, stream, dataset, objective, loss, transform, recipe, seed: as handed
      in.
    phases: what each stretch of global steps trains on.
    train_set, test_set: samples on the devices, tests sorted by task; of a
      streamed set, without images.
    step: compiled `(state, epoch, task, samples) -> state`.
    exchange: `(state, steps done) -> state`, after each step: what parts that
      are trained apart tell each other now and then.
    whole: `bank -> bank` with each head's whole branch where the parts of a
      branch are trained apart; what tests, predictions and hashes read.
    collect: `(bank, rows) -> bank` of whole branches, with the statistics that
      tests want, for which it may look at `rows` of the training set.
    read: `state -> (state, loss [l, h, ..], bad_step [l, h, ..])`, the state
      with cleared losses.
    clocks: `state -> arrays` that are ready when its devices are done so far.
    tally: compiled `(bank, task, samples, seen) -> metrics.Tally`.
    fresh: `key -> bank`.
    reset: `bank -> bank` with new optimiser state, for every head.
    features: jitted `(bank, head, images) -> [h, b, f]`.
    new_stats: jitted `(state, epoch, task, samples) -> stats`, or None; see
      `objectives.Objective`.
    probe: jitted `(bank, head, images) -> {name: [h, b, ...]}`, or None.
    with_stats: `(bank, stats) -> bank`, of settled statistics.
    compiles: how often XLA compiled a step's programs and `tally`.
    programs: the compiled programs of a step, one or one a stage.
    traffic: their collectives, read from the optimised programs.
    grid: all devices; `mesh` is the part of them where the data lie, and the
      first stage.
    partition: how a branch falls into parts along `subnet`.
    exchanged: the collectives of one exchange between them.
    dealt: those of the first deal, before the first step.
    heads: numbers of the heads that are here, in order.
  """

  mesh: Mesh
  stream: streams.Stream
  dataset: data_lib.Dataset
  objective: objectives.Objective
  loss: losses.Loss
  transform: transforms.Transform
  recipe: Recipe
  seed: int
  phases: tuple[plan.Phase, ...]
  train_set: programs.Samples
  test_set: programs.Samples
  step: Any
  exchange: Callable[[programs.State, int], programs.State]
  whole: Callable[[Any], bank_lib.Bank]
  read: Callable[[programs.State], tuple[programs.State, Any, Any]]
  clocks: Callable[[programs.State], Any]
  tally: Any
  fresh: Any
  reset: Any
  features: Any
  new_stats: Any
  probe: Any
  with_stats: Any
  traffic: list[sharding.Collective]
  compiles: tuple[int, int]
  programs: tuple[Any, ...]
  grid: Mesh
  partition: partitions.Partition = partitions.NONE
  exchanged: tuple[sharding.Collective, ...] = ()
  dealt: tuple[sharding.Collective, ...] = ()
  collect: Callable[[bank_lib.Bank, np.ndarray], bank_lib.Bank] = (
    lambda bank, rows: bank
  )
  heads: tuple[int, ...] = ()

  @property
  def numbers(self) -> np.ndarray:
    """`[l, h]`, the heads as the bank holds them; see `bank.numbers`."""
    return bank_lib.numbers(self.heads, len(self.stream.heads), self.mesh)

  def phases_of(self, t: int) -> tuple[plan.Phase, ...]:
    """The phases of task `t`, in order."""
    return tuple(phase for phase in self.phases if phase.task == t)

  @property
  def one_at_a_time(self) -> bool:
    """Whether the host must wait for each step.

    XLA's simulated CPU devices share one pool of threads, and two programs
    with collectives in flight can each hold the threads that the other waits
    for. Real devices, and programs without collectives, run ahead.
    """
    return bool(self.traffic) and (self.mesh.devices.flat[0].platform == "cpu")


class Pace:
  """Keeps the host from running further ahead of the devices than it may.

  Where a set is streamed that is two steps: the batches in flight take room,
  and only a host that keeps in step can tell whether it waited for data. It
  is two also where stages hand on features, which would pile up before a slow
  one.
  """

  def __init__(self, run: Run):
    self._ahead = 0 if run.one_at_a_time else 2
    apart = len(run.programs) > 1
    self._free = not (run.one_at_a_time or run.recipe.streamed or apart)
    self._clocks = run.clocks
    self._marks: collections.deque[Any] = collections.deque()

  def __call__(self, state: programs.State) -> None:
    """Waits until the devices are near enough."""
    if self._free:
      return
    # A copy: the next step takes the state's own buffer.
    self._marks.append([x + 0 for x in self._clocks(state)])
    if len(self._marks) > self._ahead:
      jax.block_until_ready(self._marks.popleft())


def start(run: Run, generation: int = 0) -> programs.State:
  """The state before the first step; `generation` draws other parameters."""
  # Apart from the keys of steps, which are counted up from 0.
  key = jax.random.fold_in(jax.random.key(run.seed), 2**32 - 1)
  key = jax.random.fold_in(key, generation)
  bank = run.fresh(sharding.replicated(key, run.mesh))
  memory = run.transform.init()
  return programs.State(scalar(0, run.mesh), bank, memory)


def shown(run: Run, state: programs.State) -> programs.State:
  """The state as the compiled step takes it."""
  hosted = run.transform.hosted
  if hosted is None:
    return state
  return state._replace(memory=hosted.shown(state.memory))


def shapes(state: programs.State) -> programs.State:
  """The state's shapes and places without its arrays, to restore by."""

  def shape(x):
    if isinstance(x, np.ndarray):
      return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  return jax.tree.map(shape, state)


def refit(run: Run, saved: programs.State, like: programs.State):
  """A state that was saved on another mesh, with the shapes of `like`.

  Raises:
    ValueError: if it is of a run with other parts.
  """
  theirs, ours = (str(jax.tree.structure(x)) for x in (saved, like))
  if theirs != ours:
    raise ValueError(
      "what is to go on has other parts than this run; use its network.name, "
      "network.norm, optimizer.name, objective.name and memory.size"
    )
  if jax.tree.map(np.shape, saved) == jax.tree.map(np.shape, like):
    return saved
  fresh = start(run)
  bank = jax.tree.map(bank_lib.deal, saved.bank, fresh.bank)
  memory = run.transform.refit(saved.memory, fresh.memory)
  return programs.State(saved.step, bank, memory)


def renew(run: Run, state: programs.State, t: int) -> programs.State:
  """New optimiser state for task `t`; from scratch, new parameters too."""
  if run.recipe.from_scratch and t:
    return state._replace(bank=start(run, t).bank)
  return state._replace(bank=run.reset(state.bank))


def training(run: Run, t: int) -> tuple[int, ...]:
  """Heads of those here that learn in task `t`."""
  new, last = run.recipe.train_heads == "new", run.stream.newest(t)
  return tuple(i for i in opened(run, t) if i == last or not new)


def opened(run: Run, t: int) -> tuple[int, ...]:
  """Heads of those here that are open in task `t`."""
  return tuple(head for head in run.heads if head <= run.stream.newest(t))


def read(state: programs.State):
  """The state with cleared losses, and copies of losses and bad steps."""
  bank = partitions.bank_of(state.bank)
  clear, loss, bad = _read(bank.loss, bank.bad_step)
  held = partitions.with_bank(state.bank, bank._replace(loss=clear))
  return state._replace(bank=held), loss, bad


@jax.jit
def _read(loss, bad):
  # Not zeros_like: under jax 0.12 that forgets how `loss` lies on the mesh.
  return jnp.where(True, 0.0, loss), loss + 0, bad + 0


def scalar(x, mesh: Mesh) -> jax.Array:
  """An int32 on every device."""
  return sharding.place(np.int32(x), mesh, P())


def rate_of(recipe: Recipe):
  """`(step, task) -> learning rate`, for training and balanced passes."""

  def rate(step, task):
    of = step - task.first_step, task.steps
    if not recipe.balanced_epochs:
      return recipe.rate(*of)
    balanced = recipe.balanced_rate(*of)
    return jnp.where(task.balanced, balanced, recipe.rate(*of))

  return rate
