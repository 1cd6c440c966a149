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
  run, partition = run._replace(collect=collecting(run)), run.partition
  if partition is partitions.NONE:
    return run
  # Apart from the keys of steps and of the start.
  root = jax.random.fold_in(jax.random.key(run.seed), 2**32 - 2)
  like, ordered = run.fresh(root), run.fresh
  deal, dealt = (lambda held, key: held), ()  # Copies begin alike.
  if partition.units:
    deal, dealt = _compiled(run, like, renew=True)
  again, exchanged = deal, dealt
  if partition.every and not partition.renew:
    again, exchanged = _compiled(run, like, renew=False)
  ends = {phase.steps.stop for phase in run.phases}

  def exchange(state, done):
    # The round at a phase's end may be short; it is merged like any other.
    if not partition.every or (done % partition.every and done not in ends):
      return state
    return state._replace(
      bank=again(state.bank, jax.random.fold_in(root, done))
    )

  # Head 1 is drawn by the same key; the two draws have nothing in common.
  return run._replace(
    fresh=lambda key: deal(ordered(key), jax.random.fold_in(key, 1)),
    exchange=exchange,
    whole=jax.jit(partitions.whole(partition, run.objective, run.mesh)),
    dealt=dealt,
    exchanged=exchanged if partition.every else (),
  )


def _compiled(run: run_lib.Run, like: Any, renew: bool) -> tuple[Any, Any]:
  """An exchange, `(Parted, key) -> Parted`, and its traffic."""
  compiled = program(run, like, renew)
  simulated = run.mesh.devices.flat[0].platform == "cpu"

  def exchange(held, key):
    if simulated:  # see `Run.one_at_a_time`
      jax.block_until_ready(held)
    out = compiled(held, sharding.replicated(key, run.mesh))
    return jax.block_until_ready(out) if simulated else out

  return exchange, tuple(sharding.collectives(compiled, run.mesh))


def program(run: run_lib.Run, like: Any, renew: bool) -> Any:
  """The compiled exchange of `like`, the state's heads."""
  kind, whole = jax.random.key(0).dtype, NamedSharding(run.mesh, P())
  key = jax.ShapeDtypeStruct((), kind, sharding=whole)
  parts = run.partition, run.recipe.optimizer, run.mesh, renew
  step = jax.jit(partitions.exchange(*parts), donate_argnums=0)
  return step.lower(like, key).compile()


def collecting(run: run_lib.Run):
  """`(bank, rows) -> bank` with statistics of draws from these samples."""
  if run.objective.collect is None:
    return lambda bank, rows: bank
  program = jax.jit(scoring.collect(run.mesh, run.dataset, run.objective))
  data = run.mesh.shape["data"]

  def collect(bank, rows):
    draw = np.random.Generator(np.random.Philox(run.seed)).choice
    chosen = draw(rows, SETTLING // data * data)
    images = np.asarray(run.dataset.train_images[chosen])
    return program(bank, sharding.place(images, run.mesh, P("data")))

  return collect
