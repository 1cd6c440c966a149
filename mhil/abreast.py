"""Layer-parallel stages on devices of their own, all at once.

A step, on every stage k with its network that guesses, `aux_k`:

  guess    lam_k = aux_k(x)                                    lam_k to k - 1
  sweep    lam_k = F_{k-1}(lam_{k-1})                             x_k to k + 1
  look     x_k = F_k(lam_k), and backwards for p_k alone          x_k to k + 1
  mend     lam'_k from p_k and x_{k-1}; again from `look`        lam'_k to k - 1
  run      the last look, which moves W_k; then `mend`, and `learn`, aux_k

After that a stage rests; all goes by `coupling.timetable`.

Mesh axis: `stage`. A program is compiled for the devices of its stage alone, so
it has no collective over `stage` by construction. Between two stages lies one
exchange for each correction: a state (and multiplier) down, and what a stage
made of its own up, each of the interface's size (`exchanged`).
Every stage also gets the step's images, labels, weights and tables.

The numbers are those of `layer_parallel` on one device. Left out are the
serial steps of a hybrid, which are a chain of all stages, and what is kept by
sample. See `stages` for what a run with stages has to offer.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhil import (
  across,
  compiling,
  coupling,
  heads,
  inputs,
  phases,
  sharding,
  stage_programs,
  stage_steps,
  stages,
)
from mhil import run as run_lib
from mhil.bank import Bank
from mhil.chain import Chain
from mhil.guessing import Guesser
from mhil.stage_steps import Banks


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
  method: coupling.Method = coupling.METHOD,
  multipliers: bool = False,
) -> list[int]:
  """Bytes that each interface exchanges in a step, both directions, one head.

  For each pass of the stage below the state goes down, for each of the stage
  above what the one below made goes up, and for each sweep; the multiplier goes
  down once.

  Args:
    chain: whose interfaces.
    batch: samples of a device.
    method: whose passes and sweeps.
    multipliers: whether there are any.
  """
  sweeps, final = coupling.schedule(method, len(chain.stages))
  passes = [below + above + 2 for below, above in itertools.pairwise(final)]
  return [
    4 * batch * (copies + sweeps + multipliers) * math.prod(shape)
    for copies, shape in zip(passes, chain.shapes[1:], strict=True)
  ]


def _flat(banks: Banks) -> list[Bank]:
  return [*banks.trunks, *banks.nets]


def _split(bank, owned, homes):
  stats = {name: bank.stats.get(name, {}) for name in bank.params}
  return stages.split(bank._replace(stats=stats), owned, homes)


def _with_step(run, meshes, chain, guesser, method) -> run_lib.Run:
  """The run with its step, whose programs are compiled by taking one."""
  made = stage_programs.programs(run, meshes, chain, guesser, method)
  compiled: dict[Any, Any] = {}

  def work(jobs):
    return {name: compiled[name](*given) for name, given in jobs.items()}

  def compiling_work(jobs):
    for name in [name for name in jobs if name not in compiled]:
      function, donated = made[name]
      lowered = jax.jit(function, donate_argnums=donated).lower(*jobs[name])
      compiled[name] = lowered.compile()
    return work(jobs)

  state, feed = run_lib.start(run), phases.open_phase(run, run.phases[0])
  given = inputs.batches(run, feed, 0), feed.task, _concrete(run)
  before = compiling.count()
  first = stage_steps.step(compiling_work, meshes, method)
  jax.block_until_ready(first(state, *given))
  names = stage_steps.names(method, len(meshes))
  return run._replace(
    step=stage_steps.step(work, meshes, method),
    compiles=(compiling.count() - before, 0),
    programs=tuple(compiled[name] for name in names),
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
      else across.put(jnp.zeros(x.shape, x.dtype), x.sharding)
    ),
    inputs.shapes(run)[0],
  )
