"""Curves of accuracy against samples, bytes and modelled time."""

import numpy as np
import pytest

from experiments import cli, compare, curves, suites
from mhil import dealing, sharding
from tests import tiny

ROWS = {row.label: row for row in suites.SUITES["subnets_digits"]}


def point(samples, accuracy=0.5, **more):
  blank = {"step": 1, "bytes": 1e6, "flops": 2e9, "coverage": 1.0}
  return blank | {"samples": samples, "accuracy": accuracy} | more


def test_time_is_work_and_bytes_one_after_the_other():
  assert curves.seconds(point(1), 1e9) == pytest.approx(2e-3 + 8e-3)
  assert curves.seconds(point(1), 1e10) == pytest.approx(2e-3 + 8e-4)


def test_lines_are_means_over_seeds():
  runs = [
    {"curve": [point(10, a), point(20, b)]} for a, b in ((0.2, 0.4), (0.4, 0.8))
  ]
  lines = curves.lines_of(runs)
  assert lines["samples"].tolist() == [[10, 20], pytest.approx([0.3, 0.6])]
  assert set(lines) == {
    "samples", "MB received by a device", "modelled s, 1 Gbit/s",
    "modelled s, 10 Gbit/s",
  }  # fmt: skip


def test_what_a_device_receives_of_a_collective():
  """A ring's share: its own part does not cross a link."""

  class Program:
    cost_analysis = staticmethod(lambda: {"flops": 7.0})

  run = tiny.build()._replace(
    mesh=sharding.make_mesh(subnet=4),
    step=Program,
    traffic=[sharding.Collective("all-reduce", 100, ("subnet",))],
    exchanged=(
      sharding.Collective("all-to-all", 80, ("subnet",)),
      sharding.Collective("all-reduce", 1, ("data",)),
    ),
  )
  assert curves.cost_of(run) == curves.Cost(7.0, 150.0, 60.0)


def test_figures_hold_the_methods_and_not_the_controls(tmp_path):
  run = {"curve": [point(10), point(20)], "tested": {}}
  done = {label: [run] for label in ROWS}
  drawn = curves.figures(tmp_path / "a", done)
  assert {path.name for path in drawn.values()} == {
    "a_norm.png", "a_no_norm.png"
  }  # fmt: skip
  assert all(path.stat().st_size > 10_000 for path in drawn.values())


def test_a_stream_of_tasks_is_refused():
  config = compare.configure(ROWS["n=2 IST"], 0)
  config.stream.increment = 5
  with pytest.raises(cli.UserError, match="2 tasks; curves are of one task"):
    curves.trained(config, 4)


@pytest.mark.slow
def test_a_short_curve():
  config = compare.configure(ROWS["n=2 IST"], 0)
  config.train.epochs = 2
  found = curves.trained(config, 4)
  curve = found["curve"]
  assert [p["step"] for p in curve] == sorted({p["step"] for p in curve})
  last = curve[-1]
  # 1,437 images in batches of 64, twice; a round is 20 steps, the last short.
  assert last["step"] == 46 and last["samples"] == 46 * 64
  room, m = dealing.room_for(2, 64), 64
  owned = 64 * (64 + 4) + 64 * (10 + 1 + 4)
  given = 4 * (2 * room / m * (owned + 2 * 64 * 64))
  shared = 4 * 2 * 11
  assert last["bytes"] == pytest.approx(3 * (given / 2 + shared))
  assert 0.5 < last["coverage"] < 1
  assert last["accuracy"] > 0.5 and set(found["tested"]) == {
    "configured", "batch of whole", "batch of 32"
  }  # fmt: skip
  assert np.isfinite(list(found["tested"].values())).all()
