"""What a further head costs, from compiled programs; tables and JSON."""

import functools
import json
import subprocess
import sys

import jax
import pytest

from experiments import (
  bench_heads,
  bench_memory,
  bench_pipeline,
  bench_resnet,
  bench_stages,
  benchmark,
  cli,
  measure,
  setups,
  torch_resnet,
)
from mhil import inputs, networks, phases
from mhil import run as run_lib

FLAT = tuple(bench_heads.FLAT)
TINY = {"side": 8, "batch": 8, "samples": 160}
SMALL = setups.Setup(
  "small mlp",
  lambda logits: networks.mlp(192, logits, (64,), axis="data"),
  **TINY,
)
CONVNET = setups.Setup(
  "small convnet",
  lambda logits: networks.convnet((8, 8, 3), logits, (4,), axis="data"),
  **TINY,
)
# 1.2 MB of state a head, so that a copy of the bank could not be overlooked.
WIDE = setups.Setup(
  "wide mlp",
  lambda logits: networks.mlp(192, logits, (512,), axis="data"),
  **TINY,
)
PIPELINE = setups.Setup(
  "small convnet",
  lambda logits: networks.convnet((32, 32, 3), logits, (2,), axis="data"),
)
STATE = 3 * 4 * (192 * 512 + 512 + 512 * 3 + 3)  # parameters and Adam, float32


@functools.cache
def apart():
  return bench_heads.apart(SMALL, counts=(1, 4), repetitions=2)


@functools.cache
def closed():
  return bench_heads.closed(WIDE, held=8, repetitions=9)


def held(heads, train_heads):
  run = setups.build(WIDE, heads, train_heads=train_heads)
  return measure.cost(run)


def column(table, key, **labels):
  return [r[key] for r in table.rows if labels.items() <= r.items()]


class TestPipeline:
  """The suite at the size of a toy; that it waits is shown in test_trainer."""

  @pytest.mark.slow
  def test_every_source_gives_the_images_that_training_gets(self):
    sources = bench_pipeline.sources(30, None)
    runs = [bench_pipeline.build(s, PIPELINE, 8, 1) for s in sources]
    batches = []
    for run in runs:
      feed = phases.open_phase(run, run.phases[0], phases.NOTHING)
      epoch, samples = next(inputs.steps(run, feed, 0))
      step = run_lib.scalar(0, run.mesh)
      fetch = bench_pipeline._fetch(run)
      batches.append(fetch(step, epoch, feed.task, samples))
    assert [s.streamed for s in sources] == [False, True]
    assert batches[0].shape == (8, 32, 32, 3) and batches[0].std() > 0.5
    assert (batches[0] == batches[1]).all()

  @pytest.mark.slow
  def test_tables_say_what_was_measured(self):
    table = bench_pipeline.training(30, 8, setup=PIPELINE, repetitions=1)
    assert [row["source"] for row in table.rows] == [
      "in memory",
      "streamed: a mapped file",
    ]
    assert all(0 < row["waiting"] < 100 for row in table.rows)
    assert "30 images" in bench_pipeline.alone(30, 8, repetitions=1).note
    assert " of the rate in memory" in measure.markdown(table)

  def test_more_than_2_percent_is_said(self):
    row = {"source": "s", "rate": 1.0, "most": 2.5}
    assert (
      "waits NOT under 2 % of the time (2.50" in bench_pipeline._read([row])[0]
    )


