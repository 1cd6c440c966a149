"""The accuracy matrix and what follows from it.

`matrix[i, j]` is the accuracy on the test samples of task `j` after training
task `i`, in [0, 1], among the classes of all tasks seen by then. A cell above
the diagonal (a task still to come) is NaN unless it was measured.

Forgetting has several definitions in use, and papers seldom say which; here
they stand side by side. Every average is computed in float64.
"""

import csv
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Matrix = Float[np.ndarray, "t t"]
PerTask = Float[np.ndarray, "t"]
Sizes = Sequence[int] | np.ndarray


class Tally(NamedTuple):
  """Integer counts of one evaluation, by the sample's true task.

  Attributes:
    total: `[t]` samples.
    correct: `[t]` the class is right among the classes of all open heads.
    head_correct: `[t]` the chosen class lies in the right head.
    within_correct: `[t]` the class is right among those of the true head,
      that is, with the task given.
    top5: `[t]` the class is among the five best of all open heads.
    confusion: `[t, t]` true head by chosen head.
  """

  total: Any
  correct: Any
  head_correct: Any
  within_correct: Any
  top5: Any
  confusion: Any


def accuracy(tally: Tally) -> float:
  """Class-incremental accuracy over all samples of the tasks seen."""
  return _share(tally.correct, tally.total)


def task_id_accuracy(tally: Tally) -> float:
  """Share of all samples for which the right head was chosen."""
  return _share(tally.head_correct, tally.total)


def within_task_accuracy(tally: Tally) -> float:
  """Share of all samples whose class is right once the head is given."""
  return _share(tally.within_correct, tally.total)


def top5_accuracy(tally: Tally) -> float:
  """Share of all samples whose class is among the five best."""
  return _share(tally.top5, tally.total)


def task_accuracies(tally: Tally) -> PerTask:
  """Accuracy `[t]` on each true task: a row of the accuracy matrix.

  A task without samples has no accuracy, so its entry is NaN.
  """
  total = np.asarray(tally.total, np.float64)
  correct = np.asarray(tally.correct, np.float64)
  nothing = np.full(total.shape, np.nan)
  return np.divide(correct, total, out=nothing, where=total > 0)


def step_accuracy(matrix: Matrix, sizes: Sizes | None = None) -> PerTask:
  """Accuracy over all tasks seen, after each task.

  `step[i] = sum_{j<=i} sizes[j] matrix[i, j] / sum_{j<=i} sizes[j]`. With the
  test samples of each task as sizes (or its classes, where all classes have
  equally many), it is the accuracy over all test samples seen.

  Args:
    matrix: accuracy matrix `[t, t]`; NaN is allowed above the diagonal only.
    sizes: weight of each task `[t]`; None weighs all tasks alike.

  Returns:
    The accuracies `[t]`.

  Raises:
    ValueError: if a seen task was not measured, or `sizes` does not fit.
  """
  matrix = _measured(matrix)
  weights = np.tril(np.broadcast_to(_weights(matrix, sizes), matrix.shape))
  # NaN times a weight of zero is still NaN, so the future is cleared first.
  return (np.tril(matrix) * weights).sum(1) / weights.sum(1)


def average_incremental_accuracy(
  matrix: Matrix, sizes: Sizes | None = None
) -> float:
  """Mean of `step_accuracy` over the tasks, the first one included.

  The field's headline number (Rebuffi et al., iCaRL, CVPR 2017). Arguments
  and errors are those of `step_accuracy`.
  """
  return float(step_accuracy(matrix, sizes).mean())


def last_accuracy(matrix: Matrix, sizes: Sizes | None = None) -> float:
  """Accuracy over all tasks after the last one: `step_accuracy[-1]`."""
  return float(step_accuracy(matrix, sizes)[-1])


def average_accuracy(matrix: Matrix) -> float:
  """Mean of the last row: every task counts alike, whatever its size.

  `ACC` of Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017.
  """
  return last_accuracy(matrix)


def forgetting(matrix: Matrix, variant: str = "chaudhry") -> float:
  """How much accuracy the earlier tasks lost from their best to the end.

  `mean_{j<t-1} (max_l matrix[l, j] - matrix[t-1, j])`, where `l` runs over

    chaudhry   j <= l < t-1: since the task was learnt, without the last row,
               so that a task which gained counts below zero
    full_max   0 <= l < t-1: rows before the task was learnt too, where they
               were measured; the letter of the definition
    clipped    j <= l <= t-1: the last row too, so never below zero

  Chaudhry et al., Riemannian Walk, ECCV 2018. Toolboxes differ: FACIL has
  `chaudhry`; PyCIL and mammoth `clipped`; avalanche's forgetting is minus
  `backward_transfer`.

  Args:
    matrix: accuracy matrix `[t, t]`; NaN is allowed above the diagonal only.
    variant: which rows the maximum is taken over, one of the names above.

  Returns:
    The forgetting; 0.0 with one task.

  Raises:
    ValueError: if a seen task was not measured, or `variant` is unknown.
  """
  lost = forgetting_per_task(matrix, variant)
  return float(lost.mean()) if len(lost) else 0.0


