"""Sections of a run's page on what was learnt; see `report`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mhil import charts, metrics, webpage

Numbers = Mapping[str, Any]
History = Sequence[Sequence[float | int | None]]
Matrix = Float[np.ndarray, "t t"]
AFTER = {
  "class-incremental": "accuracy_after_task",
  "task-id": "task_id_after_task",
  "within-task": "within_task_after_task",
}
_MOST_BESIDE = 8  # tasks whose matrix is no wider than half a page
_MOST_BORDERS = 50  # between tasks; more of them would hide the curves


def accuracy(numbers: Numbers, matrix: Matrix) -> str:
  """Curves after each task, and the accuracy matrix.

  Args:
    numbers: what `metrics.json` holds.
    matrix: its accuracy matrix.
  """
  past = np.where(np.tri(len(matrix), dtype=bool), matrix, np.nan)
  names = [str(t) for t in range(len(matrix))]
  cells = webpage.heat(
    past,
    corner="after",
    rows=names,
    columns=names,
    caption="Accuracy matrix: % on each task (column) after training each "
    "task (row), among the classes of all tasks seen by then.",
  )
  rows = [
    [name, *(percent(numbers[key][t]) for key in AFTER.values())]
    for t, name in enumerate(names)
  ]
  curves = webpage.table(["after task", *AFTER], rows, "After each task, %")
  drawn = webpage.figure(
    _per_task(
      {name: numbers[key] for name, key in AFTER.items()},
      title="Accuracy after each task",
      x="after task",
    ),
    "On the test samples of all tasks seen. Task-id: the right head was "
    "chosen. Within-task: the class is right once the head is given. "
    "Class-incremental: both at once.",
  )
  return _paired(drawn, cells, matrix) + webpage.folded(
    "Numbers of the curves", curves
  )


def forgetting(numbers: Numbers, matrix: Matrix) -> str:
  """What each task lost; arguments as above."""
  if len(matrix) < 2:
    return webpage.missing("One task only, so there was nothing to forget.")
  lost = metrics.forgetting_per_task(matrix)
  end = matrix[-1, :-1]
  best = lost + end
  mean = webpage.paragraph(
    f"On average over the earlier tasks {percent(numbers['forgetting'])} "
    "points were forgotten; backward transfer is "
    f"{percent(numbers['backward_transfer'])} points."
  )
  drawn = webpage.figure(
    _per_task(
      {"best before the last task": best, "after the last task": end},
      title="Accuracy on each task, at its best and at the end",
      x="task",
    ),
    "The gap between the lines is what was forgotten.",
  )
  rows = [
    [str(t), classes, *map(percent, (best[t], end[t], lost[t]))]
    for t, classes in enumerate(_classes(numbers, len(lost)))
  ]
  table = webpage.table(
    ["task", "classes", "best", "at the end", "forgotten"],
    rows,
    "Best accuracy since a task was learnt, without the matrix's last row, "
    "less that at the end; below zero the task gained.",
  )
  return mean + webpage.tabled(drawn, table, len(rows))


def errors(numbers: Numbers, matrix: Matrix) -> str:
  """Heads confused, and task-id against within-task accuracy."""
  if len(matrix) < 2:
    return webpage.missing(
      "One head only: it is always the right one, so no head can be confused "
      "with another."
    )
  if not numbers.get("confusion_between_heads"):
    return webpage.missing("Confusion between heads was not measured.")
  counts = np.array(numbers["confusion_between_heads"])
  shares = counts / counts.sum(1, keepdims=True)
  parts = {
    "task-id": shares.diagonal(),
    "within-task": numbers.get("within_task_per_task", ()),
    "class-incremental": matrix[-1],
  }
  drawn = _per_task(
    {name: values for name, values in parts.items() if len(values)},
    title="Task-id against within-task accuracy after the last task",
    x="samples of task",
  )
  chart = webpage.figure(
    drawn,
    "After the last task, on the samples of each task. A low task-id line: "
    "errors come from the choice of the head. A low within-task line: from the "
    "head itself.",
  )
  cells = webpage.heat(
    shares,
    corner="task",
    rows=[f"{t} ({n:,})" for t, n in enumerate(counts.sum(1))],
    columns=[str(t) for t in range(len(matrix))],
    caption="Confusion between heads after the last task: % of a task's "
    "samples (row, with their number) given to each head (column).",
  )
  return _paired(chart, cells, matrix)


def loss(numbers: Numbers, history: History) -> str:
  """The loss of each head over the steps.

  Args:
    numbers: what `metrics.json` holds.
    history: rows `[step, loss of head 0, ..]`, None where a head was idle.
  """
  if not len(history):
    return webpage.missing("No loss was handed to this page.")
  rows = np.array(history, np.float64)
  opened = np.isfinite(rows[:, 1:]).any(0)
  if opened.sum() <= charts.SERIES:
    heads = np.flatnonzero(opened)
    curves = {f"head {i}": rows[:, 1 + i] for i in heads}
    about = "Mean loss of each head since the point before."
  else:
    curves = _old_and_new(rows[:, 1:])
    about = (
      "Mean loss since the point before: of the head that was opened last, "
      "and of the heads before it their mean and the highest of them."
    )
  borders = np.cumsum(numbers["steps_per_task"])[:-1]
  if len(borders) > _MOST_BORDERS:
    borders = borders[:0]
  if len(borders):
    about += " Dotted: a new task begins."
  drawn = charts.lines(
    [charts.Curve(name, rows[:, 0], y) for name, y in curves.items()],
    title="Loss",
    x="step",
    y="loss",
    borders=borders,
  )
  return webpage.figure(drawn, about)


def percent(share: float) -> str:
  """A share in %, or its difference in points."""
  return f"{100 * share:.1f}"


def _paired(chart: str, cells: str, matrix: Matrix) -> str:
  """A chart and a table of a cell for each pair of tasks."""
  narrow = len(matrix) <= _MOST_BESIDE
  return webpage.beside(chart, cells) if narrow else chart + cells


def _per_task(curves: Mapping[str, Any], *, title: str, x: str) -> str:
  return charts.lines(
    [
      charts.Curve(name, range(len(values)), 100 * np.asarray(values))
      for name, values in curves.items()
    ],
    title=title,
    x=x,
    y="accuracy, %",
    limits=(0.0, 100.0),
  )


def _classes(numbers: Numbers, tasks: int) -> list[str]:
  if "task_sizes" not in numbers:
    return ["unknown"] * tasks
  ends = np.cumsum(numbers["task_sizes"])[:tasks]
  told = []
  for of in np.split(numbers["class_order"], ends)[:-1]:
    first = ", ".join(map(str, of[:6]))
    told.append(first if len(of) <= 6 else f"{first}, .. ({len(of)})")
  return told


def _old_and_new(losses: np.ndarray) -> dict[str, np.ndarray]:
  """Three curves in place of one for each head."""
  known = np.isfinite(losses)
  newest = np.where(known, np.arange(losses.shape[1]), -1).max(1)
  last = np.arange(losses.shape[1]) == newest[:, None]
  old = known & ~last
  some = old.any(1)
  return {
    "newest head": np.where(last, losses, 0).sum(1),
    "older heads, mean": np.where(old, losses, 0).sum(1)
    / np.where(some, old.sum(1), np.nan),
    "older heads, highest": np.where(old, losses, -np.inf).max(1),
  }
