"""Charts as SVG inside a page's HTML (`webpage`).

Drawn by hand and not by matplotlib, since a page is read in two themes and on
a phone: series are classes whose colours the style sheet chooses, words take
the page's own colour, and a chart is `WIDTH` units wide, about the pixels of a
phone, so that they stay legible there. A series differs from its neighbours in
colour, in dashes and in the shape of its points.
"""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH = 440
SERIES = 7  # colours of Okabe and Ito's set
_HEIGHT = 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 420, 28, 218
_ROW = 40
_MOST_POINTS = 300  # of a curve; more lie within a pixel of each other
_MOST_MARKED = 30


Values = Sequence[float | int] | np.ndarray
Ends = tuple[float | int, float | int]


class Curve(NamedTuple):
  """One line of a chart.

  Attributes:
    name: what the legend calls it.
    x: places `[k]`, ascending.
    y: values `[k]`; what is not finite leaves a gap.
    spread: half the length of a bar at each place, or nothing.
  """

  name: str
  x: Values
  y: Values
  spread: Values = ()


class _Scale(NamedTuple):
  """From values to places on the paper."""

  x: Ends
  y: Ends
  left: int = _LEFT + 6

  def across(self, value) -> str:
    """A place along x, as SVG writes it."""
    return _place(value, self.x, self.left, _RIGHT)

  def down(self, value) -> str:
    """A place along y."""
    return _place(value, self.y, _BOTTOM, _TOP)


def lines(
  curves: Sequence[Curve],
  *,
  title: str,
  x: str,
  y: str,
  limits: Ends | None = None,
  borders: Values = (),
) -> str:
  """Curves over one axis, with a legend under them.

  A lone curve that is called like its axis needs none.

  Args:
    curves: at most `SERIES`.
    title: what is drawn, for readers who do not see it.
    x, y: what the axes are.
    limits: ends of the vertical axis; None takes those of the values and 0.
    borders: places along x that a faint line marks.

  Returns:
    An `svg` and a list, `WIDTH` units wide.

  Raises:
    ValueError: if there are more curves than colours.
  """
  if len(curves) > SERIES:
    raise ValueError(
      f"curves={len(curves)} are more than the {SERIES} colours; draw fewer"
    )
  scale = _Scale(_range_across(curves), limits or _range_down(curves))
  parts = [*_axes(scale, x, y, curves)]
  parts += [
    _stroke("border", scale.across(at), _TOP, _BOTTOM) for at in borders
  ]
  for i, curve in enumerate(curves):
    parts.append(f'<g class="s{i}">{_curve(curve, scale, i)}</g>')
  told = "; ".join(f"{c.name} {_told(np.asarray(c.y, float))}" for c in curves)
  return _svg(f"{title}: {told or 'nothing'}", _HEIGHT, parts) + _legend(
    curves, y
  )


