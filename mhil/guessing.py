"""Where a chain's states and multipliers come from, and how they learn.

Either auxiliary networks guess them from the image, or a head keeps them for
each training sample, in tables `[n, ...]` of its side state. A guess that was
mended is what the networks learn next, and what the tables hold.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mhil import auxnet as auxnet_lib
from mhil import manual, objectives
from mhil.chain import Chain

Tree = Any


class Guess(NamedTuple):
  """States and scaled multipliers at the interfaces `k = 1..K-1`.

  Attributes:
    states: `lam_k` `[b, ...]`.
    multipliers: `kappa_k / beta` `[b, ...]`; None each in the penalty method.
  """

  states: list[Array]
  multipliers: list[Array | None]


class Guesser(NamedTuple):
  """Makes guesses and learns from them.

  Attributes:
    params: `key -> {name: params}` of the auxiliary networks.
    side: `() -> side state` of one head: `step`, and tables by sample.
    guess: `(params, stats, side, batch) -> Guess`.
    learn: `(params, batch, mended) -> gradients` of the auxiliary networks.
    store: `(side, batch, mended) -> side`.
    states: `(params, images) -> lam_k` of any images; none where they are kept
      by sample.
    costs: multiply-adds of each auxiliary network, for one sample.
    multipliers: whether auxiliary networks give multipliers.
    at: `k -> Guesser` of one interface alone, for a device that knows no other;
      None where they are kept by sample.
  """

  params: Callable[[Array], Tree]
  side: Callable[[], Tree]
  guess: Callable[[Tree, Tree, Tree, objectives.Batch], Guess]
  learn: Callable[[Tree, objectives.Batch, Guess], Tree]
  store: Callable[[Tree, objectives.Batch, Guess], Tree]
  states: Callable[[Tree, Array], list[Array]]
  costs: tuple[int, ...]
  multipliers: bool
  at: Callable[[int], "Guesser"] | None


def by_network(
  aux: auxnet_lib.AuxNet,
  chain: Chain,
  *,
  multipliers: str = "none",
  samples: int = 0,
  rate: float = 1.0,
) -> Guesser:
  """Guesses of auxiliary networks.

  Args:
    aux: the networks.
    chain: whose interfaces.
    multipliers: `none`, `network` (needs the second heads of `aux`) or
      `sample`.
    samples: training samples, for `sample`.
    rate: the networks' gradients are multiplied by it; at 0 they do not learn.
  """
  tables = samples if multipliers == "sample" else 0
  side = _tables(chain, tables, states=False)

  def guess(params, stats, side, batch):
    found = [aux.run(n, params[n], batch.images) for n in aux.names]
    states = [state for state, _ in found]
    if multipliers == "sample":
      kept = [t[batch.number] for t in side["multipliers"]]
      return Guess(states, kept)
    return Guess(states, [u for _, u in found])

  def learn(params, batch, mended):
    own = {n: params[n] for n in aux.names}
    return jax.grad(loss)(own, batch, lax.stop_gradient(mended))

  def loss(params, batch, mended):
    total: Any = 0.0
    for name, *goal in zip(aux.names, *mended, strict=True):
      found = aux.run(name, params[name], batch.images)
      size = _over_data(_squares(goal[0], batch.weight)) + 1e-12
      for a, b in zip(found, goal, strict=True):
        if a is not None:
          total += rate * _squares(a - b, batch.weight) / size
    return total

  def store(side, batch, mended):
    return _store(side, batch, None, mended.multipliers)

  def states(params, images):
    return [aux.run(n, params[n], images)[0] for n in aux.names]

  def at(k):
    one = aux._replace(names=aux.names[k - 1 : k], costs=aux.costs[k - 1 : k])
    return by_network(one, chain, multipliers=multipliers, rate=rate)

  apart = None if tables else at
  return Guesser(
    aux.init,
    side,
    guess,
    learn,
    store,
    states,
    aux.costs,
    multipliers == "network",
    apart,
  )


def by_sample(chain: Chain, samples: int, *, multipliers: bool) -> Guesser:
  """Guesses that are variables: what a sample's visit before left.

  The historical form, without auxiliary networks. A sample's first states are
  those of the chain itself, which therefore runs in every step.

  Args:
    chain: whose interfaces.
    samples: training samples.
    multipliers: whether to keep them too.
  """

  def guess(params, stats, side, batch):
    x, states = batch.images, []
    old = side["seen"][batch.number]
    for k, table in enumerate(side["states"]):
      x, _ = chain.run(k, params, stats, x, True)
      was = old.reshape(-1, *(1 for _ in x.shape[1:]))
      states.append(jnp.where(was, table[batch.number], x))
    kept = [t[batch.number] for t in side["multipliers"]]
    return Guess(states, kept if multipliers else [None] * len(states))

  def store(side, batch, mended):
    kept = mended.multipliers if multipliers else None
    return _store(side, batch, mended.states, kept)

  side = _tables(chain, samples, states=True, multipliers=multipliers)
  return Guesser(
    lambda key: {},
    side,
    guess,
    lambda params, batch, mended: {},
    store,
    lambda params, images: [],
    (),
    False,
    None,
  )


def _tables(chain, samples, states, multipliers=True):
  def blank():
    shapes = chain.shapes[1:] if samples else ()
    tables = [jnp.zeros((samples, *shape)) for shape in shapes]
    seen = {"seen": jnp.zeros(samples, bool)} if states and samples else {}
    return {
      "step": jnp.zeros((), jnp.int32),
      "states": tables if states else [],
      "multipliers": tables if multipliers else [],
      **seen,
    }

  return blank


def _store(side, batch, states, multipliers):
  """The tables with what this batch brought, from all workers alike."""
  new = {**side, "step": side["step"] + 1}
  if not side["states"] and not side["multipliers"]:
    return new
  number = _everyones(batch.number)
  counted = _everyones((batch.weight > 0).astype(jnp.float32))
  size = len([*side["states"], *side["multipliers"]][0])
  visits = jnp.zeros(size).at[number].add(counted)
  # A sample may be in a batch twice, if a memory drew it.
  share = counted / jnp.maximum(visits[number], 1)

  def put(table, new):
    shape = -1, *(1 for _ in new.shape[1:])
    change = share.reshape(shape) * (_everyones(new) - table[number])
    return table.at[number].add(change)

  for name, values in ("states", states), ("multipliers", multipliers):
    if side[name]:
      new[name] = [put(t, v) for t, v in zip(side[name], values, strict=True)]
  if states is not None:
    new["seen"] = side["seen"] | (visits > 0)
  return new


def _squares(x, weight):
  return jnp.sum(weight * jnp.sum(x * x, axis=tuple(range(1, x.ndim))))


def _everyones(x):
  """The rows of all workers, on each of them."""
  if "data" not in manual.varying(x):
    return x
  # A sum, as each worker is to know that all have the same.
  blank = jnp.zeros((lax.axis_size("data"), *x.shape), x.dtype)
  rows = lax.psum(blank.at[lax.axis_index("data")].set(x), "data")
  return rows.reshape(-1, *x.shape[1:])


def _over_data(x):
  return lax.psum(x, "data") if "data" in manual.varying(x) else x