class TestResnet:
  """The suite for a GPU, at the size of a toy."""

  @pytest.mark.slow
  def test_counts_images_and_operations(self):
    table = bench_resnet.resnet(
      (1,), depth=8, batch=4, steps=2, repetitions=1, peak=1e-3
    )
    row = table.rows[0]
    assert row["library"] == "mhil" and row["rate"] == row["rates"][0] > 0
    # By hand: stem, three stages (a stage's first block halves the image),
    # two 1x1 shortcuts, ten classes and the reference.
    stages = 4 * 9 * 16 * 16 * 32**2 // 2
    for width, side in ((32, 16), (64, 8)):
      stages += side**2 * width * (9 * (width // 2 + width) + width // 2)
    once = 32**2 * 27 * 16 + stages + 64 * 11
    assert row["tflops"] == pytest.approx(6e-12 * once * row["rate"])
    assert row["share"] == pytest.approx(1e5 * row["tflops"])

  def test_pytorchs_network_is_the_same(self):
    reason = "PyTorch is no dependency; the comparison is for GPU users"
    pytest.importorskip("torch", reason=reason)
    network = torch_resnet.resnet(32, 10)
    assert sum(p.numel() for p in network.parameters()) == 466_906


class TestApart:
  """What a device pays does not depend on how many others there are."""

  @pytest.mark.slow
  @pytest.mark.parametrize("key", FLAT)
  def test_dce_costs_a_device_the_same_with_more_heads(self, key):
    values = column(apart(), key, loss="D-CE")
    # The 10 % that is promised; measured 0.
    assert len(values) == 2 and measure.spread(values) <= 0.1

  @pytest.mark.slow
  def test_a_convnet_on_eight_devices_too(self):
    table = bench_heads.apart(CONVNET, counts=(1, 8), repetitions=1)
    for key in FLAT:
      values = column(table, key, loss="D-CE")
      assert len(values) == 2 and measure.spread(values) <= 0.1
    traffic = column(table, "traffic", loss="centralised CE")
    assert traffic == [0, 4 * 2 * 8 * 8]

  @pytest.mark.slow
  def test_dce_moves_nothing(self):
    assert column(apart(), "traffic", loss="D-CE") == [0, 0]
    assert column(apart(), "collectives", loss="D-CE") == [0, 0]

  def test_centralised_ce_gathers_every_logit(self):
    """The control: what grows with the heads is seen to grow."""
    # 4 bytes for each of 2 classes, 8 samples and 4 heads; 1 device: none.
    traffic = column(apart(), "traffic", loss="centralised CE")
    assert traffic == [0, 4 * 2 * 8 * 4]
    assert measure.verdict(traffic).startswith("NOT flat")

  def test_distributed_ce_moves_two_numbers_a_sample(self):
    assert column(apart(), "traffic", loss="distributed CE") == [0, 2 * 4 * 8]
    assert column(apart(), "collectives", loss="distributed CE") == [0, 2]

  @pytest.mark.parametrize("loss", ["distributed CE", "centralised CE"])
  def test_coupled_losses_pay_a_second_forward_pass(self, loss):
    ours = column(apart(), "flops", loss="D-CE")
    theirs = column(apart(), "flops", loss=loss)
    # A third more in a deep network; half more where the one large layer
    # has no gradient towards the images.
    assert all(b > 1.2 * a for a, b in zip(ours, theirs, strict=True))


class TestTogether:
  """Many heads on one device, in a network that is nearly all state."""

  @pytest.mark.slow
  @pytest.mark.parametrize("train_heads", ["new", "all"])
  def test_seven_more_heads_cost_no_more_than_a_copy_of_one(self, train_heads):
    many, one = held(8, train_heads), held(1, "all")
    assert many["flops"] <= 1.1 * one["flops"]
    # A bank of one spares the loop its copy of a head's state, read and
    # written once. A copy of the bank would be 7 times that.
    assert many["accessed"] - one["accessed"] < 2.1 * STATE
    assert many["temporary"] - one["temporary"] < 1.1 * STATE

  def test_arguments_hold_every_head(self):
    """The control: this number does grow, by the state of seven."""
    grown = held(8, "all")["arguments"] - held(1, "all")["arguments"]
    # Besides, a few words a head: loss, step counts, tables of the task.
    assert 7 * STATE <= grown < 7.01 * STATE

  @pytest.mark.slow
  @pytest.mark.parametrize("train_heads", ["new", "all", "readout"])
  def test_from_two_heads_on_nothing_grows(self, train_heads):
    few, many = held(2, train_heads), held(8, train_heads)
    for key in FLAT:
      # Tables of the task may add some words a head.
      assert measure.spread([few[key], many[key]]) <= 0.001

  @pytest.mark.slow
  def test_time_is_flat_for_new_and_grows_for_all(self):
    table = bench_heads.together((WIDE,), counts=(2, 16), repetitions=5)
    new, everything = (
      column(table, "cpu_ms", train_heads=kind) for kind in ("new", "all")
    )
    # Processor time, as other programs may use the machine. Eight times the
    # heads train: 8 times the time, less what a step costs besides.
    assert new[1] < 1.5 * new[0]
    assert everything[1] > 3 * everything[0]
    assert column(table, "tasks") == [2, 16] * 2
    assert "CPU time" in table.reading[0] and "control" in table.reading[0]


class TestClosed:
  @pytest.mark.slow
  def test_closed_heads_cost_no_time(self):
    few, full = (column(closed(), "cpu_ms", held=8, open=n)[0] for n in (2, 8))
    # A quarter of the work, and what a step costs besides its heads.
    assert few < 0.6 * full

  def test_one_compiled_program_serves_all(self):
    assert closed().reading[-1] == "Compilations while heads opened: 0."

  @pytest.mark.slow
  def test_a_compilation_on_the_way_would_be_told(self, monkeypatch):
    """The control: each step of each case here compiles a program."""
    step = measure.Stepper.__call__
    compiled = []

    def compiles(self):
      compiled.append(None)
      jax.jit(lambda x: x * 3 + len(compiled))(2.0)
      step(self)

    monkeypatch.setattr(measure.Stepper, "__call__", compiles)
    table = bench_heads.closed(SMALL, held=4, repetitions=1)
    # Three cases; of each two steps to warm up and one that is timed.
    assert table.reading[-1] == "Compilations while heads opened: 9."

  def test_the_reading_quotes_the_table(self):
    share = column(closed(), "growth", held=8, open=2)[0]
    assert f"{share:.2f} with 2 of 8 open" in closed().reading[0]


class TestReport:
  def test_markdown_has_a_cell_for_every_column(self):
    lines = measure.markdown(apart()).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3 * 2
    assert {line.count("|") for line in table} == {len(apart().columns) + 1}
    assert "**per device**" in lines[2]
    assert sum(line.startswith("- ") for line in lines) == len(apart().reading)

  def test_json_and_markdown_are_written(self, tmp_path):
    path = tmp_path / "new" / "heads.json"
    assert benchmark.writable(str(path)) == path
    benchmark.write(path, benchmark.about("heads"), [apart()])
    whole = json.loads(path.read_text())
    assert whole["command"] in path.with_suffix(".md").read_text()
    assert whole["date"] and whole["versions"]["jax"]
    assert whole["device"]["count"] == 8
    (table,) = whole["tables"]
    assert set(table["columns"]) <= set(table["rows"][0])
    low, high = table["rows"][0]["ms_quartiles"]
    assert 0 < low <= high and "walls" not in table["rows"][0]

  def test_another_ending_is_refused(self):
    with pytest.raises(cli.UserError, match=r"use heads\.json"):
      benchmark.writable("heads.txt")

  def test_a_folder_that_is_a_file_is_refused(self, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(cli.UserError, match="use another"):
      benchmark.writable(str(tmp_path / "taken" / "heads.json"))

  def test_unknown_suite_ends_in_one_line(self):
    command = [sys.executable, "-m", "experiments.benchmark", "--suite=pets"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "suite" in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout


class TestNumbers:
  def test_spread(self):
    assert measure.spread([4, 4]) == measure.spread([0, 0]) == 0
    assert measure.spread([2, 3]) == 0.5
    assert measure.spread([0, 1]) == float("inf")

  def test_verdict_turns_at_a_tenth(self):
    assert measure.verdict([100, 109]).startswith("flat")
    assert measure.verdict([100, 111]).startswith("NOT flat")

  def test_ratio_pairs_neighbours(self):
    # The machine slows fourfold; the step stays twice as long.
    slow, fast = {"walls": [2, 4, 8]}, {"walls": [1, 2, 4]}
    assert measure.ratio(slow, fast) == 2


@pytest.mark.slow
def test_memory_of_modules_is_less_than_end_to_end():
  """The suite at the size of a toy."""
  table = bench_memory.by_depth((1, 2), ("R0",), batch=8)
  mib = {(row["mode"], row["blocks"]): row["mib"] for row in table.rows}
  # A batch of 8 leaves the gradients themselves the larger part; what grows
  # with depth is still less.
  whole = mib["end to end", 6] - mib["end to end", 3]
  assert 0 < mib["R0", 6] - mib["R0", 3] < whole
  assert len(table.reading) == 2


def test_the_bound_on_memory_is_judged():
  assert bench_memory.within(0.25) == "within a quarter"
  assert bench_memory.within(0.251) == "NOT within a quarter"
  # Of the modes of the last count the first is compiled as usual too.
  rows = [
    {"mode": "end to end", "modules": 1, "mib": 100.0, "share": 100.0},
    {"mode": "R0", "modules": 8, "mib": 40.0, "share": 40.0},
    {"mode": "R0", "modules": 16, "mib": 20.0, "share": 20.0, "usual": 27.5},
    {"mode": "E", "modules": 16, "mib": 30.0, "share": 30.0},
  ]
  rows[0]["usual"] = 110.0
  first, second, third = bench_memory._read_modules(rows)
  assert first == (
    "R0 with 16 modules needs 20.0 % of end to end: within a quarter."
  )
  assert second.startswith("E ") and second.endswith(": NOT within a quarter.")
  assert (
    "110.0 MiB (+10.0 %) and R0 with 16 modules 27.5 MiB (+37.5 %)" in third
  )


@pytest.mark.slow
def test_sixteen_modules_need_a_quarter_of_end_to_end():
  """In the smallest network with such a list; the suite has the larger one."""
  table = bench_memory.by_modules(32, (1, 16), ("R0",), batch=16)
  whole, part = table.rows
  assert (whole["mode"], part["mode"]) == ("end to end", "R0")
  assert part["share"] == pytest.approx(100 * part["mib"] / whole["mib"])
  assert part["share"] <= 100 * bench_memory.BOUND  # 16.4 %
  assert "R0 with 16 modules" in table.reading[0]
  assert all(line.endswith(": within a quarter.") for line in table.reading)
  # Code that is not optimised needs the same memory, to the byte so far.
  for row in table.rows:
    assert row["usual"] == pytest.approx(row["mib"], rel=0.01)


@pytest.mark.slow
def test_stages_side_by_side():
  """The suite at the size of a toy; times say nothing here."""
  setup = bench_stages.Setup((4, 4), ("conv0",), 4 * 640, 1, 8)
  table = bench_stages.side_by_side(setup, repetitions=1)
  rows = {row["row"]: row for row in table.rows}
  assert len({rows[r]["sha"] for r in bench_stages.ROWS[1:]}) == 1
  assert rows["end to end"]["sha"] != rows["one device"]["sha"]
  assert rows["at once"]["sent"] == bench_stages.BATCH * 4 * 4 * 4 * 4
  assert rows["one device"]["sent"] == 0
  assert rows["at once"]["accuracy"] == rows["one device"]["accuracy"]
  assert all(row["busy"] > 0 for row in table.rows)
  assert "the same, bit for bit" in " ".join(table.reading)
  assert table.reading[2] == bench_stages.held(table.rows)


class TestBusy:
  def test_a_device_of_two_is_half_of_the_time(self):
    assert bench_stages.busy([2, 4, 4], [2, 4, 4], devices=1) == 100
    assert bench_stages.busy([2, 4, 4], [2, 4, 4], devices=2) == 50
    # The median of the shares, which one disturbed stretch does not move.
    assert bench_stages.busy([2, 4, 40], [2, 2, 20], devices=1) == 50

  def test_a_device_that_took_two_cores_is_told(self):
    def rows(one):
      shares = [(1, one), (1, 90.0), (2, 180.0)]
      return [{"devices": n, "busy": share} for n, share in shares]

    assert "on 1.05 cores at most" in bench_stages.held(rows(105.0))
    assert "a device did keep to one core" in bench_stages.held(rows(110.0))
    assert "a device did NOT keep to" in bench_stages.held(rows(111.0))
