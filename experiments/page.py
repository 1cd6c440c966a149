"""The page of a comparison: tables, and the figures beside them."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import layers_table, measure, suites
from mhil import comparison, sharding

# By a row's label, the numbers of its runs, seed after seed.
Done = dict[str, list[dict[str, Any]]]
Bounds = dict[str, list[float]]
MEASURE = "average incremental accuracy, %"
COLUMNS = {
  "average_incremental_accuracy": "average incremental",
  "last_accuracy": "last",
  "top5_accuracy": "top 5",
  "task_id_accuracy": "task id",
  "within_task_accuracy": "within task",
  "forgetting": "forgetting",
}


def write(
  out: pathlib.Path,
  suite: str,
  about: list[str],
  done: Done,
  after: Sequence[str] = (),
) -> None:
  """Writes mean and standard deviation over seeds as Markdown and CSV.

  Args:
    out: the files without their endings.
    suite: name of the rows.
    about: lines of Markdown on how they were made.
    done: the rows that there are.
    after: lines of Markdown behind the first table.
  """
  out.parent.mkdir(parents=True, exist_ok=True)
  head = ["row", "seeds", *COLUMNS.values(), "s a run"]
  head += [f"bytes over {axis} a step" for axis in _axes(done)]
  body = [_cells(label, runs, _axes(done)) for label, runs in done.items()]
  lines = [
    f"# Comparison `{suite}`",
    "",
    *about,
    "",
    *measure.grid(head, body),
    *after,
    *(_costs(done) if suite in suites.COSTS else []),
    *(layers_table.lines(done) if suite in suites.LAYERS else []),
    *_distances(suites.SUITES[suite], done),
  ]
  out.with_suffix(".md").write_text("\n".join(lines) + "\n")
  with out.with_suffix(".csv").open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "seed", *COLUMNS])
    for label, runs in done.items():
      for run in runs:
        writer.writerow([label, run["seed"], *(run[c] for c in COLUMNS)])


def draw(
  out: pathlib.Path,
  rows: Sequence[suites.Row],
  done: Done,
) -> None:
  """Draws the table, and the curves through rows that scan a number."""
  comparison.rows(columns(done), out.with_suffix(".png"))
  curves, bounds = scans(rows, done)
  if curves:
    scan = out.with_name(f"{out.name}_scan.png")
    comparison.scans(curves, bounds, scan, MEASURE)


def columns(done: Done) -> dict[str, dict[str, list[float]]]:
  """Values over seeds of what is drawn: by column, then by row."""
  numbers = {
    MEASURE: _accuracy,
    "last accuracy, %": lambda run: 100 * run["last_accuracy"],
    "seconds a run": _seconds,
  }
  return {
    column: {label: [of(run) for run in runs] for label, runs in done.items()}
    for column, of in numbers.items()
  }


def scans(
  rows: Sequence[suites.Row], done: Done
) -> tuple[dict[str, dict[str, dict[float, list[float]]]], Bounds]:
  """What rows measure against a number that they differ in.

  Args:
    rows: of the suite.
    done: those that there are.

  Returns:
    Values over seeds `{number: {curve: {place: values}}}`, and those of rows
    to hold beside them.
  """

  def over_seeds(label):
    return [_accuracy(run) for run in done[label]]

  there = [row for row in rows if row.label in done]
  numbers = dict.fromkeys(number for row in there for number in row.at)
  curves = {
    number: {
      curve: {
        row.at[number]: over_seeds(row.label)
        for row in there
        if number in row.at and row.curve == curve
      }
      for curve in dict.fromkeys(r.curve for r in there if number in r.at)
    }
    for number in numbers
  }
  return curves, {
    row.label: over_seeds(row.label) for row in there if row.bound
  }


def _axes(done: Done) -> list[str]:
  """Axes of the mesh that any row is cut along; `head` always."""
  meshes = [runs[0]["mesh"] for runs in done.values()]
  cut = [axis for axis in sharding.AXES if any(m[axis] > 1 for m in meshes)]
  return cut if "head" in cut else ["head", *cut]


def _cells(
  label: str, runs: list[dict[str, Any]], axes: list[str]
) -> list[str]:
  cells = [label, str(len(runs))]
  for name in COLUMNS:
    cells.append(measure.mean_of(100 * np.array([run[name] for run in runs])))
  seconds = np.mean([_seconds(run) for run in runs])
  moved = [
    sum(c["bytes"] for c in runs[0]["collectives"] if axis in c["axes"])
    for axis in axes
  ]
  return [*cells, f"{seconds:.1f}", *(f"{each:,}" for each in moved)]


def _distances(rows: Sequence[suites.Row], done: Done) -> list[str]:
  """How far rows are from the best accuracy and the least time, as a table."""
  ends = {row.bound: row.label for row in rows if row.bound}
  if not {"upper", "lower"} <= ends.keys() or not set(ends.values()) <= set(
    done
  ):
    return []

  def of(label, number):
    return np.array([number(run) for run in done[label]])

  best = of(ends["upper"], _average)
  least = of(ends["lower"], _seconds).mean()
  lines = [
    "",
    f"Points of average incremental accuracy below `{ends['upper']}`, seed by "
    f"seed, and time in that of `{ends['lower']}`.",
    "",
  ]
  body = []
  for label, runs in done.items():
    below = 100 * (best[: len(runs)] - of(label, _average)[: len(best)]).mean()
    times = of(label, _seconds).mean() / least
    body.append([label, f"{below:.1f}", f"{times:.2f}"])
  return [*lines, *measure.grid(["row", "points below", "times as long"], body)]


def _average(run: dict[str, Any]) -> float:
  return run["average_incremental_accuracy"]


def _accuracy(run: dict[str, Any]) -> float:
  return 100 * _average(run)


def _seconds(run: dict[str, Any]) -> float:
  return sum(run["seconds_per_task"])


def _costs(done: Done) -> list[str]:
  """What a head costs, row by row: a table of its own."""
  lines = [
    "",
    "Of one head: numbers trained, and those that predict; multiply-adds of a "
    "prediction; temporary memory of the compiled step.",
    "",
  ]
  head = ["row", "trained", "predict", "10^6 multiply-adds", "temporary MiB"]
  body = []
  for label, (run, *_) in done.items():
    used = run["inference"]
    cells = [
      label,
      f"{run['parameters']['per_head']:,}",
      f"{used['parameters']:,}",
      f"{used['multiply_adds'] / 1e6:.1f}",
      f"{run['step_bytes_per_device']['temporary'] / 2**20:.1f}",
    ]
    body.append(cells)
  return [*lines, *measure.grid(head, body)]
