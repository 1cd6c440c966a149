"""Stages that hand features on: forward only, each on devices of its own.

At tick t of a phase stage k works on batch t - k, with what stage k - 1 made
of that batch a tick ago, so all stages work at once; after the last batch of a
phase the later stages finish what is on its way. Every stage sees every batch
once, in order, with features made by the same parameters as on one device:
nothing comes back that a delay could make old. So the delay changes when a
stage works and not what it learns.

Mesh axis: `stage`. Collectives in a step: none over `stage`. Between the
programs of two stages the host sends, for each head of a device and each of
its samples, what `objectives.Stage.arrives` lists, in float32 or as the branch
computes; and for each sample 12 bytes of labels and weights, the image if a
later stage reads it, and the task's tables (`traffic`).

See `stages` for what a run with stages has to offer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhil import bank as bank_lib
from mhil import (
  compiling,
  heads,
  inputs,
  objectives,
  phases,
  plan,
  programs,
  sharding,
  stages,
)
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


def spread(
  run: run_lib.Run,
  mesh: Mesh,
  *,
  parts: Sequence[objectives.Stage],
  at_once: bool = True,
) -> run_lib.Run:
  """The run with one program a stage; see `stages`.

  Args:
    run: whole, at home.
    mesh: with as many places along `stage` as there are parts.
    parts: the stages, in order.
    at_once: False waits for each batch to come through before the next: the
      same numbers, for comparison.

  Raises:
    ValueError: for what needs the whole branch in one place.
  """
  check(run, parts)
  meshes = stages.meshes(mesh)
  fresh = _fresh(run, parts, meshes)
  resets = [
    jax.jit(heads.each(run.recipe.optimizer.init, here)) for here in meshes
  ]

  def reset(banks):
    return tuple(
      part._replace(bank=part.bank._replace(opt=init(part.bank.params)))
      for part, init in zip(banks, resets)
    )

  def whole(banks):
    return stages.whole([part.bank for part in banks], run.mesh)

  def read(state):
    banks, loss, bad = stages.read([p.bank for p in state.bank], run.mesh)
    cleared = tuple(p._replace(bank=b) for p, b in zip(state.bank, banks))
    return state._replace(bank=cleared), loss, bad

  def clocks(state):
    return [state.step, *(part.bank.bad_step for part in state.bank)]

  run = run._replace(
    fresh=lambda key: reset(fresh(key)),
    reset=reset,
    whole=whole,
    read=read,
    clocks=clocks,
  )
  before = compiling.count()
  first, rest = _compile(run, parts, meshes)
  compiles = compiling.count() - before, 0
  traffic = [
    c
    for program, here in zip((first, *rest), meshes)
    for c in sharding.collectives(program, here)
  ]
  run = run._replace(
    step=_step(first, parts[1].images),
    compiles=compiles,
    programs=(first, *rest),
    traffic=traffic,
  )
  return run._replace(exchange=_exchange(run, rest, meshes, parts, at_once))


def check(run: run_lib.Run, parts: Sequence[objectives.Stage]) -> None:
  """Raises ValueError for what needs the whole branch in one place."""
  count = len(parts)
  if run.loss.share is not None:
    raise ValueError(
      f"loss.name={run.loss.name} asks for the logits of all heads before a "
      f"step, which mesh.stage={count} has after it; use loss.name=dce"
    )
  if run.recipe.train_heads == "readout":
    raise ValueError(
      "train.train_heads=readout trains on features of the whole branch, which "
      f"mesh.stage={count} holds in parts; use train.train_heads=all or new"
    )


def _fresh(run, parts, meshes) -> Callable[[Any], tuple[Part, ...]]:
  """`key on home -> parts`, without optimiser; each knows an empty batch."""
  flight = _empty_flight(run)
  l, h = bank_lib.rows(len(run.stream.tasks), run.mesh)
  b = flight.batch.weight.shape[0]

  def blank(arrives, here):
    zeros = jax.tree.map(
      lambda x: jnp.zeros((l, h, b, *x.shape), x.dtype), arrives
    )
    return sharding.place(zeros, here, CROSSING)

  leaving = [part.arrives for part in parts[1:]] + [{}]
  images = [part.images for part in (parts[1], *parts[1:])]

  def fresh(key):
    banks = stages.split(run.fresh(key), [p.names for p in parts], meshes)
    return tuple(
      Part(
        bank._replace(
          side=objectives.Crossing(blank(part.arrives, here), blank(out, here))
        ),
        stages.send(_without(flight, held), here),
      )
      for bank, part, out, held, here in zip(
        banks, parts, leaving, images, meshes
      )
    )

  return fresh


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
  return jax.device_put(zeros, where)


def _without(flight, images):
  batch = flight.batch
  return flight._replace(batch=batch if images else batch._replace(images=None))


def _compile(run, parts, meshes):
  """The program of the first stage, and those of the others."""
  state, feed = run_lib.start(run), phases.open_phase(run, run.phases[0])
  given = inputs.batches(run, feed, 0), feed.task, inputs.shapes(run)[0]
  first, *others = state.bank
  step = jax.jit(_first(run, parts[0]), donate_argnums=(0, 2))
  begin = step.lower(first.bank, state.step, state.memory, *given).compile()
  rest = [
    jax.jit(_later(run, stage, here), donate_argnums=0).lower(part).compile()
    for stage, here, part in zip(parts[1:], meshes[1:], others)
  ]
  return begin, tuple(rest)


def _work(run, stage, bank, flight):
  return heads.update(
    bank,
    flight.task,
    flight.prior[:, 0],
    flight.batch,
    flight.step,
    jax.random.wrap_key_data(flight.key),
    objective=stage,
    loss=run.loss,
    optimizer=run.recipe.optimizer,
    rate=run_lib.rate_of(run.recipe),
    train_heads=run.recipe.train_heads,
  )


def beginning(run: run_lib.Run) -> Callable[..., tuple[Any, Flight]]:
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


def on_home(run: run_lib.Run, local: Callable[..., Any], bank: Any = ()) -> Any:
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
    bank = _work(run, stage, bank, flight)
    return bank, memory, flight

  return on_home(run, local, (SPEC.bank,))


def _later(run, stage, here):
  def local(part):
    return part._replace(bank=_work(run, stage, part.bank, part.flight))

  return jax.shard_map(local, mesh=here, in_specs=(SPEC,), out_specs=SPEC)


def _step(first, images):
  def step(state, epoch, task, samples):
    part, *rest = state.bank
    bank, memory, flight = first(
      part.bank, state.step, state.memory, epoch, task, samples
    )
    part = Part(bank, _without(flight, images))
    return programs.State(state.step + 1, (part, *rest), memory)

  return step


def _exchange(run, rest, meshes, parts, at_once):
  """The later stages' share of a tick, then what they hand on."""
  last = len(parts) - 1

  def tick(banks, n, steps):
    """Of phase tick `n`; a stage has work while its batch is one of `steps`."""
    banks = list(banks)
    for k in range(1, last + 1):
      if 0 <= n - k < steps:
        banks[k] = rest[k - 1](banks[k])
        if run.one_at_a_time:
          jax.block_until_ready(banks[k])
    for k in range(last, 0, -1):
      if 0 <= n - (k - 1) < steps:
        banks[k] = _hand_on(banks[k - 1], banks[k], parts[k], meshes[k])
    return tuple(banks)

  def exchange(state, done):
    phase = phase_of(run.phases, done - 1)
    n, steps = done - 1 - phase.steps.start, len(phase.steps)
    if not at_once:
      n, steps = 0, 1
    ticks = [n, *range(steps, steps + last)] if n == steps - 1 else [n]
    banks = state.bank
    for each in ticks:
      banks = tick(banks, each, steps)
    return state._replace(bank=banks)

  return exchange


def _hand_on(before, after, part, here):
  arrived = stages.send(before.bank.side.leaves, here)
  side = after.bank.side._replace(arrived=arrived)
  flight = stages.send(_without(before.flight, part.images), here)
  return Part(after.bank._replace(side=side), flight)


def phase_of(phases: Sequence[plan.Phase], step: int) -> plan.Phase:
  """The phase that a global step belongs to."""
  return next(phase for phase in phases if step in phase.steps)


def handed_on(banks: Sequence[Part]) -> list[dict[str, int]]:
  """Bytes that a device of each stage but the last sends in a tick.

  Returns:
    `features`, and `other`: images, labels, weights and the task's tables.
  """
  return [
    {
      "features": stages.traffic(part.bank.side.arrived),
      "other": stages.traffic(part.flight),
    }
    for part in banks[1:]
  ]
