"""Exemplars kept across tasks: an exact, class-balanced store.

The memory is counted over the whole mesh, never per device. Which samples it
holds depends on the seed, the classes seen and the size alone, so it needs no
state: each class has one fixed random order and keeps a prefix of it, which
shortens as classes arrive.
"""

import numpy as np


def balanced(
  labels: np.ndarray, classes: tuple[int, ...], size: int, seed: int
) -> np.ndarray:
  """Rows of the exemplars of the seen classes.

  Args:
    labels: `[n]` class of every training sample.
    classes: the seen classes, in order of arrival.
    size: exemplars in all. Classes that arrived first get one more where it
      does not divide.
    seed: moves which samples are kept.

  Returns:
    `[m]` row numbers, class by class; fewer than `size` only where a class
    has fewer samples than its share.
  """
  if not classes or size <= 0:
    return np.zeros(0, np.int32)
  share, left = divmod(size, len(classes))
  kept = []
  for i, c in enumerate(classes):
    rows = np.flatnonzero(labels == c).astype(np.int32)
    order = np.random.Generator(np.random.Philox([seed, 1_000_003 + c]))
    kept.append(order.permutation(rows)[: share + (i < left)])
  return np.concatenate(kept)
