"""The programs of stages that hand features on, and what they keep.

The first stage begins a step as a run without stages does, the others have
all that they must know of a batch from the one before; see `relay`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhil import (
  across,
  heads,
  inputs,
  objectives,
  phases,
  programs,
  sharding,
  stages,
)
from mhil import bank as bank_lib
from mhil import run as run_lib
from mhil.bank import Bank

P = jax.P


class Flight(NamedTuple):
  """What a stage must know of the batch that it works on.

  Attributes:
    step: `[]` global step of the batch.
    task: of that step.
    prior: `[l, h, c+1]` the loss's prior correction.
    batch: without images where no stage from here on reads them.
    key: data of the step's key; a key itself is not saved.
  """

  step: Any
  task: Any
  prior: Any
  batch: Any
  key: Any


class Part(NamedTuple):
  """A stage's share of the state: `bank.side` is an `objectives.Crossing`."""

  bank: Bank
  flight: Flight


CROSSING = P(None, "head", "data")
_ROWS: Any = bank_lib.SPEC
SPEC = Part(
  Bank(_ROWS, _ROWS, _ROWS, CROSSING, _ROWS, _ROWS),
  Flight(P(), bank_lib.TASK_SPEC, _ROWS, P("data"), P()),
)


def fresh(
  run: run_lib.Run,
  parts: Sequence[objectives.Stage],
  meshes: Sequence[Mesh],
) -> Callable[[Any], tuple[Part, ...]]:
  """`key on home -> parts`, without optimiser; each knows an empty batch."""
  flight = _empty_flight(run)
  l, h = bank_lib.rows(len(run.stream.heads), run.mesh)
  b = flight.batch.weight.shape[0]

  def blank(arrives, here):
    zeros = jax.tree.map(
      lambda x: jnp.zeros((l, h, b, *x.shape), x.dtype), arrives
    )
    return sharding.place(zeros, here, CROSSING)

  leaving = [part.arrives for part in parts[1:]] + [{}]
  images = [part.images for part in (parts[1], *parts[1:])]

  def draw(key):
    banks = stages.split(run.fresh(key), [p.names for p in parts], meshes)
    return tuple(
      Part(
        bank._replace(
          side=objectives.Crossing(blank(part.arrives, here), blank(out, here))
        ),
        stages.send(without(flight, held), here),
      )
      for bank, part, out, held, here in zip(
        banks, parts, leaving, images, meshes
      )
    )

  return draw


def _empty_flight(run) -> Flight:
  feed = phases.open_phase(run, run.phases[0])
  given = inputs.batches(run, feed, 0), feed.task, inputs.shapes(run)[0]
  memory, step = run.transform.init(), run_lib.scalar(0, run.mesh)
  begin = on_home(run, beginning(run))
  shapes = jax.eval_shape(begin, step, memory, *given)[1]
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  where = jax.tree.map(
    lambda spec: jax.NamedSharding(run.mesh, spec), SPEC.flight
  )
  return across.put(zeros, where)


def without(flight: Flight, images: bool) -> Flight:
  """What a stage is told: the images only where they are read later."""
  batch = flight.batch
  return flight._replace(batch=batch if images else batch._replace(images=None))


def lower(
  run: run_lib.Run,
  parts: Sequence[objectives.Stage],
  meshes: Sequence[Mesh],
) -> tuple[Any, ...]:
  """The programs of the stages, to be compiled; a later one takes its part."""
  state, feed = run_lib.start(run), phases.open_phase(run, run.phases[0])
  given = inputs.batches(run, feed, 0), feed.task, inputs.shapes(run)[0]
  first, *others = state.bank
  step = jax.jit(_first(run, parts[0]), donate_argnums=(0, 2))
  begin = step.lower(first.bank, state.step, state.memory, *given)
  rest = [
    jax.jit(_later(run, stage, here), donate_argnums=0).lower(part)
    for stage, here, part in zip(parts[1:], meshes[1:], others)
  ]
  return begin, *rest


def beginning(run):
  """`(step, memory, epoch, task, samples) -> (memory, flight)`."""
  begin = programs.beginning(
    run.dataset,
    run.loss,
    run.transform,
    run.recipe.correction,
    run.recipe.streamed,
  )

  def local(step, memory, epoch, task, samples):
    memory, prior, batch, key = begin(step, memory, epoch, task, samples)
    data = jax.random.key_data(key)
    return memory, Flight(step, task, prior[:, None], batch, data)

  return local


def on_home(run, local, bank=()):
  """Lifts what begins a step; `bank` are the specs of arguments before."""
  memory = programs.state_spec(run.transform).memory
  samples = programs.samples_spec(run.recipe.streamed)
  given = programs.Epoch(P(), P()), bank_lib.TASK_SPEC, samples
  return jax.shard_map(
    local,
    mesh=run.mesh,
    in_specs=(*bank, P(), memory, *given),
    out_specs=(*bank, memory, SPEC.flight),
  )


def _first(run, stage):
  begin = beginning(run)

  def local(bank, step, memory, epoch, task, samples):
    memory, flight = begin(step, memory, epoch, task, samples)
    bank = work(run, stage, bank, flight)
    return bank, memory, flight

  return on_home(run, local, (SPEC.bank,))


def _later(run, stage, here):
  def local(part):
    return part._replace(bank=work(run, stage, part.bank, part.flight))

  return jax.shard_map(local, mesh=here, in_specs=(SPEC,), out_specs=SPEC)


def work(
  run: run_lib.Run,
  objective: objectives.Objective | objectives.Stage,
  bank: Bank,
  flight: Flight,
) -> Bank:
  """`heads.update` of one stage, on what it was told; in `shard_map`."""
  return heads.update(
    bank,
    flight.task,
    flight.prior[:, 0],
    flight.batch,
    flight.step,
    jax.random.wrap_key_data(flight.key),
    objective=objective,
    loss=run.loss,
    optimizer=run.recipe.optimizer,
    rate=run_lib.rate_of(run.recipe),
    train_heads=run.recipe.train_heads,
  )