def intervals(rows: Mapping[str, Ends], *, title: str, x: str) -> str:
  """A point and its deviation for each row, under the row's name.

  Args:
    rows: mean and deviation by name.
    title: what is drawn, for readers who do not see it.
    x: what the axis is; it holds 0.

  Returns:
    An `svg`, `WIDTH` units wide.
  """
  ends = [m + sign * s for m, s in rows.values() for sign in (-1, 1)]
  scale = _Scale(_wider(min([0.0, *ends]), max([0.0, *ends])), (0, 1), 12)
  bottom = _ROW * len(rows)
  parts = []
  for tick in _ticks(scale.x):
    at = scale.across(tick)
    parts.append(_stroke("grid", at, 0, bottom))
    parts.append(_word(at, bottom + 16, _number(tick), "middle"))
  parts.append(_word(WIDTH // 2, bottom + 36, x, "middle", "name"))
  for i, (name, (mean, spread)) in enumerate(rows.items()):
    top = _ROW * i
    parts.append(_word(0, top + 14, name, "start", "name"))
    parts.append(_word(WIDTH, top + 14, _mean(mean, spread), "end"))
    low, high = scale.across(mean - spread), scale.across(mean + spread)
    bar = f'<path class="line" d="M{low} {top + 27}H{high}"/>'
    point = _marker(0, scale.across(mean), str(top + 27))
    parts.append(f'<g class="s0">{bar}{point}</g>')
  told = "; ".join(f"{name} {_mean(*row)}" for name, row in rows.items())
  return _svg(f"{title}: {told}", bottom + 44, parts)


def _range_across(curves: Sequence[Curve]) -> Ends:
  values = np.concatenate([[], *(np.asarray(c.x, float) for c in curves)])
  if not len(values):
    return 0, 1
  low, high = values.min(), values.max()
  return (low, high) if high > low else (low - 0.5, high + 0.5)


def _range_down(curves: Sequence[Curve]) -> Ends:
  low = high = 0.0
  for curve in curves:
    values, off = np.asarray(curve.y, float), np.asarray(curve.spread, float)
    off = off if len(off) else np.zeros_like(values)
    known = np.isfinite(values)
    low = min(low, *(values - off)[known], 0.0)
    high = max(high, *(values + off)[known], 0.0)
  return _wider(low, high)


def _wider(low: float, high: float) -> Ends:
  # An end at 0 stays there: nothing lies beyond it.
  margin = 0.06 * (high - low or 1)
  return low - margin * (low < 0), high + margin


def _ticks(ends: Ends, whole: bool = False) -> list[float]:
  places = MaxNLocator(5, integer=whole).tick_values(*ends)
  return [float(at) for at in places if ends[0] <= at <= ends[1]]


def _axes(scale: _Scale, x: str, y: str, curves: Sequence[Curve]):
  whole = all(float(at).is_integer() for curve in curves for at in curve.x)
  for tick in _ticks(scale.y):
    at = scale.down(tick)
    yield f'<path class="grid" d="M{_LEFT} {at}H{_RIGHT + 6}"/>'
    yield _word(_LEFT - 6, f"{float(at) + 4:g}", _number(tick), "end")
  for tick in _ticks(scale.x, whole):
    yield _word(scale.across(tick), _BOTTOM + 17, _number(tick), "middle")
  middle = (_LEFT + _RIGHT) // 2
  yield _word(middle, _BOTTOM + 38, x, "middle", "name")
  # Lying over the axis and not along it, where long names find no room.
  yield _word(0, 14, y, "start", "name")


def _curve(curve: Curve, scale: _Scale, i: int) -> str:
  where, values = _thinned(np.asarray(curve.x, float), np.asarray(curve.y))
  known = np.isfinite(values)
  places = [
    (scale.across(a), scale.down(b)) if ok else None
    for a, b, ok in zip(where, values, known)
  ]
  path, before = "", None
  for place in places:
    if place is not None:
      path += f"{'M' if before is None else 'L'}{place[0]} {place[1]}"
    before = place
  drawn = f'<path class="line" d="{path}"/>' if path else ""
  for at, value, off in zip(curve.x, curve.y, curve.spread):
    ends = scale.down(value - off), scale.down(value + off)
    drawn += _stroke("line whisker", scale.across(at), *ends)
  # A lone point has no line to show it.
  if len(places) <= _MOST_MARKED or known.sum() == 1:
    drawn += "".join(_marker(i, *place) for place in places if place)
  return drawn


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Means of neighbours where there are more points than can be seen."""
  if len(x) <= _MOST_POINTS:
    return x, y
  starts = np.arange(0, len(x), -(-len(x) // _MOST_POINTS))
  known = np.isfinite(y)
  count = np.add.reduceat(known.astype(float), starts)
  total = np.add.reduceat(np.where(known, y, 0.0), starts)
  size = np.diff(starts, append=len(x))
  mean = total / np.where(count > 0, count, np.nan)
  return np.add.reduceat(x, starts) / size, mean


def _marker(i: int, x: str, y: str) -> str:
  if i % 4 == 0:
    return f'<circle class="mark" cx="{x}" cy="{y}" r="3.5"/>'
  shape = (
    "m-3-3h6v6h-6z",
    "m0-4.5l4.5 7.5h-9z",
    "m0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z",
  )
  return f'<path class="mark" d="M{x} {y}{shape[i % 4 - 1]}"/>'


def _legend(curves: Sequence[Curve], y: str) -> str:
  # The axis says it already.
  if [curve.name for curve in curves] == [y]:
    return ""
  entries = [
    f'<li><svg class="s{i}" width="34" height="12" aria-hidden="true">'
    f'<path class="line" d="M1 6H33"/>{_marker(i, "17", "6")}</svg>'
    f"{_safe(curve.name)}</li>"
    for i, curve in enumerate(curves)
  ]
  return f'<ul class="legend">{"".join(entries)}</ul>'


def _svg(told: str, height: int, parts: Sequence[str]) -> str:
  box = f'viewBox="0 0 {WIDTH} {height}"'
  label = f'role="img" aria-label="{_safe(told)}"'
  return f'<svg class="chart" {box} {label}>{"".join(parts)}</svg>'


def _word(x, y, text: str, anchor: str, kind: str = "tick") -> str:
  where = f'x="{x}" y="{y}" text-anchor="{anchor}"'
  return f'<text class="{kind}" {where}>{_safe(text)}</text>'


def _stroke(kind: str, x: str, top, bottom) -> str:
  return f'<path class="{kind}" d="M{x} {top}V{bottom}"/>'


def _place(value, ends: Ends, start: int, stop: int) -> str:
  share = (float(value) - ends[0]) / (ends[1] - ends[0])
  return f"{start + share * (stop - start):.1f}".removesuffix(".0")


def _told(values: np.ndarray) -> str:
  known = values[np.isfinite(values)]
  if not len(known):
    return "unknown"
  first, last = (_number(float(f"{at:.3g}")) for at in known[[0, -1]])
  return f"from {first} to {last}"


def _number(value: float) -> str:
  # Five letters at most, or a neighbour would be in the way.
  for unit, name in (1e6, "M"), (1e3, "k"):
    if abs(value) >= 10 * unit:
      return f"{value / unit:.4g}{name}"
  value = float(f"{value:.4g}")
  return f"{value:,.0f}" if value.is_integer() else f"{value:g}"


def _mean(mean: float, spread: float) -> str:
  return f"{mean:.1f}" + (f" ± {spread:.1f}" if spread else "")


def _safe(text: str) -> str:
  return html.escape(text)
