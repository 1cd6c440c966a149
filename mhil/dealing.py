"""Units that change owner: one exchange by permutation over `subnet`.

n devices hold m units each. Where units are, and where they are wanted, is
known to all as tables `[n, m]`, so every device works out what it sends to
which, and nothing but the units themselves is sent.

A uniform permutation moves another number of units between each pair, m / n
in the mean, while a compiled exchange has one shape. So it has `room` for a
number that seldom does not do, and is repeated where it does not.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Num

from mhil import manual

Table = Int[Array, "n m"] | Int[np.ndarray, "n m"]


class Route(NamedTuple):
  """Where each wanted unit is.

  Attributes:
    owner: `[n, m]` the device that has the unit of each wanted place.
    place: `[n, m]` where it lies there.
    rank: `[n, m]` its number among those that its owner sends to this device.
    most: `[]` the most units that one device sends to another or keeps.
  """

  owner: Any
  place: Any
  rank: Any
  most: Any


def route(old: Table, new: Table) -> Route:
  """The way from one table to another of the same units."""
  n, m = old.shape
  flat = jnp.arange(n * m, dtype=jnp.int32)
  there = jnp.zeros_like(flat).at[jnp.asarray(old).reshape(-1)].set(flat)
  owner, place = jnp.divmod(there[jnp.asarray(new)], m)
  sent = owner[:, :, None] == jnp.arange(n)[None, None]
  so_far = jnp.cumsum(sent.astype(jnp.int32), axis=1)
  rank = jnp.take_along_axis(so_far, owner[:, :, None], axis=2)[:, :, 0] - 1
  return Route(owner, place, rank, jnp.max(so_far))


def room_for(n: int, m: int) -> int:
  """Units that an exchange has room for between two devices.

  The number is hypergeometric, close to Poisson of mean m / n: three standard
  deviations more are too few for some pair in one round of ten or less.
  """
  mean = m / n
  return min(m, math.ceil(mean + 3 * math.sqrt(mean)))


def move(x: Num[Array, "m ..."], way: Route) -> Num[Array, "m ..."]:
  """This device's units in the order of the new table; in `shard_map`.

  Args:
    x: its units in the order of the old table.
    way: from the old to the new.
  """
  n, m = way.owner.shape
  me, room = lax.axis_index("subnet"), room_for(n, m)

  def once(trip, y):
    turn = way.rank - trip * room
    now = (turn >= 0) & (turn < room)
    slot = jnp.where(now & (way.owner == me), _slot(room, turn), n * room)
    send = jnp.zeros(n * room, jnp.int32)
    send = send.at[slot.reshape(-1)].set(way.place.reshape(-1), mode="drop")
    came = lax.all_to_all(x[send], "subnet", 0, 0, tiled=True)
    entry = jnp.where(now, way.owner * room + turn, 0)[me]
    here = now[me].reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(here, came[entry], y)

  y = manual.vary(x, "subnet")
  if room == m:
    return once(0, y)

  def again(state):
    trip, y = state
    return trip + 1, once(trip, y)

  start = jnp.zeros((), jnp.int32)
  return lax.while_loop(lambda s: s[0] * room < way.most, again, (start, y))[1]


def trips(old: np.ndarray, new: np.ndarray) -> int:
  """How often the exchange from `old` to `new` is made."""
  return -(-int(route(old, new).most) // room_for(*old.shape))


def _slot(room: int, turn: jax.Array) -> jax.Array:
  # Row k of `turn` is what device k wants.
  return jnp.arange(turn.shape[0])[:, None] * room + turn
