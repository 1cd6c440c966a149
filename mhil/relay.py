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
computes; and for each sample 16 bytes (labels, row, weight), the image if a
later stage reads it, and the task's tables (`traffic`).

See `stages` for what a run with stages has to offer.
"""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from mhil import (
  compiling,
  heads,
  objectives,
  plan,
  programs,
  sharding,
  staged,
  stages,
)
from mhil import run as run_lib
from mhil.staged import Part


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
    at_once: False waits for each batch to come through, and the host with it,
      before the next: the same numbers, for comparison.

  Raises:
    ValueError: for what needs the whole branch in one place.
  """
  check(run, parts)
  meshes = stages.meshes(mesh)
  fresh = staged.fresh(run, parts, meshes)
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
  lowered = staged.lower(run, parts, meshes)
  before = compiling.count()
  first, *rest = [each.compile() for each in lowered]
  compiles = compiling.count() - before, 0
  run = run._replace(
    step=_step(first, parts[1].images),
    compiles=compiles,
    programs=(first, *rest),
    traffic=[
      collective
      for program, here in zip((first, *rest), meshes)
      for collective in sharding.collectives(program, here)
    ],
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


def _step(first, images):
  def step(state, epoch, task, samples):
    part, *rest = state.bank
    bank, memory, flight = first(
      part.bank, state.step, state.memory, epoch, task, samples
    )
    part = Part(bank, staged.without(flight, images))
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
    state = state._replace(bank=banks)
    # Programs are only sent: without waiting, the first stage would begin the
    # next batch while the last is at this one.
    return state if at_once else jax.block_until_ready(state)

  return exchange


def _hand_on(before, after, part, here):
  arrived = stages.send(before.bank.side.leaves, here)
  side = after.bank.side._replace(arrived=arrived)
  flight = stages.send(staged.without(before.flight, part.images), here)
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
