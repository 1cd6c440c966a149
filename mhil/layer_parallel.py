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
loss relative to the size of the state; several corrections before the step
of the weights, which sees the last but one; multipliers in units of beta,
from a second head of the auxiliary network or kept for each sample; the
correction without `p_k`, and none, as controls.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mhil import objectives
from mhil.chain import Chain
from mhil.guessing import Guess, Guesser

Tree = Any
CORRECTIONS = ("full", "no_credit", "off")


class Method(NamedTuple):
  """How stages are coupled.

  Attributes:
    beta: weight of the penalty.
    eta: size of a correction; 1 / beta replaces a state by what its stage
      below made of its own, less `p / beta`.
    corrections: in a step; each costs a pass through all stages.
    correction: `full`, `no_credit` (without `p`) or `off`; the two controls.
    serial_every: every so many steps one is back-propagation; 0: none.
  """

  beta: float = 1.0
  eta: float = 1.0
  corrections: int = 1
  correction: str = "full"
  serial_every: int = 0


class Pass(NamedTuple):
  """What one pass through a stage gives.

  Attributes:
    loss: `[]` summed over this device's samples, each by its weight.
    value: `[b, ...]` what the stage made of its state, `x_k`.
    grads: like the stage's parameters; None if not asked for.
    adjoint: `[b, ...]` of each sample's own loss, `p_k`.
    stats: the stage's new normalisation statistics.
  """

  loss: Float[Array, ""]
  value: Any
  grads: Tree
  adjoint: Any
  stats: Tree


def check(method: Method) -> None:
  """Raises ValueError for numbers that cannot be meant."""
  for name in "beta", "eta":
    if not getattr(method, name) > 0:
      raise ValueError(
        f"layer_parallel.{name}={getattr(method, name)} is not positive; use "
        f"for instance layer_parallel.{name}=1.0, or for a control "
        "layer_parallel.correction=off"
      )
  if method.correction not in CORRECTIONS:
    raise ValueError(
      f"layer_parallel.correction={method.correction!r} is not known; use one "
      f"of {', '.join(CORRECTIONS)}"
    )
  if method.corrections < 1:
    raise ValueError(
      f"layer_parallel.corrections={method.corrections} is less than one; use "
      "layer_parallel.corrections=1, or for a control "
      "layer_parallel.correction=off"
    )


def stage(
  chain: Chain,
  k: int,
  params: Tree,
  stats: Tree,
  state: Array,
  target: tuple[Array, Array | None] | None,
  method: Method,
  batch: objectives.Batch,
  criterion: objectives.Criterion,
  weights: bool = True,
) -> Pass:
  """One pass through stage `k`, forwards and backwards; knows no other stage.

  Args:
    chain: the stages.
    k: which.
    params, stats: of its pieces.
    state: `lam_k`.
    target: `lam_{k+1}` and `kappa_{k+1} / beta`; None for the last stage.
    method: its `beta` is read.
    batch: its weights are read.
    criterion: of the logits; read by the last stage only.
    weights: whether the gradient of the parameters is wanted.
  """

  def loss(params, state):
    value, new = chain.run(k, params, stats, state, True)
    if target is None:
      each = criterion(value)
    else:
      violation = target[0] - value
      each = method.beta / 2 * _inner(violation, violation)
      if target[1] is not None:
        each += method.beta * _inner(target[1], violation)
    return jnp.sum(batch.weight * each), (value, new)

  if k == 0:  # an image needs no adjoint
    grad = jax.value_and_grad(loss, 0, has_aux=True)
    (total, (value, new)), grads = grad(params, state)
    return Pass(total, value, grads, None, new)
  grad = jax.value_and_grad(loss, (0, 1) if weights else 1, has_aux=True)
  (total, (value, new)), found = grad(params, state)
  grads, adjoint = found if weights else (None, found)
  return Pass(total, value, grads, _each(adjoint, batch.weight), new)


def correct(
  state: Array,
  adjoint: Array,
  below: Array,
  multiplier: Array | None,
  method: Method,
) -> Array:
  """The corrected state `lam'_k`.

  Args:
    state: `lam_k`.
    adjoint: `p_k`, from the stage above.
    below: `x_{k-1}`, from the stage below.
    multiplier: `kappa_k / beta`, or None.
    method: whose `eta`, `beta` and `correction`.
  """
  if method.correction == "off":
    return state
  pull = method.beta * (state - below)
  if multiplier is not None:
    pull += method.beta * multiplier
  if method.correction == "full":
    pull += adjoint
  return state - method.eta * pull


