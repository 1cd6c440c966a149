"""Herding and the reference rules of exemplars, against golden numbers."""

import pathlib

import numpy as np
import pytest

from mhil import herding
from tests import exemplars

GOLDEN = pathlib.Path(__file__).parent / "golden"
LABELS = np.arange(40, dtype=np.int32) % 4


def golden(name):
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
    cases: dict[str, dict[str, np.ndarray]] = {}
    for key in arrays.files:
      case, array = key.split("/")
      cases.setdefault(case, {})[array] = arrays[key]
  return cases.values()


class TestShares:
  @pytest.mark.parametrize("size", [0, 1, 7, 100])
  @pytest.mark.parametrize("classes", [1, 3, 7, 9])
  def test_total_is_used_up_and_balanced(self, size, classes):
    counts = exemplars.shares(size, classes)
    assert sum(counts) == size
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)

  def test_floor_and_per_class(self):
    assert exemplars.shares(30, 4, "total") == (8, 8, 7, 7)
    assert exemplars.shares(30, 4, "floor") == (7, 7, 7, 7)
    assert exemplars.shares(30, 4, "per_class") == (30, 30, 30, 30)

  @pytest.mark.parametrize("protocol", exemplars.PROTOCOLS)
  def test_no_share_grows_when_classes_arrive(self, protocol):
    for size in range(40):
      for classes in range(1, 20):
        before = exemplars.shares(size, classes, protocol)
        after = exemplars.shares(size, classes + 1, protocol)
        assert all(b >= a for b, a in zip(before, after))


def drawn(classes, size, seed, protocol="total"):
  """Rows kept where the classes arrive at once, chosen at random."""
  orders = {c: exemplars.random_order(LABELS, c, seed) for c in classes}
  return exemplars.rows(exemplars.update({}, orders, size, protocol))


class TestRandom:
  def test_nothing_kept(self):
    assert drawn((), 8, 0).tolist() == []
    assert drawn((1, 2), 0, 0).tolist() == []

  def test_a_small_class_gives_what_it_has(self):
    kept = drawn((0, 1), 100, 0)
    assert sorted(kept) == sorted(np.flatnonzero(LABELS < 2))

  def test_per_class(self):
    kept = drawn((3, 1), 4, 0, "per_class")
    assert LABELS[kept].tolist() == [3] * 4 + [1] * 4

  def test_seed_and_class_move_the_order(self):
    first = exemplars.random_order(LABELS, 0, 0)
    assert sorted(first) == list(range(0, 40, 4))
    assert first.tolist() != exemplars.random_order(LABELS, 0, 1).tolist()
    other = exemplars.random_order(LABELS, 1, 0) - 1
    assert first.tolist() != other.tolist()

  @pytest.mark.parametrize("protocol", exemplars.PROTOCOLS)
  def test_step_by_step_equals_at_once(self, protocol):
    kept: dict = {}
    for seen, c in enumerate((2, 0, 3, 1), 1):
      order = exemplars.random_order(LABELS, c, 7)
      kept = exemplars.update(kept, {c: order}, 9, protocol)
      want = drawn((2, 0, 3, 1)[:seen], 9, 7, protocol)
      assert exemplars.rows(kept).tolist() == want.tolist()


def herd(case, step, kept):
  """What is kept after a step, by the golden file's features."""
  steps = [0, *case["steps"]]
  per_class = bool(case["fixed_memory"])
  protocol = "per_class" if per_class else "floor"
  size = int(case["memory_size"])
  if per_class:
    size = int(case[f"per_class_step{step}"])
  share = exemplars.shares(size, int(steps[step + 1]), protocol)[-1]
  assert share == case[f"per_class_step{step}"]
  orders = {}
  for c in range(steps[step], steps[step + 1]):
    of_class = np.flatnonzero(case["labels"] == c)
    features = case[f"features_step{step}"][of_class]
    orders[c] = herding.herding(features, of_class, share)
  return exemplars.update(kept, orders, size, protocol)


