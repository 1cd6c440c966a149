"""The programs of layer-parallel stages, each for one stage's devices.

See `abreast` for the step that they make up. Messages between them are
`[l, h, b, ...]`, of each head of a device and each of its samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhil import bank as bank_lib
from mhil import coupling, heads, manual, objectives, staged
from mhil import run as run_lib
from mhil.chain import Chain
from mhil.guessing import Guess, Guesser

P = jax.P
_ROWS, _SAMPLES = bank_lib.SPEC, P(None, "head", "data")
_BANK: Any = _ROWS
_FLIGHT = staged.SPEC.flight


def programs(
  run: run_lib.Run,
  meshes: Sequence[Mesh],
  chain: Chain,
  guesser: Guesser,
  method: coupling.Method,
) -> dict[tuple[str, int], tuple[Callable[..., Any], tuple[int, ...]]]:
  """`{(name, stage): (function, its donated arguments)}`, to be compiled.

  Args:
    run: whole, at home.
    meshes: of each stage; the first is home.
    chain, guesser, method: of `layer_parallel.layer_parallel`.
  """
  begin = staged.on_home(run, staged.beginning(run))
  made: dict[Any, Any] = {("begin", 0): (begin, (1,))}
  for k, here in enumerate(meshes):
    if k < len(meshes) - 1:
      made["sweep", k] = _sweep(run, chain, k, here), ()
    for final in (False, True):
      function = _run(run, chain, k, method, final, here)
      made["run" if final else "look", k] = function, (0,)
    if k:
      assert guesser.at is not None
      one = guesser.at(k)
      made["guess", k] = _guess(run, one, chain.shapes[k], here), ()
      made["mend", k] = _mend(method), ()
      made["learn", k] = _learn(run, one, here), (0,)
  return made


def _guess(run, guesser, shape, here):
  has = guesser.multipliers

  def local(params, flight):
    def one(part, head, criterion):
      guess = guesser.guess(part[0], {}, {}, flight.batch)
      return part[0], (guess.states[0], guess.multipliers[0])

    blank = _blank(params, flight, shape)
    given = params, (blank, blank if has else None)
    return _visit(run, given, flight, one)[1]

  return jax.shard_map(
    local, mesh=here, in_specs=(_ROWS, _FLIGHT), out_specs=_SAMPLES
  )


def _sweep(run, chain, k, here):
  def local(trunk, flight, state):
    def one(part, head, criterion):
      params, stats, state, _ = part
      x = state if k else flight.batch.images
      value, _ = chain.run(k, params, stats, x, True)
      return params, stats, state, value.astype(jnp.float32)

    blank = _blank(trunk, flight, chain.shapes[k + 1])
    bank = trunk.params, trunk.stats, state, blank
    return _visit(run, bank, flight, one)[-1]

  return jax.shard_map(
    local,
    mesh=here,
    in_specs=(_BANK, _FLIGHT, _SAMPLES),
    out_specs=_SAMPLES,
  )


def _run(run, chain, k, method, final, here):
  """A pass through a stage; the final one moves its weights."""
  last = len(chain.stages) - 1

  def step(params, stats, side, batch, criterion, key):
    del key
    state, target, pull, *_ = side
    out = coupling.stage(
      chain,
      k,
      params,
      stats,
      state if k else batch.images,
      None if k == last else (target, pull),
      method,
      batch,
      criterion,
      final,
    )
    value = None if k == last else out.value.astype(jnp.float32)
    adjoint = coupling.each_of(out.adjoint, batch.weight) if k else None
    side = state, target, pull, value, adjoint
    return objectives.Step(out.loss, out.grads, out.stats, side)

  def local(trunk, flight, state, target, pull):
    value = None if k == last else _blank(trunk, flight, chain.shapes[k + 1])
    adjoint = _blank(trunk, flight, chain.shapes[k]) if k else None
    bank = trunk._replace(side=(state, target, pull, value, adjoint))
    if final:
      bank = _update(run, bank, flight, step)
    else:

      def look(part, head, criterion):
        out = step(
          part.params, part.stats, part.side, flight.batch, criterion, 0
        )
        return part._replace(side=out.side)

      bank = _visit(run, bank, flight, look)
    return bank._replace(side=()), *bank.side[3:]

  return jax.shard_map(
    local,
    mesh=here,
    in_specs=(_BANK, _FLIGHT, _SAMPLES, _SAMPLES, _SAMPLES),
    out_specs=(_BANK, _SAMPLES, _SAMPLES),
  )


def _mend(method):
  def mend(state, multiplier, adjoint, below):
    new = coupling.correct(state, below, adjoint, multiplier, method)
    return new, None if multiplier is None else multiplier + state - below

  return mend


def _learn(run, guesser, here):
  def step(params, stats, side, batch, criterion, key):
    del criterion, key
    goal = Guess([side[0]], [side[1]])
    grads = guesser.learn(params, batch, goal)
    loss = jnp.zeros_like(jnp.sum(batch.weight))
    return objectives.Step(loss, grads, stats, side)

  def local(net, flight, state, multiplier):
    bank = net._replace(side=(state, multiplier))
    return _update(run, bank, flight, step)._replace(side=())

  return jax.shard_map(
    local,
    mesh=here,
    in_specs=(_BANK, _FLIGHT, _SAMPLES, _SAMPLES),
    out_specs=_BANK,
  )


def _update(run, bank, flight, step):
  return staged.work(run, objectives.Stage((), step, {}, True), bank, flight)


def _visit(run, bank, flight, function):
  return heads.visit(
    bank,
    flight.task,
    flight.prior[:, 0],
    flight.batch,
    function,
    loss=run.loss,
    train_heads=run.recipe.train_heads,
  )


def _blank(bank, flight, shape):
  """Zeros `[l, 1, b, ...]`, to be written."""
  l, b = jax.tree.leaves(bank)[0].shape[0], flight.batch.weight.shape[0]
  return manual.vary(jnp.zeros((l, 1, b, *shape)), "head", "data")
