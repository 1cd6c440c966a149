"""Charts: every value where it belongs, told in words too, and small."""

import re
from itertools import pairwise

import numpy as np
import pytest

from mhil import charts
from tests import pages

ENDS = {"title": "a title", "x": "task", "y": "accuracy, %"}


def drawn(curves, **more):
  """The chart's `svg` and its legend."""
  body = charts.lines(curves, **ENDS, **more)
  return pages.tree(f"<div>{body}</div>")


def path(group, kind="line"):
  """Points of each path of a class."""
  return [
    [tuple(map(float, point.split())) for point in re.split("[ML]", d)[1:]]
    for d in (p.get("d") for p in group.iter("path") if p.get("class") == kind)
  ]


def texts(svg, kind="tick"):
  return [t.text for t in svg.iter("text") if t.get("class") == kind]


def test_points_lie_where_their_values_are():
  curve = charts.Curve("one", [0, 1, 2], [0.0, 25.0, 100.0])
  svg, _ = drawn([curve], limits=(0, 100))
  ((a, b, c),) = path(svg)
  # Even steps across; down the paper is up in value.
  assert b[0] - a[0] == pytest.approx(c[0] - b[0])
  assert (a[1] - b[1]) / (a[1] - c[1]) == pytest.approx(0.25)
  grid = [p.get("d") for p in svg.iter("path") if p.get("class") == "grid"]
  levels = [float(re.search(r"M\d+ ([\d.]+)", d)[1]) for d in grid]
  labels = texts(svg)[: len(grid)]
  assert labels == ["0", "20", "40", "60", "80", "100"]
  assert levels[0] == a[1] and levels[-1] == c[1]
  assert texts(svg)[len(grid) :] == ["0", "1", "2"]
  assert texts(svg, "name") == ["task", "accuracy, %"]


def test_what_is_not_finite_leaves_a_gap():
  y = [1.0, 2.0, np.nan, 3.0, np.inf, 1.0, 1.0]
  svg, _ = drawn([charts.Curve("one", range(7), y)])
  (line,) = [p.get("d") for p in svg.iter("path") if p.get("class") == "line"]
  assert line.count("M") == 3 and line.count("L") == 2
  assert len(list(svg.iter("circle"))) == 5
  assert "nan" not in line and "inf" not in line


@pytest.mark.parametrize("values", [[], [np.nan, np.nan]])
def test_nothing_known_still_gives_a_chart(values):
  curves = [charts.Curve("one", range(len(values)), values)]
  for some in curves, []:
    svg, legend = drawn(some)
    assert not path(svg) and len(legend) == len(some)
    assert svg.get("aria-label").startswith("a title: ")


def test_a_lone_point_is_seen():
  y = np.full(100, np.nan)
  y[40] = 2.0
  svg, _ = drawn([charts.Curve("one", range(100), y)])
  assert len(list(svg.iter("circle"))) == 1
  svg, _ = drawn([charts.Curve("one", [3], [0.5])])
  assert len(list(svg.iter("circle"))) == 1


def test_many_points_are_averaged_and_few_are_not():
  n = 10 * charts._MOST_POINTS + 7
  y = np.random.default_rng(0).normal(5, 1, n)
  y[:50] = np.nan
  x, means = charts._thinned(np.arange(n, dtype=float), y)
  assert len(x) <= charts._MOST_POINTS and np.isnan(means[0])
  width = np.unique(np.diff(x[:-1]))
  assert len(width) == 1 and (np.diff(x) > 0).all()
  k = int(width[0])
  assert means[10] == pytest.approx(y[10 * k : 11 * k].mean())
  assert means[-1] == pytest.approx(y[(len(x) - 1) * k :].mean())
  few = np.arange(5.0)
  assert charts._thinned(few, few)[1] is few


def test_a_bin_that_is_known_in_part_is_the_mean_of_that_part():
  n = 2 * charts._MOST_POINTS
  y = np.ones(n)
  y[::2] = np.nan
  y[1] = 3.0
  _, means = charts._thinned(np.arange(n, dtype=float), y)
  assert means[0] == 3.0 and (means[1:] == 1).all()


def test_series_differ_without_colour():
  curves = [charts.Curve(f"c{i}", [0, 1], [i, i]) for i in range(7)]
  svg, legend = drawn(curves)
  assert [pages.words(li) for li in legend] == [f"c{i}" for i in range(7)]
  groups = [g for g in svg if g.tag == "g"]
  assert [g.get("class") for g in groups] == [f"s{i}" for i in range(7)]
  shapes = [
    [(m.tag, re.sub(r"M\S+ [\d.]+", "", m.get("d", ""))) for m in g][1]
    for g in groups
  ]
  assert all(a != b for a, b in pairwise(shapes))
  with pytest.raises(ValueError, match="curves=8 are more than the 7 colours"):
    drawn([*curves, curves[0]])


