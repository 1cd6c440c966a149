"""Rows that are drawn on some workers and wanted on others: one all-to-all.

Every worker knows which rows are drawn. They are sorted by owner and dealt to
the workers in turn, from a random one on: draw p of the sorted ones goes to
worker `(p + shift) mod w`. Each worker is dealt equally many, each row is as
likely to go to any worker, and of the n rows of one owner none gets more than
`ceil(n / w)`.

An exchange has a fixed shape: as many rows for every pair of workers. All
rows may be drawn from one worker, so no fixed shape smaller than `r` rows a
pair is enough for every draw. With `chunk` it is smaller, and in the rare case
that a draw needs more, the same exchange is repeated.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key, Num

from mhil import choose, manual

# Bytes to each worker that are not worth a loop: it cannot run beside other
# work, while one exchange can.
SMALL = 2**24


class Plan(NamedTuple):
  """One worker's part in an exchange.

  Attributes:
    mine: `[r]` the draws that it is dealt, as places in the order of drawing.
    owner: `[r]` whose rows they are.
    entry: `[r]` at which place of what their owner sends to this worker.
    send: `[w, r]` places in the order of drawing of what this worker sends to
      each, in the order of sending; anything where it sends less.
    most: `[]` the most rows that any worker sends to any other.
  """

  mine: Any
  owner: Any
  entry: Any
  send: Any
  most: Any


def deal(
  owner: Int[Array, "n"], workers: int, key: Key[Array, ""], me: Int[Array, ""]
) -> Plan:
  """The part of worker `me` in dealing n draws; n is a multiple of w.

  Args:
    owner: `[n]` whose row each draw is; `workers` for nobody's.
    workers: devices along `data`.
    key: moves which worker comes first.
    me: this worker.
  """
  n, r = owner.size, owner.size // workers
  order = jnp.argsort(owner, stable=True)
  has = jnp.zeros(workers, jnp.int32).at[owner].add(1, mode="drop")
  start = jnp.cumsum(has) - has
  shift = choose.below(key, (), workers)

  place = jnp.arange(r) * workers + (me - shift) % workers
  mine = order[place]
  source = jnp.minimum(owner[mine], workers - 1)
  entry = (place - start[source]) // workers

  # The first of this worker's rows that goes to each worker, then every w-th.
  first = (jnp.arange(workers) - shift - start[me]) % workers
  place = start[me] + first[:, None] + jnp.arange(r)[None] * workers
  send = order[jnp.minimum(place, n - 1)]
  return Plan(mine, source, entry, send, jnp.max(-(-has // workers)))


def move(
  rows: Any,
  slot: Int[Array, "n"],
  plan: Plan,
  chunk: int | None,
) -> tuple[Num[Array, "r ..."], Num[Array, "..."]]:
  """The rows dealt to this worker, and an array that waits for its reads.

  Args:
    rows: `[m, ...]` this worker's, or what stands for them.
    slot: `[n]` which of its owner's rows each draw is.
    plan: this worker's.
    chunk: as of `room_for`.
  """
  workers, count = plan.send.shape
  room = room_for(count, rows.shape[0], workers, chunk)

  def once(i):
    entry = jnp.minimum(i * room + jnp.arange(room), count - 1)
    sent = rows[slot[plan.send[:, entry]]]
    came = lax.all_to_all(sent, "data", 0, 0, tiled=True)
    place = jnp.clip(plan.entry - i * room, 0, room - 1)
    return came[plan.owner, place], sent

  if room == room_for(count, rows.shape[0], workers, None):
    return once(0)

  def again(state):
    i, held = state
    here, k = plan.entry // room == i, jnp.arange(count)
    to = jnp.where(here, k, k + count)
    held = held.at[to].set(once(i)[0], mode="drop", unique_indices=True)
    return i + 1, held

  blank = jnp.zeros((count, *rows.shape[1:]), rows.dtype)
  _, held = lax.while_loop(
    lambda state: state[0] * room < plan.most,
    again,
    (jnp.zeros((), jnp.int32), manual.vary(blank, "data")),
  )
  return held, held


def room_for(count: int, slots: int, workers: int, chunk: int | None) -> int:
  """Rows that an exchange has room for, from a worker to another.

  Args:
    count: rows that every worker is dealt.
    slots: rows that a worker may have.
    workers: devices along `data`.
    chunk: at most so many; None for as many as can ever come.
  """
  most = min(count, -(-slots // workers))
  return most if chunk is None else min(most, chunk)


def chunk_for(
  count: int, slots: int, workers: int, row_bytes: int
) -> int | None:
  """A chunk that saves padding where there is much, and is rarely too small.

  With as many rows on every worker, n of its rows are drawn, `count` in the
  mean, and Bernstein's bound for a sample without replacement is
  `P(n >= count + x) <= exp(-x^2 / (2 count + 2 x / 3))`. The chunk is too
  small for one draw in a thousand at most.

  Args:
    count, slots, workers: as of `room_for`.
    row_bytes: of one row.

  Returns:
    None where one exchange for all is small, or a chunk would not halve it.
  """
  most = room_for(count, slots, workers, None)
  bound = math.log(1000 * workers)
  x = bound / 3 + math.sqrt(bound**2 / 9 + 2 * bound * count)
  chunk = math.ceil((count + x) / workers)
  if workers * most * row_bytes <= SMALL or 2 * chunk > most:
    return None
  return chunk
