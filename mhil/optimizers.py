"""Optimisers of unit learning rate, and learning rates over one task.

The rate multiplies the update at the end, so that momentum is unaffected by
the schedule (the convention of the field's SGD recipes) and one compiled step
serves tasks of any length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Rate = Callable[[jax.Array, jax.Array], jax.Array]


def adam(weight_decay: float = 0.0) -> optax.GradientTransformation:
  """Adam (Kingma & Ba 2015), decay decoupled (Loshchilov & Hutter 2019)."""
  return optax.chain(
    optax.scale_by_adam(), optax.add_decayed_weights(weight_decay)
  )


def sgd(
  momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
  """SGD; decay is added to the gradient before momentum."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.trace(decay=momentum, nesterov=nesterov),
  )


def constant(rate: float) -> Rate:
  """The same learning rate at every step."""
  return lambda step, steps: jnp.full((), rate)


def cosine(rate: float) -> Rate:
  """From `rate` at a task's first step towards 0 after its last."""
  return lambda step, steps: rate / 2 * (1 + jnp.cos(jnp.pi * step / steps))
