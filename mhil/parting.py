"""Parts of a branch in a run: when they exchange, how a test sees them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mhil import partitions, scoring, sharding
from mhil import run as run_lib

P = jax.P
# Training samples from which the statistics of a merged branch are collected.
SETTLING = 1024


def attach(run: run_lib.Run) -> run_lib.Run:
  """The run with its partition's programs, compiled."""
  partition = run.partition
  if partition is partitions.NONE:
    return run._replace(whole=merging(run))
  # Apart from the keys of steps and of the start.
  root = jax.random.fold_in(jax.random.key(run.seed), 2**32 - 2)
  like = run.fresh(root)
  deal, exchanged = _compiled(run, like, renew=bool(partition.units))
  again = deal
  if partition.units and not partition.renew:
    again, exchanged = _compiled(run, like, renew=False)
  ends = {phase.steps.stop for phase in run.phases}
  ordered = run.fresh

  def fresh(key):
    return deal(*ordered(key), jax.random.fold_in(key, 1))

  def exchange(state, done):
    # The round at a phase's end may be short; it is merged like any other.
    if not partition.every or (done % partition.every and done not in ends):
      return state
    key = jax.random.fold_in(root, done)
    bank, apart = again(state.bank, state.apart, key)
    return state._replace(bank=bank, apart=apart)

  return run._replace(
    fresh=fresh,
    exchange=exchange,
    whole=merging(run),
    exchanged=exchanged if partition.every else (),
  )


def _compiled(run: run_lib.Run, like: Any, renew: bool) -> tuple[Any, Any]:
  """An exchange, `(bank, apart, key) -> (bank, apart)`, and its traffic."""
  compiled = _program(run, like, renew)
  simulated = run.mesh.devices.flat[0].platform == "cpu"

  def exchange(bank, apart, key):
    if simulated:  # see `Run.one_at_a_time`
      jax.block_until_ready((bank, apart))
    out = compiled(bank, apart, sharding.replicated(key, run.mesh))
    return jax.block_until_ready(out) if simulated else out

  return exchange, tuple(sharding.collectives(compiled, run.mesh))


def _program(run: run_lib.Run, like: Any, renew: bool) -> Any:
  kind, whole = jax.random.key(0).dtype, NamedSharding(run.mesh, P())
  key = jax.ShapeDtypeStruct((), kind, sharding=whole)
  parts = run.partition, run.recipe.optimizer, run.mesh, renew
  program = jax.jit(partitions.exchange(*parts), donate_argnums=(0, 1))
  return program.lower(*like, key).compile()


def memory(run: run_lib.Run) -> int:
  """Bytes that an exchange takes on a device, arguments and temporary."""
  if run.partition is partitions.NONE:
    return 0
  state = run_lib.start(run)
  like = state.bank, state.apart
  usage = _program(run, like, run.partition.renew).memory_analysis()
  return usage.argument_size_in_bytes + usage.temp_size_in_bytes


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