def test_a_lone_curve_needs_no_second_name():
  curve = charts.Curve(ENDS["y"], [0, 1], [1, 2])
  (svg,) = drawn([curve])
  assert svg.get("role") == "img"
  assert len(drawn([curve, curve._replace(name="another")])[1]) == 2


def test_words_say_what_the_lines_show():
  curve = charts.Curve("ours", [0, 1], [100.0, 94.44444])
  svg, _ = drawn([curve, charts.Curve("none", [0], [np.nan])])
  told = svg.get("aria-label")
  assert told == "a title: ours from 100 to 94.4; none unknown"
  assert svg.get("role") == "img"


@pytest.mark.parametrize(
  "value, told",
  [
    (0.0, "0"),
    (0.30000000000000004, "0.3"),
    (-2.5, "-2.5"),
    (9800.0, "9,800"),
    (10_000.0, "10k"),
    (12_500.0, "12.5k"),
    (-400_000.0, "-400k"),
    (25_000_000.0, "25M"),
  ],
)
def test_numbers_are_short(value, told):
  assert charts._number(value) == told


def test_names_are_escaped():
  name = '<b onload="x">&\''
  body = charts.lines(
    [charts.Curve(name, [0], [1])], title=name, x=name, y=name
  ) + charts.intervals({name: (1.0, 0.5)}, title=name, x=name)
  assert "<b" not in body
  found = pages.tree(f"<div>{body}</div>")
  assert [t.text for t in found.iter("text")].count(name) == 4


def test_borders_and_whiskers():
  curve = charts.Curve("one", [0, 10], [5.0, 6.0], [1.0, 0.0])
  svg, _ = drawn([curve], borders=[5])
  ((left, right),) = path(svg)
  (border,) = [
    p.get("d") for p in svg.iter("path") if p.get("class") == "border"
  ]
  middle = float(re.match(r"M([\d.]+)", border)[1])
  assert middle == pytest.approx((left[0] + right[0]) / 2, abs=0.1)
  bars = [
    [float(v) for v in re.findall(r"[\d.]+", p.get("d"))]
    for p in svg.iter("path")
    if p.get("class") == "line whisker"
  ]
  first, second = bars
  assert first[0] == left[0] and second[1] == second[2] == right[1]
  assert first[1] - left[1] == pytest.approx(left[1] - first[2], abs=0.11)
  assert first[1] > left[1]


def test_the_vertical_axis_holds_zero_and_every_bar():
  curve = charts.Curve("one", [0, 1], [-5.0, 3.0], [0.0, 4.0])
  low, high = charts._range_down([curve])
  assert low < -5 and high > 7
  low, high = charts._range_down([charts.Curve("one", [0], [3.0])])
  assert low == 0 and high > 3
  assert charts._range_down([]) == (0, 0.06)


def test_intervals():
  rows = {"a row": (80.0, 2.0), "another": (-4.0, 0.0)}
  body = charts.intervals(rows, title="a title", x="accuracy, %")
  svg = pages.tree(body)
  assert svg.get("aria-label") == "a title: a row 80.0 ± 2.0; another -4.0"
  points = [float(c.get("cx")) for c in svg.iter("circle")]
  bars = [
    [float(v) for v in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", d).groups()]
    for d in (p.get("d") for p in svg.iter("path"))
    if "H" in d
  ]
  for point, (low, high) in zip(points, bars):
    assert point == pytest.approx((low + high) / 2, abs=0.1)
  assert bars[0][0] < bars[0][1] and bars[1][0] == bars[1][1]
  assert texts(svg, "name") == ["accuracy, %", "a row", "another"]
  assert {"80.0 ± 2.0", "-4.0"} <= set(texts(svg))
  # A row of 0 lies where the tick says 0.
  zero = charts.intervals({"none": (0.0, 0.0)}, title="", x="")
  (point,) = pages.tree(zero).iter("circle")
  ticks = {t.text: t.get("x") for t in pages.tree(zero).iter("text")}
  assert ticks["0"] == point.get("cx")


def test_everything_stays_on_the_paper():
  rng = np.random.default_rng(1)
  curves = [
    charts.Curve(f"c{i}", range(50), rng.normal(0, 1e4, 50)) for i in range(7)
  ]
  svg, _ = drawn(curves)
  _, _, width, height = map(float, svg.get("viewBox").split())
  for points in path(svg):
    for across, down in points:
      assert 0 <= across <= width and 0 <= down <= height


def test_a_chart_is_small():
  curves = [
    charts.Curve(f"c{i}", range(10**5), np.ones(10**5)) for i in range(7)
  ]
  assert len(charts.lines(curves, **ENDS)) < 40_000
