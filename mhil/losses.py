r"""PAPER 1: cross-entropies for a network whose heads live on different nodes.

Dai, Kong, Zhong, Zhang, Wang, "A Fully Distributed Training for Class
Incremental Learning in Multihead Networks", IEEE INFOCOM Workshops 2023.

With `z` the logits of all heads, `z_m` those of head m, `C_m` its classes:

  ce, distributed_ce   L = log sum_k exp z_k - z_y
  dce                  L = sum_m l_m,  d l_m / d z_j = 0 for j != m
    learned            l_m = CE over (z_m, r_m), y = rest outside C_m
    zero               the same with r_m = 0
    per_class          l_m = sum_{k in C_m} binary CE of z_k
    none               l_m = CE over z_m, own samples only

  CE <= log(1 + sum_k exp z_k) - z_y <= dce("zero") <= dce("per_class")

Mesh axis: `head`. Collectives in a step: `dce` none; `distributed_ce` two
all-reduces (a max and a sum, one float each a sample); `ce` one all-gather
of every logit.

What is ours: only the abstract of the paper is public. It asks for a
cross-entropy that needs no exchange between nodes; the four formulas above,
the reference logit and the prior correction are our reconstruction. The
correction is logit adjustment (Menon et al., ICLR 2021).

Every function here sees one head: logits `[b, c+1]` whose last column is the
reference, and targets `[b]` in 0..c, where c means "none of mine".
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a masked class can never make inf - inf.
MASKED = -1e30

Logits = Float[Array, "b c+1"]
Valid = Bool[Array, " c"]
PerSample = Float[Array, " b"]
Counts = Int[Array, " k"]
Owners = Int[Array, " k"]
Prior = tuple[Float[Array, " k"], Float[Array, " k"]]


class Loss(NamedTuple):
  """A loss of a multi-head network, seen from one head.

  Attributes:
    name: for messages and tables.
    value: `(logits [b, c+1], targets [b], prior [c+1], valid [c], shared) ->
      [b]`, the head's share of each sample's loss, in nats.
    scores: `(logits [b, c+1], valid [c]) -> [b, c]`, what the arg-max over
      all heads compares; padded classes get `MASKED`.
    prior: `(counts [k], owners [k], opened) -> ([k], [k])`, the correction
      that `value` adds to the logits, of each class and of its head's
      reference; see `class_prior`.
    share: None where heads are independent. Else `(logits [l, b, c+1],
      prior [l, c+1], valid [l, c], axis) -> shared`, run before `value` on
      the logits of the device's heads; the only place with traffic over
      `axis`.
  """

  name: str
  value: Callable[..., PerSample]
  scores: Callable[[Logits, Valid], Float[Array, "b c"]]
  prior: Callable[..., Prior]
  share: Callable[..., Any] | None = None


def dce(reference: str = "learned", smoothing: float = 0.0) -> Loss:
  """Distributed cross-entropy: no exchange between heads (our reading).

  Args:
    reference: what a head compares its classes with: `learned` (a logit of
      its own), `zero`, `per_class` (one-vs-rest sigmoids) or `none`.
    smoothing: share of the target that is spread evenly over a head's
      outputs, the reference included (label smoothing, Szegedy et al. 2016).

  Raises:
    ValueError: for another reference.
  """
  family = {
    "learned": (_learned, _log_probability, class_prior),
    "zero": (_zero, _raw, class_prior),
    "per_class": (_per_class, _raw, odds_prior),
    "none": (_none, _own_log_probability, class_prior),
  }
  if reference not in family:
    raise ValueError(
      f"loss.reference={reference!r} is not known; use one of "
      + ", ".join(family)
    )
  value, scores, prior = family[reference]
  value = functools.partial(value, smoothing=smoothing)
  return Loss(f"dce_{reference}", value, scores, prior)


def ce(smoothing: float = 0.0) -> Loss:
  """Centralised cross-entropy: every logit is gathered in every place.

  Args:
    smoothing: share of the target spread evenly over all classes seen.
  """
  return _coupled("ce", _gather, smoothing)


def distributed_ce(smoothing: float = 0.0) -> Loss:
  """Cross-entropy over apart heads, which exchange a max and a sum.

  Args:
    smoothing: share of the target spread evenly over all classes seen.
  """
  return _coupled("distributed_ce", _reduce, smoothing)


def class_prior(counts: Counts, owners: Owners, opened: int | Array) -> Prior:
  """Log prior of each class, and of its head's rest per absent class.

  Training data with class rates q and a balanced test set differ by the
  factor q_k for class k, and by (sum of the others' q) / (their number) for
  the rest; adding its log in the loss leaves balanced scores behind.

  Args:
    counts: `[k]` samples of each class in a step, on average, in any unit.
      Whole numbers, whose sums do not depend on the order of summation.
    owners: `[k]` head of each class.
    opened: number of open heads; the counts of others are 0.

  Returns:
    Two arrays `[k]`, for a class's logit and for its head's reference;
    `MASKED` where there is nothing to draw.
  """
  total, own = jnp.sum(counts), _of_heads(counts, owners)
  here = (owners < opened).astype(jnp.int32)
  absent = jnp.maximum(jnp.sum(here) - _of_heads(here, owners), 1)
  return (
    _log(counts) - _log(total),
    _log(total - own) - _log(absent) - _log(total),
  )


def odds_prior(counts: Counts, owners: Owners, opened: int | Array) -> Prior:
  """Log-odds of a class against its log-odds in a balanced set.

  Args, returns: as `class_prior`; the second array is 0. With a single class
  the odds say nothing and the correction is 0.
  """
  total = jnp.sum(counts)
  classes = jnp.sum((owners < opened).astype(jnp.int32))
  odds = _log(counts) - _log(total - counts) + _log(classes - 1)
  odds = jnp.where((counts > 0) & (counts < total), odds, 0.0)
  return odds, jnp.zeros_like(odds)


def _of_heads(counts, owners):
  """For each class, the sum over its head; there are no more heads."""
  sums = jnp.zeros(counts.size, jnp.int32).at[owners].add(counts)
  return sums[owners]


def _log(whole):
  x = jnp.asarray(whole, jnp.float32)
  return jnp.where(x > 0, jnp.log(jnp.maximum(x, 1.0)), MASKED)


def _pick(table, targets):
  return jnp.take_along_axis(table, targets[:, None], axis=1)[:, 0]


def _mask(logits, valid):
  return jnp.where(jnp.append(valid, True), logits, MASKED)


def _cross_entropy(logits, targets, smoothing):
  logp = jax.nn.log_softmax(logits)
  picked = _pick(logp, targets)
  if not smoothing:
    return -picked
  live = logits > MASKED / 2
  even = jnp.sum(jnp.where(live, logp, 0), 1) / jnp.sum(live, 1)
  return -(1 - smoothing) * picked - smoothing * even


def _learned(logits, targets, prior, valid, shared=None, smoothing=0.0):
  return _cross_entropy(_mask(logits + prior, valid), targets, smoothing)


def _zero(logits, targets, prior, valid, shared=None, smoothing=0.0):
  fixed = jnp.asarray(logits).at[:, -1].set(0)
  return _learned(fixed, targets, prior, valid, smoothing=smoothing)


def _per_class(logits, targets, prior, valid, shared=None, smoothing=0.0):
  # softplus(z) - z y is binary CE; masked classes must add nothing.
  z = (logits + prior)[:, :-1]
  own = jax.nn.one_hot(targets, z.shape[1], dtype=z.dtype)
  own = own * (1 - smoothing) + smoothing / 2
  return jnp.sum(jnp.where(valid, jax.nn.softplus(z) - z * own, 0), axis=1)


def _none(logits, targets, prior, valid, shared=None, smoothing=0.0):
  z = _mask(logits + prior, valid)[:, :-1]
  own = targets < z.shape[1]
  loss = _cross_entropy(z, jnp.where(own, targets, 0), smoothing)
  return jnp.where(own, loss, 0)


def _coupled(name: str, exchange, smoothing: float) -> Loss:
  """CE, from what all heads together say: log sum exp, and their classes."""

  def share(logits, prior, valid, axis):
    # To each head this is a number, not a function: see `value`.
    z = lax.stop_gradient(logits + prior[:, None])[:, :, :-1]
    z = jnp.where(valid[:, None], z, MASKED)
    normaliser = exchange(z, axis)
    if not smoothing:
      return normaliser, None
    live = z[:, 0] > MASKED / 2
    return normaliser, lax.psum(jnp.sum(live).astype(z.dtype), axis)

  def value(logits, targets, prior, valid, shared):
    # Given the normaliser, the gradient p_k - [k = y] of CE is local: `part`
    # has value 0 and gradient p_k. Summed over heads this is CE.
    normaliser, classes = shared
    z = _mask(logits + prior, valid)[:, :-1]
    part = jnp.sum(jnp.exp(z - normaliser[:, None]), axis=1)
    own = targets < z.shape[1]
    picked = _pick(z, jnp.where(own, targets, 0))
    here = jnp.where(own, normaliser - (1 - smoothing) * picked, 0)
    if smoothing:
      live = jnp.where(z > MASKED / 2, z, 0)
      here -= smoothing / classes * jnp.sum(live, axis=1)
    return here + part - lax.stop_gradient(part)

  return Loss(name, value, _raw, class_prior, share)


def _gather(z, axis):
  z = lax.all_gather(z, axis)
  return jax.nn.logsumexp(jnp.moveaxis(z, 2, 0).reshape(z.shape[2], -1), 1)


def _reduce(z, axis):
  top = lax.pmax(jnp.max(z, axis=(0, 2)), axis)
  total = lax.psum(jnp.sum(jnp.exp(z - top[:, None]), axis=(0, 2)), axis)
  return top + jnp.log(total)


def _raw(logits, valid):
  return jnp.where(valid, logits[:, :-1], MASKED)


def _log_probability(logits, valid):
  # Raw logits of two softmaxes do not compare; probabilities do.
  scores = jax.nn.log_softmax(_mask(logits, valid))[:, :-1]
  return jnp.where(valid, scores, MASKED)


def _own_log_probability(logits, valid):
  return jnp.where(valid, jax.nn.log_softmax(_raw(logits, valid)), MASKED)
