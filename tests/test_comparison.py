"""Figures over runs: every row, every curve, its mean and deviation."""

import numpy as np
import pytest

from experiments import suites
from mhil import comparison
from tests.test_plots import check_picture, figures, overlaps

__all__ = ["figures"]
COLUMNS = {
  "accuracy, %": {"a row": [80.0, 82.0], "another": [60.0], "a third": [0.0]},
  "forgetting": {"a row": [-2.0, 2.0], "another": [9.0], "a third": [4.0]},
}


def drawn(axes):
  """Middle and half length of each bar of an `errorbar`."""
  line, _, (bars,) = axes.containers[0]
  length = [np.ptp(np.array(s), axis=0).max() / 2 for s in bars.get_segments()]
  return line.get_xydata(), length


def test_rows(tmp_path, figures):
  comparison.rows(COLUMNS, tmp_path / "rows.png")
  check_picture(tmp_path / "rows.png")
  left, right = figures[0].axes
  assert [t.get_text() for t in left.get_yticklabels()] == list(
    COLUMNS["accuracy, %"]
  )
  points, spread = drawn(left)
  assert points[:, 0].tolist() == [81, 60, 0]
  # The sample's deviation over seeds; one seed has none.
  np.testing.assert_allclose(spread, [np.sqrt(2), 0, 0])
  assert left.get_xlim()[0] < 0 < left.get_xlim()[1] and left.yaxis_inverted()
  assert right.get_xlabel() == "forgetting" and drawn(right)[0][0, 0] == 0
  assert not overlaps(left.get_yticklabels(), figures[0])


CONTROLLED = {
  "accuracy, %": {
    "ours": [96.0, 98.0],
    "peer": [95.0],
    "at 0 (control)": [9.5],
  },
  "seconds": {"ours": [9.0], "peer": [4.0], "at 0 (control)": [6.0]},
}


def test_a_control_does_not_stretch_the_axis(tmp_path, figures):
  comparison.rows(CONTROLLED, tmp_path / "rows.png")
  check_picture(tmp_path / "rows.png")
  left, right = figures[0].axes
  low, high = left.get_xlim()
  assert 90 < low < 95 and 97 + np.sqrt(2) < high < 100
  assert drawn(left)[0].tolist() == [[97, 0], [95, 1]]
  (mark,) = (line for line in left.lines if line.get_marker() == "<")
  assert mark.get_xydata().tolist() == [[low, 2]]
  (text,) = left.texts
  assert text.get_text() == "9.5"
  # Inside of what the others reach it is drawn like them, and it is no reason
  # to cut an axis off above zero.
  assert drawn(right)[0].tolist() == [[9, 0], [4, 1], [6, 2]]
  assert not right.texts and right.get_xlim()[0] < 0


def test_a_control_above_all_others_points_the_other_way(tmp_path, figures):
  columns = {"forgetting": {"ours": [-2.0, 2.0], "shuffled (control)": [50.0]}}
  comparison.rows(columns, tmp_path / "rows.png")
  (axes,) = figures[0].axes
  assert axes.get_xlim()[1] < 5 and axes.texts[0].get_text() == "50.0"
  assert [line.get_marker() for line in axes.lines][-1] == ">"


def test_controls_alone_are_drawn(tmp_path, figures):
  comparison.rows({"x": {"a (control)": [3.0]}}, tmp_path / "rows.png")
  (axes,) = figures[0].axes
  assert drawn(axes)[0].tolist() == [[3, 0]] and not axes.texts


def test_panels(tmp_path, figures):
  where, mean, deviation = [1, 2, 4], [50.0, 70.0, 80.0], [4.0, 2.0, 1.0]
  line = {
    "samples": np.array([where, mean, deviation]),
    "MB": np.array([[3, 6, 12], mean, deviation]),
  }
  lines = {"ours": line, "peer": line | {"MB": line["MB"] * [[2], [1], [1]]}}
  path = tmp_path / "panels.png"
  comparison.panels({"n=2": lines, "n=4": lines}, path, "digits", "accuracy, %")
  check_picture(path)
  table = figures[0].axes
  assert [a.get_ylabel() for a in table] == [
    "n=2, accuracy, %", "", "n=4, accuracy, %", ""
  ]  # fmt: skip
  assert [a.get_xlabel() for a in table] == ["", "", "samples", "MB"]
  assert [a.get_xscale() for a in table] == ["linear", "log"] * 2
  assert figures[0].get_suptitle() == "digits"
  ours, peer = table[1].lines
  assert ours.get_xydata().tolist() == np.array([[3, 6, 12], mean]).T.tolist()
  assert peer.get_xdata().tolist() == [6, 12, 24]
  band, _ = table[0].collections
  ends = band.get_paths()[0].vertices
  for x, y, half in zip(where, mean, deviation):
    found = ends[ends[:, 0] == x, 1]
    assert {y - half, y + half} <= set(found)


def test_scans(tmp_path, figures):
  curves = {
    "size": {"ours": {30: [70.0, 72.0], 5: [60.0, 60.0]}, "peer": {5: [50.0]}},
    "draws": {"ours": {7: [70.0, 72.0]}},
  }
  bounds = {"upper": [90.0, 92.0], "lower": [20.0]}
  comparison.scans(curves, bounds, tmp_path / "scan.png", "accuracy, %")
  check_picture(tmp_path / "scan.png")
  size, draws = figures[0].axes
  assert (size.get_xlabel(), size.get_ylabel()) == ("size", "accuracy, %")
  # Sorted along the axis, whatever the order of the rows.
  assert drawn(size)[0].tolist() == [[5, 60], [30, 71]]
  lines = {line.get_label(): line.get_ydata()[0] for line in draws.lines}
  assert lines["upper"] == 91 and lines["lower"] == 20
  names = [t.get_text() for t in figures[0].legends[0].get_texts()]
  assert sorted(names) == ["lower", "ours", "peer", "upper"]


@pytest.mark.parametrize("name", suites.SUITES)
def test_a_scan_has_points_to_connect(name):
  found = {}
  for row in suites.SUITES[name]:
    assert not row.at or row.curve
    for number, value in row.at.items():
      found.setdefault((number, row.curve), []).append(value)
  for values in found.values():
    assert len(set(values)) == len(values) > 1
