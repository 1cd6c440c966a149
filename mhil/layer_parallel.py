r"""PAPER 4: layer-parallel training with auxiliary-variable networks.

Sun, Dong, Chen, Sun, Li, Dong, "Layer-Parallel Training of Residual Networks
with Auxiliary-Variable Networks", arXiv 2112.05387; before it "Penalty and
Augmented Lagrangian Methods for Layer-parallel Training of Residual
Networks", arXiv 2009.01462.

  lam_0 = x,  lam_k = aux_k(x)              states at the interfaces k = 1..K-1
  x_k = F_k(lam_k; W_k),  v_k = lam_k - x_{k-1}       all stages k at once
  l_k = beta/2 ||v_{k+1}||^2 + <kappa_{k+1}, v_{k+1}>,  the last: phi(x_k, y)
  p_k = d l_k / d lam_k,   W_k <- opt(W_k, d l_k / d W_k)
  lam'_k = lam_k - eta (p_k + beta v_k + kappa_k)
  kappa_k <- kappa_k + beta v_k                      augmented Lagrangian only
  aux_k <- opt(aux_k, d ||aux_k(x) - lam'_k||^2 / d aux_k)

All from old values (Jacobi). Inference is the chain of stages alone.

Mesh axis: `stage`. On one device along it the same mathematics run there.
Collectives of a stage: none; an interface has one exchange with its
neighbour, the state and `x_{k-1}`, for each correction.

Public are the abstracts and the bound of the speed-up; the equations are our
reconstruction. Ours are: one auxiliary network for each interface, with its
loss relative to the size of the state; several corrections a step, sweeps
forwards before them, and the rule by which a stage moves its weights when
credit first reaches it (`coupling.schedule`); multipliers in units of beta,
from a second head of the auxiliary network or kept for each sample; the
correction without `p_k`, and none, as controls.

With K - 1 sweeps and K corrections the rule's step is back-propagation in the
form of messages, and as serial. What is faster has fewer corrections than
stages, so that lower stages get no credit from the same batch.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mhil import coupling, objectives
from mhil.chain import Chain
from mhil.guessing import Guess, Guesser

Tree = Any


def layer_parallel(
  chain: Chain, guesser: Guesser, method: coupling.Method
) -> objectives.Objective:
  """Trains the stages of a branch with states that are guessed, then mended.

  Args:
    chain: the stages; a single one is end-to-end training, bit for bit.
    guesser: where states and multipliers come from, and who learns from them;
      with multipliers it is the augmented Lagrangian, without the penalty.
    method: how stages are coupled.

  Raises:
    ValueError: for numbers that cannot be meant.
  """
  coupling.check(method)
  base = objectives.end_to_end(chain.branch)

  def init(key):
    params, stats, _ = base.init(key)
    return params | guesser.params(key), stats, guesser.side()

  def step(params, stats, side, batch, criterion, key):
    del key
    own = chain, params, stats, batch, criterion, method
    guess = guesser.guess(params, stats, side, batch)
    if method.serial_every:
      now = (side["step"] + 1) % method.serial_every == 0
      out, mended = lax.cond(
        now, lambda g: _serial(*own, g), lambda g: parallel(*own, g), guess
      )
    else:
      out, mended = parallel(*own, guess)
    grads = out.grads | guesser.learn(params, batch, mended)
    side = guesser.store(side, batch, mended)
    return out._replace(grads=grads, side=side)

  def settle(params, stats, images):
    return chain.branch.apply(params, stats, images, True)[1]

  def probe(params, stats, images):
    return _measure(chain, guesser, params, stats, images)

  normalised = jax.tree.leaves(jax.eval_shape(base.init, jax.random.key(0))[1])
  return base._replace(
    name="layer_parallel",
    init=init,
    step=step,
    trained=_trained if len(chain.stages) > 1 else base.trained,
    settle=settle if normalised else None,
    probe=probe,
    facts=facts(chain, guesser.costs, method),
  )


def _trained(params, stats, images):
  # The logits of a step stand on states that its own samples' guesses gave.
  del params, stats, images
  raise ValueError(
    "a loss.name other than dce couples the heads by their logits, and those "
    "of layer_parallel stand on guessed states; use loss.name=dce"
  )


def _measure(chain, guesser, params, stats, images):
  """Logits of the chain and of the guesses, and how far guesses are off."""
  found, x, last = {}, images, len(chain.stages) - 1
  states = guesser.states(params, images)
  for k in range(last + 1):
    x, _ = chain.run(k, params, stats, x, False)
    if k < len(states):
      found[f"violation{k + 1}"] = _apart(states[k], x)
  found["chain"] = x
  if states:
    found["aux"] = chain.run(last, params, stats, states[-1], False)[0]
  return found


def _apart(a: Array, b: Array) -> Float[Array, " b"]:
  """The norm of the difference over the larger norm, 0 to 2."""
  most = jnp.maximum(coupling.inner(a, a), coupling.inner(b, b))
  return jnp.sqrt(coupling.inner(a - b, a - b) / jnp.maximum(most, 1e-12))


def facts(
  chain: Chain, costs: Sequence[int], method: coupling.Method
) -> dict[str, Any]:
  """Stages and costs, and what the model says of the speed; JSON-safe."""
  return {
    "stages": [list(names) for names in chain.stages],
    "stage_multiply_adds": list(chain.costs),
    "aux_multiply_adds": list(costs),
    "aux_share": sum(costs) / sum(chain.costs),
    "method": method._asdict(),
    "counted_speedup": counted_speedup(chain.costs, costs, method),
  }


def counted_speedup(
  stages: Sequence[int],
  aux: Sequence[int],
  method: coupling.Method = coupling.METHOD,
) -> float:
  """How much sooner a step ends with a device a stage, by multiply-adds alone.

  A step takes as long as the longest program of each of its phases, one after
  the other. A gradient costs two forward passes, that of a state alone one.
  Data, exchange and correction are left out; `experiments.benchmark` measures
  them.

  Args:
    stages: multiply-adds of each stage, forwards.
    aux: of each auxiliary network, forwards. Without any, states are kept by
      sample, whose first ones the chain makes, all stages but the last.
    method: whose passes, and how often a step is serial.
  """
  beside = [0, *aux] if aux else [0] * len(stages)
  table = {
    "guess": beside,
    "sweep": stages,
    "look": [(2 if k else 1) * cost for k, cost in enumerate(stages)],
    "run": [3 * cost for cost in stages],
    "mend": [0] * len(stages),
    "learn": [3 * cost for cost in beside],
  }
  longest = coupling.longest(lambda n, k: table[n][k], method, len(stages))
  before = 0 if aux else sum(stages[:-1])
  whole = 3 * sum(stages)
  step = before + longest
  if every := method.serial_every:
    serial = whole + before + 4 * max(beside)
    step = ((every - 1) * step + serial) / every
  return whole / step


def parallel(
  chain: Chain,
  params: Tree,
  stats: Tree,
  batch: objectives.Batch,
  criterion: objectives.Criterion,
  method: coupling.Method,
  guess: Guess,
) -> tuple[objectives.Step, Guess]:
  """All stages at once from a guess: gradients, and the guess mended.

  A stage's gradient is that of its last pass (`coupling.schedule`), and so are
  the new state and multiplier below it.

  Returns:
    The step of the branch, without side state, and the mended guess.
  """
  sweeps, final = coupling.schedule(method, len(chain.stages))
  states, multipliers = list(guess.states), list(guess.multipliers)
  for _ in range(sweeps):
    states = _sweep(chain, params, stats, batch.images, states)
  passes: dict[int, coupling.Pass] = {}
  for now in range(final[0] + 1):
    inputs = [batch.images, *states]
    targets = [*zip(states, guess.multipliers), None]
    found = [
      coupling.stage(
        chain,
        k,
        _pick(params, names),
        _pick(stats, names),
        inputs[k],
        targets[k],
        method,
        batch,
        criterion,
        now == final[k],
      )
      for k, names in enumerate(chain.stages)
      if now <= final[k]
    ]
    for k, (below, above) in enumerate(itertools.pairwise(found)):
      p, u = coupling.each_of(above.adjoint, batch.weight), guess.multipliers[k]
      if u is not None:
        multipliers[k] = u + states[k] - below.value
      states[k] = coupling.correct(states[k], below.value, p, u, method)
    passes |= enumerate(found)
  return _gather(passes.values()), Guess(states, multipliers)


def _sweep(chain, params, stats, images, states):
  return [
    chain.run(k, params, stats, x, True)[0].astype(state.dtype)
    for k, (x, state) in enumerate(zip([images, *states], states))
  ]


def _serial(chain, params, stats, batch, criterion, method, guess):
  """Back-propagation; guesses are mended from the true states and adjoints."""
  x, values, backs = batch.images, [], []
  of_each = partial(coupling.each_of, weight=batch.weight)
  for k, names in enumerate(chain.stages[:-1]):
    run = partial(_forward, chain, k, _pick(stats, names))
    x, back, new = jax.vjp(run, _pick(params, names), x, has_aux=True)
    values.append(x)
    backs.append((back, new))
  k, names = len(chain.stages) - 1, chain.stages[-1]
  own = _pick(params, names), _pick(stats, names)
  passes = [coupling.stage(chain, k, *own, x, None, method, batch, criterion)]
  for value, (back, new) in zip(reversed(values), reversed(backs)):
    grads, below = back(passes[0].adjoint.astype(value.dtype))
    zero = jnp.zeros_like(passes[0].loss)
    passes.insert(0, coupling.Pass(zero, value, grads, below, new))
  adjoints = [of_each(above.adjoint) for above in passes[1:]]
  given = zip(values, adjoints, guess.multipliers, strict=True)
  states = [coupling.correct(x, x, p, u, method) for x, p, u in given]
  multipliers = [
    # What they tend to; a control gets no credit by them either.
    u if u is None or method.correction != "full" else -p / method.beta
    for p, u in zip(adjoints, guess.multipliers)
  ]
  return _gather(passes), Guess(states, multipliers)


def _forward(chain, k, stats, params, x):
  return chain.run(k, params, stats, x, True)


def _gather(passes) -> objectives.Step:
  merged: dict[str, Tree] = {"grads": {}, "stats": {}}
  for part in passes:
    merged["grads"] |= part.grads
    merged["stats"] |= part.stats
  loss = sum(part.loss for part in passes)
  return objectives.Step(loss, merged["grads"], merged["stats"], None)


def _pick(tree: Tree, names) -> Tree:
  return {name: tree[name] for name in names}