def forgetting_per_task(
  matrix: Matrix, variant: str = "chaudhry"
) -> Float[np.ndarray, " n"]:
  """What `forgetting` is the mean of: `[t-1]`, for every task but the last.

  Arguments and errors are those of `forgetting`.
  """
  if variant not in ("chaudhry", "full_max", "clipped"):
    raise ValueError(
      f"variant={variant!r} is no forgetting; use 'chaudhry', 'full_max' or "
      "'clipped'"
    )
  matrix = _measured(matrix)
  tasks = len(matrix)
  if tasks == 1:
    return np.zeros(0)
  rows = matrix if variant == "clipped" else matrix[:-1]
  learnt = np.tri(len(rows), tasks, dtype=bool)
  counted = ~np.isnan(rows) if variant == "full_max" else learnt
  best = np.where(counted, rows, -np.inf).max(0)
  return (best - matrix[-1])[:-1]


def backward_transfer(matrix: Matrix) -> float:
  """Change of the earlier tasks' accuracy since each was learnt.

  `mean_{j<t-1} (matrix[t-1, j] - matrix[j, j])`; 0.0 with one task. Lopez-Paz
  and Ranzato, Gradient Episodic Memory, NeurIPS 2017.

  Raises:
    ValueError: if a seen task was not measured.
  """
  matrix = _measured(matrix)
  if len(matrix) == 1:
    return 0.0
  return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def forward_transfer(matrix: Matrix, baseline: PerTask) -> float:
  """What earlier tasks did for a task before it was learnt.

  `mean_{j>0} (matrix[j-1, j] - baseline[j])`; 0.0 with one task. Lopez-Paz
  and Ranzato, Gradient Episodic Memory, NeurIPS 2017.

  Args:
    matrix: accuracy matrix `[t, t]` with the cells just above the diagonal
      measured.
    baseline: accuracy `[t]` of a freshly initialised network on each task.

  Returns:
    The forward transfer.

  Raises:
    ValueError: if a seen or a next task was not measured.
  """
  matrix = _measured(matrix)
  if len(matrix) == 1:
    return 0.0
  ahead = matrix.diagonal(1)
  if np.isnan(ahead).any():
    j = int(np.isnan(ahead).argmax()) + 1
    raise ValueError(
      f"matrix[{j - 1}, {j}] is NaN; forward transfer needs task {j} to be "
      "measured before it is learnt"
    )
  return float((ahead - np.asarray(baseline, np.float64)[1:]).mean())


def summary(matrix: Matrix, sizes: Sizes | None = None) -> dict[str, float]:
  """The numbers a run reports, as plain floats that JSON can hold.

  Arguments and errors are those of `step_accuracy`.
  """
  return {
    "average_incremental_accuracy": average_incremental_accuracy(matrix, sizes),
    "last_accuracy": last_accuracy(matrix, sizes),
    "average_accuracy": average_accuracy(matrix),
    "forgetting": forgetting(matrix),
    "backward_transfer": backward_transfer(matrix),
  }


def write_csv(matrix: Matrix, path: str | os.PathLike[str]) -> None:
  """Writes `after_task,task_0,..` and a row a task; NaN leaves a cell empty.

  Numbers keep all their digits, so that reading gives the same floats back.
  """
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["after_task"] + [f"task_{j}" for j in range(len(matrix))])
    for i, row in enumerate(matrix.tolist()):
      writer.writerow([i] + ["" if np.isnan(value) else value for value in row])


def _share(part: np.ndarray, total: np.ndarray) -> float:
  samples = int(np.sum(total))
  if samples == 0:
    raise ValueError("total=0 samples were evaluated; give a test set")
  return int(np.sum(part)) / samples


def _measured(matrix: Matrix) -> Matrix:
  """The matrix in float64, once every seen task is known to be measured."""
  matrix = np.asarray(matrix, np.float64)
  if matrix.ndim != 2 or len(set(matrix.shape)) != 1 or not matrix.size:
    raise ValueError(
      f"matrix has shape {matrix.shape}; use a row and a column for each task"
    )
  holes = np.argwhere(np.isnan(np.tril(matrix)))
  if len(holes):
    i, j = holes[0]
    raise ValueError(
      f"matrix[{i}, {j}] is NaN though task {j} was seen by then; measure it, "
      "or pass the finished tasks only, matrix[:n, :n]"
    )
  return matrix


def _weights(matrix: Matrix, sizes: Sizes | None) -> PerTask:
  tasks = len(matrix)
  weights = np.ones(tasks) if sizes is None else np.asarray(sizes, np.float64)
  if weights.shape != (tasks,) or not (weights > 0).all():
    raise ValueError(
      f"sizes={weights.tolist()} does not weigh {tasks} tasks; give one "
      "positive number for each"
    )
  return weights
