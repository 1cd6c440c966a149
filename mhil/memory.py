"""Exemplars kept across tasks; counted over the whole mesh, never a device.

Three parts that combine freely:

  order   which samples of a class come first: `random_order`, `herding`
  shares  how many each class keeps: a fixed total, or so many a class
  update  classes that are kept shorten their order, new ones join with theirs

A random order is a function of (seed, class). A herding order depends on the
features at the time when it was made: what is kept is then state, small enough
to be saved as text (`to_json`).
`reservoir` is the one rule without classes: it judges a stream of samples.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Integer

Rows = Integer[np.ndarray, "_"]
# Classes in order of arrival; of each, its rows in the order of keeping.
Kept = dict[int, Rows]

PROTOCOLS = ("total", "floor", "per_class")
SELECTIONS = ("random", "herding", "reservoir")


def shares(size: int, classes: int, protocol: str = "total") -> tuple[int, ...]:
  """How many exemplars each of the seen classes keeps.

  A class's share never grows when classes arrive, so that shortening is all
  that ever happens to what is kept.

  Args:
    size: exemplars in all, or with `per_class`, of each class.
    classes: number of seen classes.
    protocol: `total` deals all of `size`, classes that arrived first get one
      more where it does not divide; `floor` leaves the remainder empty, as
      the field's toolboxes do; `per_class` keeps `size` of every class.

  Raises:
    ValueError: for another protocol, or a negative size.
  """
  if protocol not in PROTOCOLS:
    raise ValueError(
      f"memory.protocol={protocol!r} is not known; use one of "
      + ", ".join(PROTOCOLS)
    )
  if size < 0:
    raise ValueError(f"memory.size={size} is negative; use 0 or more")
  if protocol == "per_class":
    return (size,) * classes
  share, left = divmod(size, max(classes, 1))
  left = left if protocol == "total" else 0
  return tuple(share + (i < left) for i in range(classes))


def update(
  kept: Mapping[int, Rows],
  orders: Mapping[int, Rows],
  size: int,
  protocol: str = "total",
) -> Kept:
  """What is kept once the classes of `orders` have been learnt.

  Args:
    kept: what was kept before; `{}` at first.
    orders: of each new class, its rows, best first.
    size, protocol: as for `shares`.
  """
  whole = {**kept, **orders}
  counts = shares(size, len(whole), protocol)
  return {c: order[:m] for (c, order), m in zip(whole.items(), counts)}


def rows(kept: Mapping[int, Rows]) -> Rows:
  """All kept rows `[m]` int32, class by class."""
  return np.concatenate([np.zeros(0, np.int32), *kept.values()], dtype=np.int32)


def random_order(labels: Rows, c: int, seed: int) -> Rows:
  """Rows of class `c` in an order that (seed, class) fixes."""
  rows = np.flatnonzero(labels == c).astype(np.int32)
  # Numpy promises the raw stream of Philox for ever, a permutation's not.
  draws = np.random.Philox([seed, 1_000_003 + int(c)]).random_raw(len(rows))
  return rows[np.argsort(draws, kind="stable")]


def herding(features: Float[np.ndarray, "n d"], rows: Rows, count: int) -> Rows:
  """The rows that together stay nearest to their class's mean, best first.

    x_i = f_i / (|f_i| + 1e-8);  mu = mean_i x_i
    p_k = argmin_i |mu - (x_i + sum_{j<k} x_{p_j}) / k|,  i not yet picked

  Welling (ICML 2009), as in iCaRL (Rebuffi et al., CVPR 2017). Of equally
  near rows the first is picked.

  Args:
    features: of one class's samples, by the network that has just learnt it.
    rows: `[n]` their row numbers.
    count: how many to pick; all rows if there are fewer.

  Raises:
    ValueError: for features that are not finite.
  """
  bad = int((~np.isfinite(features).all(1)).sum())
  if bad:
    raise ValueError(
      f"features of {bad} of {len(rows)} samples are not finite; lower "
      "optimizer.learning_rate, or use memory.selection='random'"
    )
  x = _normalised(features)
  mean, total = x.mean(0), np.zeros(x.shape[1])
  left, picked = np.ones(len(x), bool), []
  for k in range(1, min(count, len(x)) + 1):
    far = np.linalg.norm(mean - (total + x) / k, axis=1)
    best = int(np.argmin(np.where(left, far, np.inf)))
    left[best] = False
    total += x[best]
    picked.append(best)
  return rows[np.array(picked, int)].astype(np.int32)


def class_mean(
  features: Float[np.ndarray, "m d"],
) -> Float[np.ndarray, " d"]:
  """Unit-norm mean of one class's normalised exemplars, for nearest mean."""
  mean = _normalised(features).mean(0)
  return mean / np.linalg.norm(mean)


def _normalised(features):
  # float64, so that a sum of thousands does not decide between near rows.
  x = features.astype(np.float64)
  return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-8)


def reservoir(
  rows: Rows, size: int, seed: int = 0, draws: Rows | None = None
) -> Rows:
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


def to_json(kept: Mapping[int, Rows]) -> list[list]:
  """What is kept as `[[class, [row, ..]], ..]`, to be saved as text."""
  return [[int(c), order.tolist()] for c, order in kept.items()]


def from_json(saved: Sequence[Sequence]) -> Kept:
  """The inverse of `to_json`."""
  return {int(c): np.array(order, np.int32) for c, order in saved}
