"""Optimisers of unit learning rate, and learning rates over one task.

The rate multiplies the update at the end, so that momentum is unaffected by
the schedule (the convention of the field's SGD recipes) and one compiled step
serves tasks of any length. A task's length is an array inside that step,
which is why optax's own schedules, made for a length known beforehand, do
not serve.

An optimiser sees the gradient of one head, summed over the whole batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# `(step in task from 0, steps of task) -> learning rate`, all scalars.
Rate = Callable[[jax.Array, jax.Array], jax.Array]
Number = int | float


def adam(
  weight_decay: float = 0.0, *, decay_norm: bool = True, clip: float = 0.0
) -> optax.GradientTransformation:
  """Adam (Kingma & Ba 2015), decay decoupled (Loshchilov & Hutter 2019).

  Args:
    weight_decay, decay_norm, clip: as for `sgd`.
  """
  decay = _decay(weight_decay, decay_norm)
  return optax.chain(*_clip(clip), optax.scale_by_adam(), decay)


def sgd(
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  nesterov: bool = False,
  *,
  decay_norm: bool = True,
  clip: float = 0.0,
) -> optax.GradientTransformation:
  """SGD; decay is added to the gradient before momentum.

    g <- clip(g) + weight_decay p;  v <- momentum v + g
    update = g + momentum v if nesterov else v

  Args:
    momentum: share of the last update that is kept; 0 keeps no state at all.
    weight_decay: times the parameter, added to the gradient.
    nesterov: look ahead by one momentum step.
    decay_norm: let decay act on normalisation layers and biases too, as most
      published class-incremental recipes do.
    clip: largest 2-norm of one head's gradient, or of one subnet's where a
      head trains as several; 0 does not clip. The norm is never taken across
      them: it would need an exchange in every step, and how far a head moves
      would depend on which others exist.
  """
  trace = [optax.trace(decay=momentum, nesterov=nesterov)] if momentum else []
  return optax.chain(*_clip(clip), _decay(weight_decay, decay_norm), *trace)


def _clip(norm: float) -> list[optax.GradientTransformation]:
  return [optax.clip_by_global_norm(norm)] if norm else []


def _decay(weight: float, norm: bool) -> optax.GradientTransformation:
  return optax.add_decayed_weights(weight, None if norm else _decayed)


def _decayed(params: Any) -> Any:
  """True for kernels: all but the leaves named `scale` and `bias`."""

  def decays(path, leaf):
    del leaf
    return path[-1].key not in ("scale", "bias")

  return jax.tree_util.tree_map_with_path(decays, params)


def constant(rate: float) -> Rate:
  """The same learning rate at every step."""
  return lambda step, steps: jnp.full((), rate)


def cosine(rate: float) -> Rate:
  """From `rate` at a task's first step towards 0 after its last."""
  return lambda step, steps: rate / 2 * (1 + jnp.cos(jnp.pi * step / steps))


def steps(
  rate: float,
  milestones: Sequence[Number],
  factor: float | Sequence[float] = 0.1,
  *,
  epochs: Number = 1,
) -> Rate:
  """Multiplied by `factor` at each milestone, on the step nearest to it.

  Args:
    rate: learning rate before the first milestone.
    milestones: in the unit of `epochs`, increasing.
    factor: what each milestone multiplies the rate by; or, of each milestone,
      what share of `rate` is left from there on.
    epochs: length of a task. 1 makes milestones fractions of it:
      `steps(0.1, (100, 120), epochs=170)` is `steps(0.1, (10/17, 12/17))`.

  Raises:
    ValueError: for milestones that do not increase, or outside the task.
  """
  marks = tuple(milestones)
  if sorted({0, *marks, epochs}) != [0, *marks, epochs]:
    raise ValueError(
      f"optimizer.milestones={marks} do not increase between 0 and the "
      f"{epochs} epochs of a task; move them inside or raise train.epochs"
    )

  if isinstance(factor, Sequence) and len(factor) != len(marks):
    raise ValueError(
      f"optimizer.milestones={marks} are {len(marks)}, optimizer.percents "
      f"{len(factor)}; name one of the latter for each"
    )

  def at(step, steps):
    ends = [jnp.round(steps * (mark / epochs)) for mark in marks]
    passed = sum((step >= end for end in ends), start=jnp.zeros((), int))
    if isinstance(factor, Sequence):
      return rate * jnp.array((1.0, *factor))[passed]
    return rate * jnp.power(factor, passed)

  return at


def warm_up(rate: Rate, length: Number, *, epochs: Number = 1) -> Rate:
  """`rate` times a linear ramp that reaches 1 on the last step of `length`.

  The first step already moves, and the rate below the ramp keeps its own
  time: its milestones count from the start of the task.

  Args:
    rate: the schedule without warm-up.
    length: of the ramp, in the unit of `epochs`; 0 leaves `rate` as it is.
    epochs: length of a task. 1 makes `length` a fraction of it.

  Raises:
    ValueError: if the ramp is longer than the task.
  """
  _check_warm_up(length, epochs)
  if not length:
    return rate

  def at(step, steps):
    ramp = (step + 1) / (steps * (length / epochs))
    return rate(step, steps) * jnp.minimum(ramp, 1)

  return at


def epoch_cosine(
  rate: float, epochs: int, *, warm_up: int = 0, first: float = 0.01
) -> Rate:
  """Half a cosine that moves once an epoch; the recipe of local learning.

  In epoch e = 1, 2, .. with w epochs of warm-up:

    base = rate / 2 (1 + cos(pi e / epochs))
    rate_e = base if e > w else base (e - 1) / w + first (w + 1 - e) / w

  It is 0 throughout the last epoch, which then only moves normalisation
  statistics. Source: the released code of ContSup (arXiv 2312.07636).

  Args:
    rate: the peak of `base`, at e = 0.
    epochs: of a task, whose steps they must divide.
    warm_up: epochs of warm-up.
    first: learning rate of the first epoch, where there is a warm-up.

  Raises:
    ValueError: if the warm-up is longer than the task.
  """
  _check_warm_up(warm_up, epochs)

  def at(step, steps):
    e = 1 + step // (steps // epochs)
    base = rate / 2 * (1 + jnp.cos(jnp.pi * e / epochs))
    if not warm_up:
      return base
    ramp = (base * (e - 1) + first * (warm_up + 1 - e)) / warm_up
    return jnp.where(e <= warm_up, ramp, base)

  return at


def _check_warm_up(length: Number, epochs: Number) -> None:
  if not 0 <= length <= epochs:
    raise ValueError(
      f"optimizer.warm_up={length} does not fit the {epochs} epochs of a "
      f"task; use 0 to {epochs}"
    )
