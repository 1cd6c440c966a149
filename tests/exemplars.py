"""Exact rules of exemplars, by row numbers: references for the buffer.

`shares` and `update` say how many samples each class keeps, `reservoir` is
Vitter's algorithm R. The library keeps rows on devices by the same rules.
"""

import numpy as np

PROTOCOLS = ("total", "floor", "per_class")


def shares(size, classes, protocol="total"):
  """How many exemplars each of the seen classes keeps.

  A class's share never grows when classes arrive, so that shortening is all
  that ever happens to what is kept.

  Args:
    size: exemplars in all, or with `per_class`, of each class.
    classes: number of seen classes.
    protocol: `total` deals all of `size`, classes that arrived first get one
      more where it does not divide; `floor` leaves the remainder empty, as
      the field's toolboxes do; `per_class` keeps `size` of every class.
  """
  if protocol == "per_class":
    return (size,) * classes
  share, left = divmod(size, max(classes, 1))
  left = left if protocol == "total" else 0
  return tuple(share + (i < left) for i in range(classes))


def update(
  kept,
  orders,
  size,
  protocol="total",
):
  """What is kept once the classes of `orders` have been learnt.

  Args:
    kept: what was kept before; `{}` at first.
    orders: of each new class, its rows, best first.
    size, protocol: as for `shares`.
  """
  whole = {**kept, **orders}
  counts = shares(size, len(whole), protocol)
  return {c: order[:m] for (c, order), m in zip(whole.items(), counts)}


def rows(kept):
  """All kept rows `[m]` int32, class by class."""
  return np.concatenate([np.zeros(0, np.int32), *kept.values()], dtype=np.int32)


def random_order(labels, c, seed):
  """Rows of class `c` in an order that (seed, class) fixes."""
  rows = np.flatnonzero(labels == c).astype(np.int32)
  # Numpy promises the raw stream of Philox for ever, a permutation's not.
  draws = np.random.Philox([seed, 1_000_003 + int(c)]).random_raw(len(rows))
  return rows[np.argsort(draws, kind="stable")]


def reservoir(rows, size, seed=0, draws=None):
  """An even sample of a stream, blind to classes (Vitter 1985, algorithm R).

  The first `size` rows fill the slots. Row t after them draws one of 0..t;
  it replaces the slot of that number, and is dropped if there is none. Draws
  depend on (seed, t) alone, so a longer stream goes on where a shorter ended
  and nothing needs to be stored.

  Args:
    rows: `[n]` all rows so far, in order of arrival.
    size: slots, over the whole mesh.
    seed: moves the draws.
    draws: `[n - size]` to use instead, draw `i` out of `0..size+i`.

  Returns:
    `[min(n, size)]` the rows held, slot by slot.
  """
  slots, later = rows[:size].astype(np.int32), rows[size:]
  if draws is None:
    # Numpy promises the raw stream of Philox for ever, other draws not.
    raw = np.random.Philox([seed, 1_000_033]).random_raw(len(later))
    # Off from even by less than rows / 2^64.
    draws = (raw % np.arange(size + 1, len(rows) + 1, dtype=np.uint64)).astype(
      np.int64
    )
  taken = draws < size
  # Where a slot is written twice, numpy keeps the last, as the stream does.
  slots[draws[taken]] = later[taken]
  return slots
