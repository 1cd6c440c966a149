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
# What the name of a row ends with that is there to fail.
CONTROL = "(control)"
_DPI = 150
_MARKERS = "os^DvPX"


def rows(columns: Mapping[str, Mapping[str, Values]], path: Path) -> None:
  """Draws mean and deviation over seeds of every row, a panel for a column.

  Controls do not stretch an axis: where one lies outside of what the others
  reach, an arrow at the edge and its mean in figures stand for it.

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
  controls = np.array([name.endswith(CONTROL) for name in names])
  for i, (axes, (column, values)) in enumerate(zip(panels, columns.items())):
    means, spread = _over_seeds([values[name] for name in names])
    low, high = _limits(means, spread, controls)
    out = controls & ((means < low) | (means > high))
    bars = means[~out], place[~out]
    style: dict[str, Any] = {"fmt": "o", "color": OKABE_ITO[i], "capsize": 3}
    axes.errorbar(*bars, xerr=spread[~out], **style)
    for value, at in zip(means[out], place[out]):
      _arrow(axes, value, at, (low, high), OKABE_ITO[i])
    axes.set(xlabel=column, xlim=(low, high))
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


def _limits(
  means: np.ndarray, spread: np.ndarray, controls: np.ndarray
) -> tuple[float, float]:
  """What an axis shows: from zero on where that takes no more than half."""
  counted = ~controls if not controls.all() else controls
  low = (means - spread)[counted].min()
  high = (means + spread)[counted].max()
  if 0 < low <= high / 2:
    low = 0.0
  margin = 0.06 * (high - low or 1.0)
  return low - margin, high + margin


def _arrow(axes, value, at, limits, color) -> None:
  """A value that lies outside, at the edge behind which it lies."""
  left = value < limits[0]
  edge, turn = limits[0 if left else 1], 1 if left else -1
  axes.plot(edge, at, marker="<" if left else ">", color=color, clip_on=False)
  axes.annotate(
    f"{value:.1f}",
    (edge, at),
    (8 * turn, 0),
    textcoords="offset points",
    ha="left" if left else "right",
    va="center",
    size=8,
    color="0.35",
  )


def panels(
  rows: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
  path: Path,
  title: str,
  measure: str,
) -> None:
  """Draws a measure against several quantities, a row of panels for each case.

  Args:
    rows: `{case: {line: {quantity: [3, k]}}}`: where on the horizontal axis,
      mean and deviation there. Quantities but the first are logarithmic.
    path: file to write.
    title: heading of the figure.
    measure: what the values are.
  """
  first = next(iter(next(iter(rows.values())).values()))
  figure = Figure((3.1 * len(first), 2.4 * len(rows)), dpi=_DPI)
  figure.set_layout_engine("constrained")
  table = figure.subplots(len(rows), len(first), squeeze=False, sharey="row")
  for line, (case, lines) in zip(table, rows.items()):
    line[0].set_ylabel(f"{case}, {measure}")
    for axes, quantity in zip(line, first):
      for i, (name, curves) in enumerate(lines.items()):
        _band(axes, curves[quantity], i, name)
      if quantity != next(iter(first)):
        axes.set_xscale("log")
      axes.grid(color="0.9", lw=0.6)
      _plain(axes)
  for axes, quantity in zip(table[-1], first):
    axes.set_xlabel(quantity)
  handles, labels = table[0][0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=4, frameon=False
  )
  figure.suptitle(title)
  figure.savefig(path)


def _band(axes, curve, i, name) -> None:
  where, mean, deviation = curve
  color = OKABE_ITO[i % len(OKABE_ITO)]
  low, high = mean - deviation, mean + deviation
  axes.fill_between(where, low, high, color=color, alpha=0.2, lw=0)
  style: dict[str, Any] = {"color": color, "lw": 1.4, "ms": 3}
  marker = _MARKERS[i % len(_MARKERS)]
  axes.plot(where, mean, marker=marker, label=name, **style)


def _plain(axes: Axes) -> None:
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
