"""Curves: what is counted on the way, and what a kept curve is of."""

import itertools
import json

import numpy as np
import pytest

from experiments import cli, compare, curves, suites
from mhil import dealing, inputs, sharding
from tests import tiny
from tests.test_subnets import EVERY, build

ROWS = {row.label: row for row in suites.SUITES["subnets_digits"]}


def config_of(label):
  return compare.configure(ROWS[label], 0)


@pytest.mark.slow
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
    dealt=(sharding.Collective("all-to-all", 160, ("subnet",)),),
  )
  assert curves.cost_of(run) == curves.Cost(
    flops=7.0, deal=120.0, step=150.0, exchange=60.0
  )


def test_rows_that_fill_a_batch_are_no_samples():
  recipe = tiny.RECIPE._replace(batch=12)
  run = tiny.build(recipe=recipe, memory=tiny.NONE)
  phase = run.phases[0]
  # 40 rows in four batches of 12, twice.
  found = [curves.samples_of(phase, 12, steps) for steps in range(1, 9)]
  assert found == [12, 24, 36, 40, 52, 64, 76, 80]
  # As many as the order of the passes has.
  real = [
    int((batch >= 0).sum())
    for epoch in range(2)
    for batch in inputs.order_of(run, tiny.feed(run, 0), epoch)
  ]
  assert np.cumsum(real).tolist() == found


class TestWalk:
  @pytest.mark.slow
  def test_counts_steps_exchanges_and_rounds(self):
    run = build(2)
    done = list(curves.walk(run, tiny.feed(run, 0)))
    steps = len(run.phases[0].steps)
    assert [d.steps for d in done] == list(range(1, steps + 1))
    # 10 steps, a round is 3 long, and the last is short.
    due = [*range(EVERY, steps, EVERY), steps]
    assert [d.exchanges for d in done] == [
      sum(x <= d.steps for x in due) for d in done
    ]
    # What the last exchange dealt has had no step.
    indices = done[-1].indices
    assert len(indices) == len(due)
    assert all(
      not np.array_equal(a["dense1"], b["dense1"])
      for a, b in itertools.pairwise(indices)
    )

  def test_copies_in_step_exchange_nothing(self):
    run = build(2, method="data_parallel", norm="none")
    *_, last = curves.walk(run, tiny.feed(run, 0))
    assert (last.exchanges, last.again, last.indices) == (0, 0, [{}])


class TestRepeated:
  # All units of a device to its neighbour, for which there is no room at once.
  HOME = np.arange(128, dtype=np.int32).reshape(4, 32)
  ROUND = np.roll(HOME, 1, axis=0)
  EVEN = np.ascontiguousarray(HOME.reshape(4, 8, 4).transpose(2, 0, 1)).reshape(
    4, 32
  )

  def partition(self, *pairs, renew=True):
    run = build(2)
    return run.partition._replace(pairs=pairs, renew=renew)

  @pytest.mark.slow
  def test_where_a_pair_moves_more_than_there_is_room_for(self):
    assert dealing.trips(self.HOME, self.ROUND) == 2
    assert dealing.trips(self.HOME, self.EVEN) == 1
    for new, want in (self.ROUND, True), (self.EVEN, False):
      found = curves.repeated(self.partition(), {"a": self.HOME}, {"a": new})
      assert found == want

  def test_blocks_of_hidden_layers_go_home_first(self):
    old, new = {"a": self.HOME}, {"a": self.EVEN}
    # Here all are at home, and a device sends itself more than there is room.
    assert dealing.trips(self.HOME, self.HOME) == 2
    assert curves.repeated(self.partition(("b", "a")), old, new)

  def test_fixed_subnets_move_nothing(self):
    old = {"a": self.HOME}
    fixed = self.partition(renew=False)
    assert not curves.repeated(fixed, old, {"a": self.ROUND})


FOUND = {"curve": [], "tested": {}}


class TestKept:
  def finish(self, monkeypatch, path, tests=4, **changed):
    trained = []

    def train(config, tests):
      trained.append(config)
      return FOUND

    monkeypatch.setattr(curves, "trained", train)
    config = config_of("n=2 IST")
    for name, value in changed.items():
      setattr(config.train, name, value)
    return curves.finish(config, tests, path), len(trained)

  def test_what_is_done_is_not_trained_again(self, monkeypatch, tmp_path):
    path = tmp_path / "new" / "a.json"
    first, made = self.finish(monkeypatch, path)
    again, more = self.finish(monkeypatch, path)
    assert (made, more) == (1, 0) and first == again
    assert first["asked"]["tests"] == 4
    assert first["asked"]["network.widths"] == [128, 128]

  def test_a_curve_of_another_configuration_is_refused(
    self, monkeypatch, tmp_path
  ):
    path = tmp_path / "a.json"
    self.finish(monkeypatch, path)
    for changed, words in (
      ({"epochs": 7}, r"train\.epochs=50, not 7; remove it"),
      ({"tests": 5}, r"tests=4, not 5; remove it, or use another --runs"),
    ):
      with pytest.raises(cli.UserError, match=words) as raised:
        self.finish(monkeypatch, path, **changed)
      assert "\n" not in str(raised.value)

  def test_a_curve_that_does_not_say_of_what_is_refused(
    self, monkeypatch, tmp_path
  ):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(FOUND))
    with pytest.raises(cli.UserError, match="holds a curve with seed=None"):
      self.finish(monkeypatch, path)

  def test_it_does_not_say_where_the_data_lie(self, monkeypatch, tmp_path):
    self.finish(monkeypatch, tmp_path / "a.json")
    assert "folder" not in (tmp_path / "a.json").read_text()


def test_a_stream_of_tasks_is_refused():
  config = config_of("n=2 IST")
  config.stream.increment = 5
  with pytest.raises(cli.UserError, match="2 tasks; curves are of one task"):
    curves.trained(config, 4)


@pytest.mark.slow
def test_a_short_curve():
  config = config_of("n=2 IST")
  config.train.epochs = 2
  found = curves.trained(config, 4)
  curve = found["curve"]
  assert [p["step"] for p in curve] == sorted({p["step"] for p in curve})
  last = curve[-1]
  # 1,437 images in batches of 64, twice; a round is 20 steps, the last short.
  assert last["step"] == 46 and last["samples"] == 2 * 1437
  assert (found["exchanges"], found["again"]) == (3, 0)
  room, m = dealing.room_for(2, 64), 64
  owned = 64 * (64 + 4) + 64 * (10 + 1 + 4)
  given = 4 * (2 * room / m * (owned + 2 * 64 * 64))
  shared = 4 * 2 * 11
  # Three exchanges, and the first deal.
  assert last["bytes"] == pytest.approx(4 * (given / 2 + shared))
  # Of 26,496 weights a half of those between hidden layers are away each time.
  assert 1 - 16384 / 2 / 26496 < last["coverage"] < 1
  assert last["accuracy"] > 0.5 and set(found["tested"]) == {
    "configured", "batch of whole", "batch of 32"
  }  # fmt: skip
  assert np.isfinite(list(found["tested"].values())).all()
