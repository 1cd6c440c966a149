"""Layer-parallel stages on devices of their own, all at once.

A step, on every stage k with its network that guesses, `aux_k`:

  guess    lam_k = aux_k(x)                                    lam_k to k - 1
  run      x_k = F_k(lam_k), forwards and backwards: p_k, gW_k    x_k to k + 1
  mend     lam'_k from p_k and x_{k-1}; once more from `run`, lam'_k to k - 1,
           or after the last correction `learn`: W_k, aux_k <- opt

Mesh axis: `stage`. Collectives in a program: none over `stage`. Between two
stages lies one exchange for each correction: a state (and multiplier) down, and
what a stage made of its own up, each of the interface's size (`exchanged`).
Every stage also gets the step's images, labels, weights and tables.

The numbers are those of `layer_parallel` on one device. Left out are the
serial steps of a hybrid, which are a chain of all stages, and what is kept by
sample. See `stages` for what a run with stages has to offer.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhil import (
  compiling,
  coupling,
  heads,
  inputs,
  phases,
  programs,
  sharding,
  stage_programs,
  stages,
)
from mhil import run as run_lib
from mhil.bank import Bank
from mhil.chain import Chain
from mhil.guessing import Guesser


class Banks(NamedTuple):
  """The state of all stages.

  Attributes:
    trunks: pieces of each stage.
    nets: the network that guesses, of each stage but the first.
  """

  trunks: tuple[Bank, ...]
  nets: tuple[Bank, ...]


def spread(
  run: run_lib.Run,
  mesh: Mesh,
  *,
  chain: Chain,
  guesser: Guesser,
  method: coupling.Method,
) -> run_lib.Run:
  """The run with programs for each stage; see `stages`.

  Args:
    run: whole, at home.
    mesh: with as many places along `stage` as the chain has stages.
    chain, guesser, method: of `layer_parallel.layer_parallel`.

  Raises:
    ValueError: for what needs the whole branch in one place.
  """
  check(run, mesh, chain, guesser, method)
  meshes = stages.meshes(mesh)
  owned = [*chain.stages, *((f"aux{k}",) for k in range(1, len(meshes)))]
  homes = [*meshes, *meshes[1:]]
  resets = [jax.jit(heads.each(run.recipe.optimizer.init, m)) for m in homes]

  def grouped(banks):
    return Banks(tuple(banks[: len(meshes)]), tuple(banks[len(meshes) :]))

  def reset(banks):
    fresh = [init(b.params) for init, b in zip(resets, _flat(banks))]
    return grouped([b._replace(opt=o) for b, o in zip(_flat(banks), fresh)])

  def fresh(key):
    return reset(grouped(_split(run.fresh(key), owned, homes)))

  def read(state):
    banks, loss, bad = stages.read(_flat(state.bank), run.mesh)
    return state._replace(bank=grouped(banks)), loss, bad

  def with_stats(banks, stats):
    trunks = [
      bank._replace(stats=stages.send(stages.take(stats, names), here))
      for bank, names, here in zip(banks.trunks, chain.stages, meshes)
    ]
    return banks._replace(trunks=tuple(trunks))

  spread_run = run._replace(
    fresh=fresh,
    reset=reset,
    whole=lambda banks: stages.whole(_flat(banks), run.mesh),
    read=read,
    clocks=lambda state: [state.step, *(b.bad_step for b in _flat(state.bank))],
    with_stats=with_stats,
  )
  return _with_step(spread_run, meshes, chain, guesser, method)


def check(
  run: run_lib.Run,
  mesh: Mesh,
  chain: Chain,
  guesser: Guesser,
  method: coupling.Method,
) -> None:
  """Raises ValueError for what needs the whole branch in one place."""
  count = mesh.shape["stage"]
  if len(chain.stages) != count:
    raise ValueError(
      f"mesh.stage={count} does not fit {len(chain.stages)} stages of "
      f"layer_parallel; use mesh.stage={len(chain.stages)} or mesh.stage=1"
    )
  if guesser.at is None:
    raise ValueError(
      f"layer_parallel keeps states or multipliers by sample, which "
      f"mesh.stage={count} does not; use layer_parallel.states=network and "
      "layer_parallel.multipliers=network, or mesh.stage=1"
    )
  if run.loss.share is not None:
    raise ValueError(
      f"loss.name={run.loss.name} asks for the logits of all heads before a "
      f"step, which mesh.stage={count} has after it; use loss.name=dce"
    )
  if method.serial_every:
    raise ValueError(
      f"layer_parallel.serial_every={method.serial_every} runs the stages one "
      f"after the other, which mesh.stage={count} does not; use "
      "layer_parallel.serial_every=0 or mesh.stage=1"
    )
  if run.recipe.train_heads == "readout":
    raise ValueError(
      "train.train_heads=readout trains on features of the whole branch, which "
      f"mesh.stage={count} holds in parts; use train.train_heads=all or new"
    )


def exchanged(
  chain: Chain,
  batch: int,
  corrections: int = 1,
  multipliers: bool = False,
  sweeps: int = 0,
) -> list[int]:
  """Bytes that each interface exchanges in a step, both directions, one head.

  A correction moves the state down and what the stage below made up; the
  multiplier goes down once; a sweep moves what was made up.

  Args:
    chain: whose interfaces.
    batch: samples of a device.
    corrections: in a step.
    multipliers: whether there are any.
    sweeps: in a step.
  """
  copies = 2 * corrections + multipliers + sweeps
  return [4 * batch * copies * math.prod(s) for s in chain.shapes[1:]]


def _flat(banks: Banks) -> list[Bank]:
  return [*banks.trunks, *banks.nets]


def _split(bank, owned, homes):
  stats = {name: bank.stats.get(name, {}) for name in bank.params}
  return stages.split(bank._replace(stats=stats), owned, homes)


def _with_step(run, meshes, chain, guesser, method) -> run_lib.Run:
  """The run with its step, whose programs are compiled by taking one."""
  made = stage_programs.programs(run, meshes, chain, guesser, method)
  compiled: dict[Any, Any] = {}

  def compiling_call(name, *given):
    function, donated = made[name]
    lowered = jax.jit(function, donate_argnums=donated).lower(*given)
    compiled[name] = lowered.compile()
    return compiled[name](*given)

  def call(name, *given):
    return compiled[name](*given)

  def step_by(call):
    def step(state, epoch, task, samples):
      memory, flight = call(
        ("begin", 0), state.step, state.memory, epoch, task, samples
      )
      flights = [stages.send(flight, here) for here in meshes]
      banks = _take(call, state.bank, flights, meshes, method)
      return programs.State(state.step + 1, banks, memory)

    return step

  state, feed = run_lib.start(run), phases.open_phase(run, run.phases[0])
  given = inputs.batches(run, feed, 0), feed.task, _concrete(run)
  before = compiling.count()
  jax.block_until_ready(step_by(compiling_call)(state, *given))
  return run._replace(
    step=step_by(call),
    compiles=(compiling.count() - before, 0),
    programs=tuple(compiled.values()),
    traffic=[
      c
      for (_, k), program in compiled.items()
      for c in sharding.collectives(program, meshes[k])
    ],
  )


def _concrete(run):
  """A step's samples; of a streamed set, without what they show."""
  return jax.tree.map(
    lambda x: (
      x
      if isinstance(x, jax.Array)
      else jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
    ),
    inputs.shapes(run)[0],
  )


