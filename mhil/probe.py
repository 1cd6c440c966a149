"""How much of the classes a linear readout finds in given features."""

import numpy as np
from jaxtyping import Float, Int


def accuracy(
  train: Float[np.ndarray, "n f"],
  train_labels: Int[np.ndarray, " n"],
  test: Float[np.ndarray, "m f"],
  test_labels: Int[np.ndarray, " m"],
  penalty: float = 1e-3,
) -> float:
  """Test accuracy of a linear probe: ridge regression to one-hot classes.

    W = argmin |Z W - Y|^2 / n + penalty |W|^2,  Z standardised, Y centred

  In closed form, so that there is nothing to tune and no seed.

  Args:
    train, train_labels: what the probe learns from.
    test, test_labels: what it is measured on.
    penalty: of the squared weights, against features of variance one.
  """
  mean, std = train.mean(0), train.std(0)
  scale = np.where(std > 1e-6, std, np.inf)
  z, unseen = ((x.astype(np.float64) - mean) / scale for x in (train, test))
  y = np.eye(int(train_labels.max()) + 1)[train_labels]
  gram = z.T @ z / len(z) + penalty * np.eye(z.shape[1])
  weights = np.linalg.solve(gram, z.T @ (y - y.mean(0)) / len(z))
  guessed = (unseen @ weights + y.mean(0)).argmax(1)
  return float((guessed == test_labels).mean())
