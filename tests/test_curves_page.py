"""The page of curves: what its numbers, figures and sentences are of."""

import csv
import datetime
import types

import numpy as np
import pytest

from experiments import curves_page, suites
from mhil import comparison

ROWS = {row.label: row for row in suites.SUITES["subnets_digits"]}
WIDE = {row.label: row for row in suites.SUITES["subnets_wide"]}


def point(samples, accuracy=0.5, **more):
  blank = {"step": 1, "bytes": 1e6, "flops": 2e9, "coverage": 1.0}
  return blank | {"samples": samples, "accuracy": accuracy} | more


def run_of(*points, seed=0, again=0, **tested):
  asked = {"data.name": "digits", "subnets.local_steps": 20, "seed": seed}
  counted = {"exchanges": 50, "again": again}
  return {"asked": asked, "curve": [*points], "tested": tested} | counted


@pytest.fixture
def given(monkeypatch):
  """Flags as a program of comparisons has them."""
  values = types.SimpleNamespace(data_folder="DIR", tests=2, note="A note.")
  flags = types.SimpleNamespace(FLAGS=values)
  monkeypatch.setattr(curves_page, "flags", flags)


def test_time_is_work_and_bytes_one_after_the_other():
  assert curves_page.seconds(point(1), 1e9) == pytest.approx(2e-3 + 8e-3)
  assert curves_page.seconds(point(1), 1e10) == pytest.approx(2e-3 + 8e-4)


def test_lines_are_means_and_deviations_over_seeds_in_per_cent():
  runs = [
    run_of(point(10, a), point(20, b)) for a, b in ((0.2, 0.4), (0.4, 0.8))
  ]
  lines = curves_page.lines_of(runs)
  where, mean, deviation = lines["samples"]
  assert where.tolist() == [10, 20]
  np.testing.assert_allclose(mean, [30, 60])
  np.testing.assert_allclose(deviation, [20 / 2**0.5, 40 / 2**0.5])
  assert set(lines) == {
    "samples", "MB received by a device", "modelled s, 1 Gbit/s",
    "modelled s, 10 Gbit/s",
  }  # fmt: skip
  # One seed has no deviation.
  assert curves_page.lines_of(runs[:1])["samples"][2].tolist() == [0, 0]


def test_figures_hold_the_methods_and_not_the_controls(monkeypatch, tmp_path):
  drawn = {}

  def panels(rows, path, title, measure):
    assert measure == "test accuracy, %"
    lines = {case: list(lines) for case, lines in rows.items()}
    drawn[path.name] = title, lines

  monkeypatch.setattr(comparison, "panels", panels)
  runs = [run_of(point(10), point(20), seed=s) for s in range(3)]
  found = curves_page.figures(tmp_path / "a", {label: runs for label in ROWS})
  methods = ["IST", "IST, fixed subnets", "local SGD", "data parallel"]
  lines = {case: methods for case in ("n=2", "n=4", "n=8")}
  assert drawn == {
    "a_norm.png": ("digits, with batch norm, J = 20, 3 seeds", lines),
    "a_no_norm.png": ("digits, without norm, J = 20, 3 seeds", lines),
  }
  assert {path.name: title for title, path in found.items()} == {
    name: title for name, (title, _) in drawn.items()
  }


def test_another_network_is_not_drawn_among_the_others(monkeypatch, tmp_path):
  drawn = []
  monkeypatch.setattr(
    comparison, "panels", lambda rows, *rest: drawn.append(set(rows["n=4"]))
  )
  run = [run_of(point(10), point(20))]
  curves_page.figures(tmp_path / "a", {label: run for label in WIDE})
  assert drawn == [{"IST", "IST, fixed subnets", "local SGD", "data parallel"}]


def test_the_page(given, tmp_path):
  found = [
    run_of(
      point(10),
      point(20, accuracy, bytes=b, coverage=0.46),
      seed=seed,
      configured=accuracy,
    )
    for seed, (accuracy, b) in enumerate([(0.5, 1e6), (0.7, 3e6)])
  ]
  curves_page.write(tmp_path / "page", "subnets_digits", {"n=2 IST": found})
  page = (tmp_path / "page.md").read_text()
  assert (
    "`python -m experiments.curves --suite=subnets_digits --seeds=2 "
    f"--data_folder=DIR --tests=2`, {datetime.date.today()};"
  ) in page
  assert "\nA note.\n" in page
  # Mean and deviation, no test by batches, MB, then time on two links.
  assert (
    "| n=2 IST | 2 | 60.0 ± 14.1 |  |  | 46 % | 2.000 | 18.00 | 3.60 |" in page
  )
  assert page.endswith("seeds](page_norm.png)\n")
  numbers = (tmp_path / "page.csv").read_text()
  rows = list(csv.DictReader(numbers.splitlines()))
  assert [(r["seed"], r["samples"], r["accuracy"]) for r in rows] == [
    ("0", "10", "0.5"), ("0", "20", "0.5"), ("1", "10", "0.5"),
    ("1", "20", "0.7"),
  ]  # fmt: skip


def test_exchanges_that_were_made_again_are_told():
  done = {"a": [run_of()], "b": [run_of(again=5), run_of(again=1)]}
  assert "in `b`, in 6 % of its" in curves_page.repetitions(done)
  none = {"a": [run_of()], "fixed": [run_of() | {"exchanges": 0}]}
  assert curves_page.repetitions(none) == "No all-to-all had to be made twice."
