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
