"""The suite `layers` at the size of a toy; its times say nothing here."""

import functools

import pytest

from experiments import bench_layers, layer_steps, measure
from mhil import coupling, objectives

SETUP = layer_steps.Setup(layers=4, hidden=64, batch=16)
LABELS = list(layer_steps.METHODS)


@functools.cache
def two(label):
  return bench_layers.two_devices(label, SETUP, repetitions=1)


@functools.cache
def made(label, count=2):
  method = layer_steps.METHODS[label](count)
  return layer_steps.parallel(SETUP, method, count)


def test_what_a_step_should_take_by_hand():
  alone = {
    ("begin", 0): [1.0],
    ("guess", 1): [2.0],
    ("run", 0): [10.0],
    ("run", 1): [7.0],
    ("mend", 1): [3.0],
    ("learn", 1): [4.0],
    "send": [0.5, 0.25],
  }
  phases = [[n for n in alone if n[0] == w] for w in ("begin", "guess")]
  at_once = {tuple(names): [5.0] for names in phases}
  at_once |= {(("run", 0), ("run", 1)): [20.0], "send": [9.0]}
  found = layer_steps.modelled(alone, at_once, coupling.Method(), 2)
  # The longer of the stages, and all else after it.
  assert found == (20.0, 20.75, 30.75)


def test_a_program_that_runs_twice_counts_by_its_mean_and_its_phases():
  method = coupling.Method(sweeps=2)
  alone = {
    (name, k): [float(ms)]
    for name, k, ms in (
      ("begin", 0, 1),
      ("guess", 1, 0),
      ("run", 0, 10),
      ("run", 1, 7),
      ("mend", 1, 0),
      ("learn", 1, 0),
    )
  }
  alone |= {("sweep", 0): [1.0, 3.0], "send": [0.0]}
  found = layer_steps.modelled(alone, {"send": [0.0]}, method, 2)
  assert found[0] == 1 + 2 * 2 + 10


@pytest.mark.parametrize("label", LABELS)
def test_every_program_and_message_of_a_step_is_in_the_table(label):
  table = two(label)
  names = [row["what"] for row in table.rows]
  assert names[:2] == ["serial step", "parallel step"]
  one = made(label)
  for name, k in layer_steps.named(one.run, one.method):
    assert any(each.startswith(f"{name} {k}") for each in names)
  assert any(each.startswith("copies between stages") for each in names)
  together = [each for each in names if each.endswith("at once")]
  swept = ["look 0 and run 1 at once", "run 0 and learn 1 at once"]
  assert together == (
    swept if "sweeps" in label else ["run 0 and run 1 at once"]
  )
  assert all(row["ms"] > 0 for row in table.rows)
  text = measure.markdown(table)
  assert "NOT within 15 %" in text or "within 15 %" in text


@pytest.mark.parametrize(
  # A state down and one up; or a sweep's, two passes' and one pass's.
  "label, copies",
  list(zip(LABELS, (2, 1 + 2 + 1))),
)
def test_bytes_are_counted_and_equal_the_formula(label, copies):
  line = next(x for x in two(label).reading if x.startswith("Interfaces"))
  size = f"{4 * copies * 16 * 64:,}"
  assert f"exchange {size} bytes a step, by the formula {size};" in line
  assert "of any kind there are 0" in line


def test_the_way_is_the_sum_of_phases(monkeypatch):
  monkeypatch.setattr(layer_steps, "flops", lambda program: 1.0)
  # begin, guess, run, mend, learn.
  assert layer_steps.way(made("1 correction")) == 5
  # begin, guess, sweep, look, mend, run: learning is beside the last.
  assert layer_steps.way(made("K - 1 sweeps, K corrections")) == 6


def test_programs_of_one_correction_do_the_work_of_a_serial_step():
  branch = layer_steps.branch_of(SETUP)
  serial = layer_steps.build(objectives.end_to_end(branch), SETUP)
  one = made(LABELS[0])
  programs = layer_steps.named(one.run, one.method)
  counted = {name: layer_steps.flops(p) for name, p in programs.items()}
  work = sum(counted[name, 0] for name in ("begin", "run")) + counted["run", 1]
  # Stage 1 has an adjoint to make, and each stage a loss of its own.
  assert work == pytest.approx(layer_steps.flops(serial.step), rel=0.1)


@pytest.mark.slow
def test_more_stages_on_one_device_are_the_programs_of_many():
  table = bench_layers.many_stages((2, 3), SETUP)
  assert [(row["what"], row["stages"]) for row in table.rows] == [
    (label, k) for label in LABELS for k in (2, 3)
  ]
  way = layer_steps.way(made(LABELS[0]))
  assert table.rows[0]["longest"] == pytest.approx(way / 1e6)
  # As serial as back-propagation, and more.
  assert all(row["rho"] < 1 for row in table.rows if row["what"] == LABELS[1])
  assert len(table.reading) == 2