class TestHerding:
  @pytest.mark.parametrize("case", golden("herding_pycil"))
  def test_golden(self, case):
    kept: dict = {}
    for step in range(len(case["steps"])):
      kept = herd(case, step, kept)
      rows = exemplars.rows(kept)
      assert rows.tolist() == case[f"exemplar_index_step{step}"].tolist()
      labels = case[f"exemplar_label_step{step}"]
      assert case["labels"][rows].tolist() == labels.tolist()

      features = case[f"features_step{step}"]
      means = [herding.class_mean(features[kept[c]]) for c in kept]
      # Theirs is summed in float32: a few units in the last place.
      want = case[f"class_means_step{step}"]
      np.testing.assert_allclose(means, want, rtol=0, atol=1e-6)

      test = case[f"nme_test_features_step{step}"].astype(np.float64)
      test /= np.linalg.norm(test, axis=1, keepdims=True) + 1e-8
      far = np.linalg.norm(test[:, None] - np.array(means), axis=2)
      nearest = case[f"nme_prediction_step{step}"]
      assert far.argmin(1).tolist() == nearest.tolist()

  def test_picks_by_hand(self):
    # Mean (1.6, 1.8) / 3, from which the third is 0.21 away, the others 0.76
    # and 0.67; then (1.6, 0.8) / 2 is 0.33 away, (0.6, 1.8) / 2 is 0.38.
    x = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    rows = np.array([40, 41, 42])
    assert herding.herding(x, rows, 3).tolist() == [42, 40, 41]
    # The length of a feature says nothing, though it moves the raw mean.
    lengths = np.array([[1], [9], [1]], np.float32)
    assert herding.herding(x * lengths, rows, 3).tolist() == [42, 40, 41]

  def test_a_prefix_is_the_order_of_fewer_picks(self):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    rows = np.arange(100, 130)
    order = herding.herding(x, rows, 99)
    assert sorted(order) == rows.tolist()
    for count in 0, 1, 7:
      assert herding.herding(x, rows, count).tolist() == order[:count].tolist()

  def test_nearer_to_the_mean_than_random(self):
    x = np.random.default_rng(1).normal(0.5, 1, (60, 4)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    labels = np.zeros(60, np.int32)

    def far(rows):
      return np.linalg.norm(unit[rows].mean(0) - unit.mean(0))

    herded = far(herding.herding(x, np.arange(60), 8))
    drawn = [far(exemplars.random_order(labels, 0, s)[:8]) for s in range(200)]
    # Greedy picks are not the best of all, so a lucky draw may beat them.
    assert herded < np.quantile(drawn, 0.1)

  def test_features_that_are_not_finite(self):
    x = np.ones((3, 2), np.float32)
    x[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"features of 1 of 3 samples"):
      herding.herding(x, np.arange(3), 2)


class TestReservoir:
  @pytest.mark.parametrize("case", golden("reservoir_mammoth"))
  def test_golden(self, case):
    n, size, chunk = (int(case[k]) for k in ("n", "buffer_size", "chunk"))
    for i, want in enumerate(case["buffer_after_chunk"]):
      end = min((i + 1) * chunk, n)
      draws = case["draws"][: max(end - size, 0)]
      held = exemplars.reservoir(np.arange(end), size, draws=draws)
      want = want[want >= 0]  # -1 is an empty slot
      assert held.tolist() == want.tolist()
    assert held.tolist() == case["final"].tolist()
    assert (held % 7).tolist() == case["final_labels"].tolist()

  def test_every_row_is_as_likely(self):
    n, size, runs = 40, 10, 400
    held = np.zeros(n)
    for seed in range(runs):
      held[exemplars.reservoir(np.arange(n), size, seed)] += 1
    # Each count is binomial(400, 1/4): 100 with a deviation of 8.7. The
    # largest of 40 stays within 4.5 of them with probability 0.9997.
    assert np.abs(held - runs * size / n).max() < 4.5 * 8.7
    assert held.sum() == runs * size

  def test_a_longer_stream_goes_on(self):
    """Row `end` fills one slot or none; all others stay."""
    rows = np.arange(1000, 1060)
    before = exemplars.reservoir(rows[:20], 8, 3)
    for end in range(21, 61):
      after = exemplars.reservoir(rows[:end], 8, 3)
      changed = after[after != before]
      assert changed.tolist() in ([], [rows[end - 1]])
      before = after

  def test_seed_moves_and_short_streams_are_kept_whole(self):
    rows = np.arange(50)
    first = exemplars.reservoir(rows, 5, 0)
    assert first.tolist() == exemplars.reservoir(rows, 5, 0).tolist()
    assert first.tolist() != exemplars.reservoir(rows, 5, 1).tolist()
    assert exemplars.reservoir(rows[:3], 5).tolist() == [0, 1, 2]
    assert exemplars.reservoir(rows, 0).tolist() == []
