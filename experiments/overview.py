"""The page of a comparison as HTML: its tables and figures in one file."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import page, suites
from mhil import charts, webpage

Values = Sequence[float]
ENDING = ".html"


def write(
  out: pathlib.Path, rows: Sequence[suites.Row], done: page.Done
) -> None:
  """Writes OUT.html from OUT.md and the same runs.

  Args:
    out: the files without their endings; OUT.md is there.
    rows: of the suite.
    done: those that there are.
  """
  heading, _, text = out.with_suffix(".md").read_text().partition("\n")
  sections = {
    "Tables": webpage.markdown(text),
    "Accuracy and time": _columns(page.columns(done)),
  }
  curves, bounds = page.scans(rows, done)
  if curves:
    sections["Scans"] = _scans(curves, bounds)
  title = heading.strip("#` ").replace("`", "")
  out.with_suffix(ENDING).write_text(webpage.page(title, [], sections))


def _columns(columns: Mapping[str, Mapping[str, Values]]) -> str:
  about = "Mean and standard deviation over seeds"
  return webpage.beside(
    *(
      webpage.figure(
        charts.intervals(
          {name: _over_seeds(values) for name, values in rows.items()},
          title=f"{about}, {column}",
          x=column,
        ),
        f"{about}: {column}.",
      )
      for column, rows in columns.items()
    )
  )


def _scans(
  curves: Mapping[str, Mapping[str, Mapping[float, Values]]],
  bounds: Mapping[str, Values],
) -> str:
  about = "Mean and standard deviation over seeds against"
  figures = []
  for number, named in curves.items():
    places = sorted({at for points in named.values() for at in points})
    drawn = charts.lines(
      [
        *(_curve(name, points) for name, points in named.items()),
        # Rows that the number does not move: level lines.
        *(
          _curve(name, dict.fromkeys(places, values))
          for name, values in bounds.items()
        ),
      ],
      title=f"{about} {number}",
      x=number,
      y=page.MEASURE,
    )
    figures.append(webpage.figure(drawn, f"{about} {number}."))
  return webpage.beside(*figures)


def _curve(name: str, points: Mapping[float, Values]) -> charts.Curve:
  at = sorted(points)
  means, spread = zip(*(_over_seeds(points[x]) for x in at))
  return charts.Curve(name, at, means, spread)


def _over_seeds(values: Values) -> tuple[float, float]:
  # One seed says nothing about others.
  spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
  return float(np.mean(values)), float(spread)