def layer_parallel(
  chain: Chain, guesser: Guesser, method: Method
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
  check(method)
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
        now, lambda g: _serial(*own, g), lambda g: _parallel(*own, g), guess
      )
    else:
      out, mended = _parallel(*own, guess)
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
    settle=settle if normalised else None,
    probe=probe,
    facts=facts(chain, guesser.costs, method),
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
  most = jnp.maximum(_inner(a, a), _inner(b, b))
  return jnp.sqrt(_inner(a - b, a - b) / jnp.maximum(most, 1e-12))


def facts(chain: Chain, costs: Sequence[int], method: Method) -> dict[str, Any]:
  """Stages and costs, and what the model says of the speed; JSON-safe."""
  return {
    "stages": [list(names) for names in chain.stages],
    "stage_multiply_adds": list(chain.costs),
    "aux_multiply_adds": list(costs),
    "aux_share": sum(costs) / sum(chain.costs),
    "counted_speedup": counted_speedup(chain.costs, costs, method.corrections),
  }


def counted_speedup(
  stages: Sequence[int], aux: Sequence[int], corrections: int = 1
) -> float:
  """How much sooner a step ends with a device a stage, by multiply-adds alone.

  A gradient costs two forward passes, that of a state alone one. A network
  that guesses runs and learns beside the stage that it feeds. Data, exchange
  and correction are left out; `experiments.benchmark` measures them.

  Args:
    stages: multiply-adds of each stage, forwards.
    aux: of each auxiliary network, forwards.
    corrections: passes through all stages in a step.
  """
  beside = [0, *aux] if aux else [0] * len(stages)
  longest = max(
    (3 + 2 * (corrections - 1) * (k > 0)) * stage + 3 * beside[k]
    for k, stage in enumerate(stages)
  )
  return 3 * sum(stages) / longest


def _parallel(chain, params, stats, batch, criterion, method, guess):
  """All stages at once: gradients of the weights, and mended guesses."""
  last = len(chain.stages) - 1
  states = guess.states
  for correction in range(method.corrections):
    weights = correction == method.corrections - 1
    inputs = [batch.images, *states]
    targets = [*zip(states, guess.multipliers), None]
    passes = [
      stage(
        chain,
        k,
        _pick(params, chain.stages[k]),
        _pick(stats, chain.stages[k]),
        inputs[k],
        targets[k],
        method,
        batch,
        criterion,
        weights,
      )
      for k in range(last + 1)
    ]
    before = states
    states = [
      correct(states[k - 1], passes[k].adjoint, passes[k - 1].value, u, method)
      for k, u in enumerate(guess.multipliers, 1)
    ]
  multipliers = [
    None if u is None else u + before[k] - passes[k].value
    for k, u in enumerate(guess.multipliers)
  ]
  return _gather(passes), Guess(states, multipliers)


def _serial(chain, params, stats, batch, criterion, method, guess):
  """Back-propagation; the guesses are mended from the true states."""
  x, values, backs, passes = batch.images, [], [], []
  for k, names in enumerate(chain.stages[:-1]):
    run = partial(_forward, chain, k, _pick(stats, names))
    x, back, new = jax.vjp(run, _pick(params, names), x, has_aux=True)
    values.append(x)
    backs.append((back, new))
  k, names = len(chain.stages) - 1, chain.stages[-1]
  own = _pick(params, names), _pick(stats, names)
  passes = [stage(chain, k, *own, x, None, method, batch, criterion)]
  for value, (back, new) in zip(reversed(values), reversed(backs)):
    weighted = passes[0].adjoint * _like(batch.weight, value)
    grads, below = back(weighted.astype(value.dtype))
    zero = jnp.zeros_like(passes[0].loss)
    below = _each(below, batch.weight)
    passes.insert(0, Pass(zero, value, grads, below, new))
  states = [
    correct(
      passes[k].value, passes[k + 1].adjoint, passes[k].value, None, method
    )
    for k in range(len(values))
  ]
  return _gather(passes), Guess(states, guess.multipliers)


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


def _inner(a: Array, b: Array) -> Float[Array, " b"]:
  return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def _like(weight: Array, x: Array) -> Array:
  return weight.reshape(-1, *(1 for _ in x.shape[1:]))


def _each(adjoint: Array, weight: Array) -> Array:
  """Of each sample's own loss: the batch's is a mean, or weighs by zero."""
  weight = _like(weight, adjoint)
  return jnp.where(weight > 0, adjoint / jnp.where(weight > 0, weight, 1), 0)
