"""How the stages of a chain are coupled: local losses and corrections.

The equations stand in `layer_parallel`. Everything here is of one stage, or of
one interface, and knows no other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhil import objectives
from mhil.chain import Chain

Tree = Any
CORRECTIONS = ("full", "no_credit", "off")


class Method(NamedTuple):
  """How stages are coupled.

  Attributes:
    beta: weight of the penalty.
    eta: size of a correction; 1 / beta replaces a state by what its stage
      below made of its own, less `p / beta`.
    corrections: in a step, at most K of them; each costs a pass, and what is
      more than K is a sweep; see `schedule`.
    sweeps: passes before those, forwards only, that replace each state by what
      the stage below made of its own; K - 1 of them make all states true.
    correction: `full`, `no_credit` (without `p`) or `off`; the two controls.
    serial_every: every so many steps one is back-propagation; 0: none.
  """

  beta: float = 1.0
  eta: float = 1.0
  corrections: int = 1
  correction: str = "full"
  serial_every: int = 0
  sweeps: int = 0


METHOD = Method()


class Pass(NamedTuple):
  """What one pass through a stage gives.

  Attributes:
    loss: `[]` summed over this device's samples, each by its weight.
    value: `[b, ...]` what the stage made of its state, `x_k`.
    grads: like the stage's parameters; None if not asked for.
    adjoint: `[b, ...]` of `loss` by the state; of each sample's own loss, as
      `p_k` is, by `each_of`. None for the first stage.
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


def schedule(method: Method, stages: int) -> tuple[int, list[int]]:
  """Sweeps of a step, and the pass in which each stage moves its weights.

  A correction takes credit one stage down, and the state that it moves is no
  longer the one that the stage below made. So stage `k` of K takes its
  weights' gradient in the pass in which credit first reaches it, number
  `K - 1 - k`, and rests from then on; where there are fewer passes, in the
  last. A pass before the last K could carry no credit that is used: it is a
  sweep. From true states stage `k` so gets `(beta eta)^(K-1-k)` times
  back-propagation's gradient, exactly. The rule is ours.

  Returns:
    The sweeps; then of each stage its last pass, counted from 0 after them.
  """
  passes = min(method.corrections, stages)
  sweeps = method.sweeps + method.corrections - passes
  return sweeps, [min(stages - 1 - k, passes - 1) for k in range(stages)]


def timetable(method: Method, stages: int) -> list[dict[int, str]]:
  """What the stages do side by side, phase after phase: `[{stage: program}]`.

  `guess` a state; `sweep` forwards alone; `look`, a pass without the weights'
  gradient, of the first stage forwards alone; `run`, one with it; `mend` the
  state below; `learn` to guess, while lower stages still work.
  """
  sweeps, final = schedule(method, stages)
  above = range(1, stages)
  phases = [dict.fromkeys(above, "guess")]
  phases += [dict.fromkeys(range(stages - 1), "sweep")] * sweeps
  for now in range(final[0] + 1):
    work = [k for k in range(stages) if now <= final[k]]
    kinds = {k: "run" if now == final[k] else "look" for k in work}
    resting = {k: "learn" for k in above if now == final[k] + 1}
    phases += [kinds | resting, {k: "mend" for k in work if k}]
  phases.append({k: "learn" for k in above if final[k] == final[0]})
  return [phase for phase in phases if phase]


def longest(
  cost: Callable[[str, int], int | float], method: Method, stages: int
) -> float:
  """What a step takes: of each phase its longest program, in sequence.

  Args:
    cost: of a program of `timetable` at a stage.
    method: whose timetable.
    stages: how many.
  """
  phases = timetable(method, stages)
  return float(sum(max(cost(n, k) for k, n in p.items()) for p in phases))


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
      each = method.beta / 2 * inner(violation, violation)
      if target[1] is not None:
        each += method.beta * inner(target[1], violation)
    return jnp.sum(batch.weight * each), (value, new)

  # An image needs no adjoint.
  wanted = ((0,) if weights else ()) + ((1,) if k else ())
  if not wanted:
    total, (value, new) = loss(params, state)
    return Pass(total, value, None, None, new)
  grad = jax.value_and_grad(loss, wanted, has_aux=True)
  (total, (value, new)), found = grad(params, state)
  grads, adjoint = found[0] if weights else None, found[-1] if k else None
  return Pass(total, value, grads, adjoint, new)


def correct(
  state: Array,
  below: Array,
  adjoint: Array,
  multiplier: Array | None,
  method: Method,
) -> Array:
  """The corrected state `lam'_k`.

  Args:
    state: `lam_k`.
    below: `x_{k-1}`, from the stage below.
    adjoint: `p_k`, from the stage above.
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


def inner(a: Array, b: Array) -> Float[Array, " b"]:
  """Inner products of two batches, sample by sample."""
  return jnp.sum(a * b, axis=tuple(range(1, a.ndim)))


def each_of(adjoint: Array, weight: Array) -> Array:
  """The adjoint of each sample's own loss, from that of the weighted batch.

  A sample of weight zero has none, though batch norm made others depend on it.
  """
  weight = weight.reshape(-1, *(1 for _ in adjoint.shape[1:]))
  return jnp.where(weight > 0, adjoint / jnp.where(weight > 0, weight, 1), 0)
