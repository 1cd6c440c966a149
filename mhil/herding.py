"""Herding: the samples of a class that together stay nearest to its mean."""

import numpy as np
from jaxtyping import Float, Integer

Rows = Integer[np.ndarray, "_"]


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
      "optimizer.learning_rate, or use memory.selection=stream"
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