def _take(call, banks, flights, meshes, method) -> Banks:
  """A step of all stages; `call((program, k), ..)` sends work, waits not."""
  count = len(meshes)
  trunks, nets, above = list(banks.trunks), list(banks.nets), range(1, count)

  def down(values):
    return [stages.send(values[k], meshes[k - 1]) for k in above] + [None]

  guesses = [call(("guess", k), nets[k - 1].params, flights[k]) for k in above]
  states = [None, *(state for state, _ in guesses)]
  multipliers = [None, *(multiplier for _, multiplier in guesses)]
  pulls, learnt = down(multipliers), list(multipliers)
  for _ in range(method.sweeps):
    made = [
      call(("sweep", k), trunks[k], flights[k], states[k])
      for k in range(count - 1)
    ]
    states = [None, *(stages.send(made[k - 1], meshes[k]) for k in above)]
  for correction in range(method.corrections):
    kind = "run" if correction == method.corrections - 1 else "look"
    targets, made = down(states), []
    for k in range(count):
      given = trunks[k], flights[k], states[k], targets[k], pulls[k]
      made.append(call((kind, k), *given))
    trunks = [trunk for trunk, _, _ in made]
    for k in above:
      _, _, adjoint = made[k]
      below = stages.send(made[k - 1][1], meshes[k])
      mended = call(("mend", k), states[k], multipliers[k], adjoint, below)
      states[k], learnt[k] = mended if kind == "run" else (mended[0], None)
  nets = [
    call(("learn", k), nets[k - 1], flights[k], states[k], learnt[k])
    for k in above
  ]
  return Banks(tuple(trunks), tuple(nets))
