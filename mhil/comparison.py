"""Figures over several runs: rows of a table, and curves through some of them.

Drawn like those of one run (`plots`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhil.plots import OKABE_ITO, Path

Values = Float[np.ndarray, " n"] | Sequence[float]
_DPI = 150


def rows(columns: Mapping[str, Mapping[str, Values]], path: Path) -> None:
  """Draws mean and deviation over seeds of every row, a panel for a column.

  Args:
    columns: by the name of a column, values over seeds by the name of a row;
      every column has the same rows.
    path: file to write.
  """
  names = list(next(iter(columns.values())))
  size = 4.2 + 3 * len(columns), max(2.8, 1.2 + 0.28 * len(names))
  figure = Figure(size, dpi=_DPI, layout="constrained")
  panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
  place = np.arange(len(names))
  for i, (axes, (column, values)) in enumerate(zip(panels, columns.items())):
    means, spread = _over_seeds([values[name] for name in names])
    axes.errorbar(
      means, place, xerr=spread, fmt="o", color=OKABE_ITO[i], capsize=3
    )
    axes.set(xlabel=column, xlim=_from_zero(means, spread))
    axes.grid(axis="both", color="0.9", lw=0.6)
    _plain(axes)
  panels[0].set_yticks(place, names)
  panels[0].invert_yaxis()
  figure.savefig(path)


def scans(
  curves: Mapping[str, Mapping[str, Mapping[Any, Values]]],
  bounds: Mapping[str, Values],
  path: Path,
  measure: str,
) -> None:
  """Draws what a row measures against a number that the rows differ in.

  Args:
    curves: by the number's name, values over seeds at each of its places, by
      the name of a curve; a panel each.
    bounds: values over seeds of rows to hold beside them, drawn as lines.
    path: file to write.
    measure: what the values are.
  """
  size = 2.6 + 3.6 * len(curves), 3.8
  figure = Figure(size, dpi=_DPI, layout="constrained")
  panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
  for axes, (number, lines) in zip(panels, curves.items()):
    for i, (name, points) in enumerate(lines.items()):
      at = sorted(points)
      means, spread = _over_seeds([points[x] for x in at])
      axes.errorbar(
        at,
        means,
        yerr=spread,
        fmt=f"{'os^D'[i % 4]}-",
        color=OKABE_ITO[i % len(OKABE_ITO)],
        capsize=3,
        label=name,
      )
    for i, (name, values) in enumerate(bounds.items()):
      dash = ("--", ":", "-.")[i % 3]
      axes.axhline(np.mean(values), color="0.35", ls=dash, lw=1.3, label=name)
    axes.set(xlabel=number)
    axes.grid(axis="y", color="0.9", lw=0.6)
    _plain(axes)
  panels[0].set(ylabel=measure)
  handles, names = [], []
  for axes in panels:
    for handle, name in zip(*axes.get_legend_handles_labels()):
      if name not in names:
        handles.append(handle)
        names.append(name)
  figure.legend(
    handles, names, loc="outside right upper", frameon=False, fontsize=8
  )
  figure.savefig(path)


def _over_seeds(values: Sequence[Values]) -> tuple[np.ndarray, np.ndarray]:
  means = np.array([np.mean(v) for v in values])
  # One seed says nothing about others.
  spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
  return means, np.array(spread)


def _from_zero(means: np.ndarray, spread: np.ndarray) -> tuple[float, float]:
  low, high = (means - spread).min(), (means + spread).max()
  low, high = min(low, 0.0), max(high, 0.0)
  margin = 0.06 * (high - low or 1.0)
  return low - margin, high + margin


def _plain(axes: Axes) -> None:
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
