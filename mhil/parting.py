"""Parts of a branch in a run: when they exchange, how a test sees them."""

import jax
import numpy as np

from mhil import partitions, programs, scoring, sharding
from mhil import run as run_lib

P = jax.P
# Training samples from which the statistics of a merged branch are collected.
SETTLING = 1024


def attach(run: run_lib.Run, state: programs.State) -> run_lib.Run:
  """The run with its partition's programs, compiled."""
  run = run._replace(whole=merging(run))
  partition = run.partition
  if not partition.every:
    return run
  program = partitions.exchange(
    partition, run.recipe.optimizer, run.mesh, partition.renew
  )
  keyed = jax.jit(
    lambda bank, apart, root, step: program(
      bank, apart, jax.random.fold_in(root, step)
    ),
    donate_argnums=(0, 1),
  )
  # Apart from the keys of steps and of the start.
  root = jax.random.fold_in(jax.random.key(run.seed), 2**32 - 2)
  root = sharding.replicated(root, run.mesh)
  zero = run_lib.scalar(0, run.mesh)
  compiled = keyed.lower(state.bank, state.apart, root, zero).compile()
  exchanged = tuple(sharding.collectives(compiled, run.mesh))
  simulated = run.mesh.devices.flat[0].platform == "cpu"
  ends = {phase.steps.stop for phase in run.phases}

  def exchange(state, done):
    # The round at a phase's end may be short; it is merged like any other.
    if done % partition.every and done not in ends:
      return state
    if simulated:  # see `Run.one_at_a_time`
      jax.block_until_ready(state)
    step = run_lib.scalar(done, run.mesh)
    bank, apart = compiled(state.bank, state.apart, root, step)
    if simulated:
      jax.block_until_ready(bank)
    return state._replace(bank=bank, apart=apart)

  return run._replace(exchange=exchange, exchanged=exchanged)


def merging(run: run_lib.Run):
  """`(state, rows) -> bank` of whole branches, their statistics settled."""
  merge = jax.jit(partitions.whole(run.partition, run.objective, run.mesh))
  settle = None
  if run.objective.settle:
    settle = jax.jit(scoring.settle(run.mesh, run.dataset, run.objective))

  def whole(state, rows):
    bank = state.bank
    if run.partition is not partitions.NONE:
      bank = merge(bank, state.apart)
    if settle is None or not rows.size:
      return bank
    size = SETTLING // run.mesh.shape["data"] * run.mesh.shape["data"]
    chosen = np.random.Generator(np.random.Philox(run.seed)).choice(rows, size)
    images = np.asarray(run.dataset.train_images[chosen])
    return settle(bank, sharding.place(images, run.mesh, P("data")))

  return whole
