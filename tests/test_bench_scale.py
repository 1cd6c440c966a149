"""The suite `scale` at the size of a toy, against sums done by hand."""

import functools

import pytest

from experiments import bench_scale, measure, setups
from mhil import networks

SMALL = setups.Setup(
  "small mlp",
  lambda logits: networks.mlp(192, logits, (64,), axis="data"),
  side=8,
  batch=8,
  samples=160,
)
TEN = SMALL._replace(each=10)
IMAGES = 16
# Parameters and Adam's moments of a head, its count, loss and first bad step.
STATE = 4 * (3 * (192 * 64 + 64 + 64 * 3 + 3) + 3)


@functools.cache
def apart():
  return bench_scale.apart(SMALL, (2, 8))


@functools.cache
def one_task():
  return bench_scale.one_task(SMALL, 4)


@functools.cache
def inference():
  return bench_scale.inference(TEN, (2, 8), IMAGES)


def column(table, key, **labels):
  return [r[key] for r in table.rows if labels.items() <= r.items()]


class TestApart:
  @pytest.mark.slow
  def test_dce_moves_nothing(self):
    assert column(apart(), "traffic", loss="D-CE") == [0, 0]
    assert column(apart(), "collectives", loss="D-CE") == [0, 0]

  @pytest.mark.slow
  @pytest.mark.parametrize("key", bench_scale.FLAT)
  def test_dce_is_flat(self, key):
    values = column(apart(), key, loss="D-CE")
    # Tables of classes grow; see below. Measured below 1 %.
    assert len(values) == 2 and measure.spread(values) < 0.05

  def test_state_is_that_of_a_head(self):
    # Besides the number of the step.
    assert column(apart(), "state") == [STATE + 4] * 6

  def test_tables_grow_with_classes(self):
    """The control: this does grow, by three words a class."""
    two, eight = column(apart(), "tables", loss="D-CE")
    assert eight - two == 6 * 2 * 12
    assert "24 bytes a task" in apart().reading[1]

  def test_distributed_ce_moves_two_numbers_a_sample(self):
    assert column(apart(), "traffic", loss="distributed CE") == [2 * 4 * 8] * 2
    assert column(apart(), "collectives", loss="distributed CE") == [2, 2]

  def test_centralised_ce_gathers_every_logit(self):
    traffic = column(apart(), "traffic", loss="centralised CE")
    assert traffic == [4 * 2 * 8 * n for n in (2, 8)]

  def test_the_reading_quotes_the_table(self):
    first, _, last = apart().reading
    assert "Over `head` 0 bytes in 0 collectives" in first
    assert "state flat (0.0 %)" in first
    assert "collectives, flat (0.0 %); all 8 devices wait" in last
    assert "Centralised CE moves 512 bytes to each of 8 devices, 4 tim" in last

  @pytest.mark.slow
  def test_markdown_has_a_cell_for_every_column(self):
    for table in apart(), one_task(), inference():
      lines = measure.markdown(table).splitlines()
      rows = [line for line in lines if line.startswith("|")]
      assert len(rows) == 2 + len(table.rows)
      assert {r.count("|") for r in rows} == {len(table.columns) + 1}
      assert "?" not in "".join(rows)


class TestOneTask:
  @pytest.mark.slow
  def test_one_more_costs_the_others_nothing_with_dce(self):
    for key in "more_state", "more_traffic":
      assert column(one_task(), key, loss="D-CE", devices=4) == [0]

  def test_one_more_costs_a_logit_a_sample_with_centralised_ce(self):
    of = {"loss": "centralised CE", "devices": 4}
    assert column(one_task(), "more_traffic", **of) == [4 * 2 * 8]
    of["loss"] = "distributed CE"
    assert column(one_task(), "more_traffic", **of) == [0]

  def test_one_device_holds_all_and_keeps_one_more(self):
    assert column(one_task(), "state", devices=1) == [4 * STATE + 4] * 3
    assert column(one_task(), "more_state", devices=1) == [STATE] * 3
    assert column(one_task(), "traffic", devices=1) == [0] * 3

  def test_a_turn_costs_the_same_anywhere(self):
    for kind in setups.KINDS:
      apart, alone = column(one_task(), "flops", loss=kind)
      # What differs are sums over a device's logits and tables.
      assert measure.spread([apart, alone]) < 0.05

  def test_work_of_the_whole_network(self):
    """By hand: 5 tasks, a turn of 3 and a forward pass of 1 before it."""
    rows = [{"flops": 3e9}, {"flops": 4e9}]
    bench_scale._work(rows, 5)
    assert [row["all"] for row in rows] == [15, 20]
    assert [row["new"] for row in rows] == [3, 8]

  def test_a_forward_pass_is_what_the_coupled_losses_pay(self):
    ours, theirs = (
      column(one_task(), "flops", loss=kind, devices=4)[0]
      for kind in ("D-CE", "centralised CE")
    )
    # Two operations a multiply-add; the rest are activations and the loss.
    products = 2 * 8 * (192 * 64 + 64 * 3)
    assert products < theirs - ours < 1.2 * products

  def test_the_reading_quotes_the_table(self):
    row = one_task().rows[2]
    assert (
      f"sends each device {row['more_traffic']:,} bytes"
      in (one_task().reading[1])
    )
    assert f"receive {4 * row['traffic']:,} bytes" in one_task().reading[2]


class TestInference:
  def test_bytes(self):
    """Four bytes a number: c of a head, two of a head, or two in all."""
    every, top, winner = (
      column(inference(), "traffic", way=way) for way in bench_scale.WAYS
    )
    assert every == [4 * IMAGES * n * 10 for n in (2, 8)]
    assert top == [4 * IMAGES * n * 2 for n in (2, 8)]
    assert winner == [4 * IMAGES * 2] * 2

  def test_the_reading_quotes_the_table(self):
    first, last = inference().reading
    assert "5.0 times less; it grows 4 times from 2 heads on." in first
    assert "128 bytes in 2 collectives: flat (0.0 %) in the number" in last
