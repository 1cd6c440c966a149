"""Metrics against the toolboxes' own code, and against sums done by hand."""

import json
import pathlib

import jaxtyping
import numpy as np
import pytest

from mhil import metrics

GOLDEN = pathlib.Path(__file__).parent / "golden"
MATRICES = np.load(GOLDEN / "cl_metrics_matrices.npz")
PREDICTIONS = np.load(GOLDEN / "cl_metrics_predictions.npz")
CASES = range(20)
# Golden numbers are stored in float32, whose step just below 1 is 6e-8; the
# matrix they were computed from was rounded to it as well.
CLOSE = dict(rtol=0, atol=3e-7)
HAND = np.array(
  [[0.9, np.nan, np.nan], [0.5, 0.8, np.nan], [0.6, 0.3, 1.0]], np.float64
)


def golden(case):
  """Full matrix, the same with its future unmeasured, and the task sizes."""
  full = MATRICES[f"case{case:02}/R"]
  past = np.where(np.tri(len(full), dtype=bool), full, np.nan)
  return full, past, MATRICES[f"case{case:02}/task_sizes"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_step_accuracies(case, weighted):
  full, past, sizes = golden(case)
  name = "weighted" if weighted else "unweighted"
  sizes = sizes if weighted else None
  for matrix in (full, past):
    steps = metrics.step_accuracy(matrix, sizes)
    want = MATRICES[f"case{case:02}/step_acc_{name}"]
    np.testing.assert_allclose(steps, want, **CLOSE)
    np.testing.assert_allclose(
      metrics.average_incremental_accuracy(matrix, sizes),
      MATRICES[f"avg_inc_{name}"][case],
      **CLOSE,
    )
    np.testing.assert_allclose(
      metrics.last_accuracy(matrix, sizes),
      MATRICES[f"final_avg_{name}"][case],
      **CLOSE,
    )
    np.testing.assert_allclose(
      metrics.average_accuracy(matrix),
      MATRICES["final_avg_unweighted"][case],
      **CLOSE,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
  "variant, name",
  [
    ("chaudhry", "forgetting_chaudhry"),
    ("full_max", "forgetting_chaudhry_fullmax"),
    ("clipped", "forgetting_pycil"),
    ("clipped", "forgetting_mammoth_seen"),
  ],
)
def test_forgetting(case, variant, name):
  full, _, _ = golden(case)
  got = metrics.forgetting(full, variant)
  np.testing.assert_allclose(got, MATRICES[name][case], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_forgetting_without_a_measured_future(case):
  full, past, _ = golden(case)
  for variant in ("chaudhry", "clipped"):
    assert metrics.forgetting(past, variant) == metrics.forgetting(
      full, variant
    )
  assert metrics.forgetting(past, "full_max") == metrics.forgetting(past)


@pytest.mark.parametrize("variant", ["chaudhry", "full_max", "clipped"])
def test_forgetting_is_the_mean_over_tasks(variant):
  matrix = np.array([[0.9, 0.1, 0.1], [0.6, 0.8, 0.2], [0.5, 0.9, 0.7]])
  each = metrics.forgetting_per_task(matrix, variant)
  gained = 0.0 if variant == "clipped" else -0.1
  np.testing.assert_allclose(each, [0.4, gained], atol=1e-12)
  assert metrics.forgetting(matrix, variant) == each.mean()
  assert metrics.forgetting_per_task(matrix[:1, :1], variant).size == 0


def test_the_variants_of_forgetting_do_differ():
  # Task 0 gains at the end; before it was learnt, task 1 was at its best.
  matrix = np.array([[0.5, 0.9, 0.0], [0.4, 0.6, 0.0], [0.7, 0.5, 0.8]])
  # By hand: (0.5 - 0.7, 0.6 - 0.5), (0.5 - 0.7, 0.9 - 0.5), (0, 0.6 - 0.5);
  # float64 rounding of one subtraction is 1e-16.
  got = [
    metrics.forgetting(matrix, variant)
    for variant in ("chaudhry", "full_max", "clipped")
  ]
  np.testing.assert_allclose(got, [-0.05, 0.1, 0.05], rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_transfer(case):
  full, past, _ = golden(case)
  for name in ("bwt_lopez_paz", "bwt_avalanche"):
    want = MATRICES[name][case]
    np.testing.assert_allclose(metrics.backward_transfer(full), want, **CLOSE)
    np.testing.assert_allclose(metrics.backward_transfer(past), want, **CLOSE)
  np.testing.assert_allclose(
    -metrics.backward_transfer(past),
    MATRICES["forgetting_avalanche"][case],
    **CLOSE,
  )
  baseline = MATRICES[f"case{case:02}/baseline"]
  for name in ("fwt", "fwt_avalanche"):
    np.testing.assert_allclose(
      metrics.forward_transfer(full, baseline), MATRICES[name][case], **CLOSE
    )


def test_by_hand():
  sizes = (1, 3, 4)
  # Sums of three numbers of order 1 in float64.
  near = dict(rel=0, abs=1e-15)
  steps = metrics.step_accuracy(HAND, sizes)
  assert steps == pytest.approx([0.9, 2.9 / 4, 5.5 / 8], **near)
  assert metrics.summary(HAND, sizes) == {
    "average_incremental_accuracy": pytest.approx(steps.mean(), **near),
    "last_accuracy": pytest.approx(5.5 / 8, **near),
    "average_accuracy": pytest.approx(1.9 / 3, **near),
    "forgetting": pytest.approx((0.3 + 0.5) / 2, **near),
    "backward_transfer": pytest.approx((-0.3 - 0.5) / 2, **near),
  }


@pytest.mark.parametrize("tasks", [1, 2, 50])
def test_summary_is_safe_for_json(tasks):
  matrix = np.where(np.tri(tasks, dtype=bool), 0.5, np.nan).astype(np.float32)
  numbers = metrics.summary(matrix, np.arange(1, tasks + 1))
  assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
  assert all(type(value) is float for value in numbers.values())


def test_one_task_forgets_and_transfers_nothing():
  one = np.array([[0.7]])
  numbers = metrics.summary(one)
  assert numbers.pop("forgetting") == numbers.pop("backward_transfer") == 0.0
  assert set(numbers.values()) == {0.7}
  assert metrics.forward_transfer(one, np.array([0.1])) == 0.0


@pytest.mark.parametrize("hole", [(0, 0), (2, 1)])
@pytest.mark.parametrize(
  "metric",
  [
    metrics.step_accuracy,
    metrics.forgetting,
    metrics.backward_transfer,
    metrics.summary,
  ],
)
def test_a_hole_in_the_past_is_refused(metric, hole):
  matrix = HAND.copy()
  matrix[hole] = np.nan
  with pytest.raises(ValueError, match=rf"matrix\[{hole[0]}, {hole[1]}\] is"):
    metric(matrix)


def test_other_refusals():
  with pytest.raises(ValueError, match=r"matrix\[0, 1\] is NaN; forward"):
    metrics.forward_transfer(HAND, np.zeros(3))
  with pytest.raises(ValueError, match="variant='worst' is no forgetting"):
    metrics.forgetting(HAND, "worst")
  for sizes in ((1, 2), (1, 0, 2)):
    with pytest.raises(ValueError, match="does not weigh 3 tasks"):
      metrics.step_accuracy(HAND, sizes)
  with pytest.raises(ValueError, match=r"matrix has shape \(0, 0\)"):
    metrics.summary(np.zeros((0, 0)))
  # The checker of shapes is on in tests and comes first.
  with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
    metrics.summary(np.zeros((2, 3)))


def test_csv_gives_the_same_floats_back(tmp_path):
  matrix = HAND / 3
  metrics.write_csv(matrix, tmp_path / "accuracy.csv")
  lines = (tmp_path / "accuracy.csv").read_text().splitlines()
  assert lines[0] == "after_task,task_0,task_1,task_2"
  assert lines[1] == f"0,{0.9 / 3!r},,"
  back = np.genfromtxt(tmp_path / "accuracy.csv", delimiter=",", skip_header=1)
  np.testing.assert_array_equal(back[:, 0], [0, 1, 2])
  np.testing.assert_array_equal(back[:, 1:], matrix)


def tally_of(truth, chosen, sizes):
  """Tally of labels in learning order, all that predictions can tell."""
  tasks = len(sizes)
  head = np.repeat(np.arange(tasks), sizes)
  confusion = np.zeros((tasks, tasks), int)
  np.add.at(confusion, (head[truth], head[chosen]), 1)
  correct = np.bincount(head[truth], truth == chosen, tasks).astype(int)
  return metrics.Tally(
    total=confusion.sum(1),
    correct=correct,
    head_correct=confusion.diagonal(),
    within_correct=correct,
    top5=correct,
    confusion=confusion,
  )


@pytest.mark.parametrize("case", range(3))
def test_tallies_of_predictions(case):
  def read(name):
    return PREDICTIONS[f"case{case}/{name}"]

  sizes = read("task_sizes")
  rows, overall = [], []
  for t in range(len(sizes)):
    truth, chosen = read(f"step{t}/y_true"), read(f"step{t}/y_pred")
    tally = tally_of(truth, chosen, sizes)
    overall.append(metrics.accuracy(tally))
    rows.append(metrics.task_accuracies(tally))
    assert metrics.task_id_accuracy(tally) >= overall[-1]
    # PyCIL rounds per cent to two places.
    pycil = read(f"step{t}/pycil_total_old_new")[0]
    assert 100 * overall[-1] == pytest.approx(pycil, rel=0, abs=0.0051)
  matrix = np.stack(rows)
  seen = np.tri(len(sizes), dtype=bool)
  np.testing.assert_array_equal(~np.isnan(matrix), seen)
  np.testing.assert_allclose(matrix[seen], read("R")[seen], **CLOSE)
  np.testing.assert_allclose(overall, read("step_acc_all_seen"), **CLOSE)
  # Weighted by test samples, the matrix gives the overall accuracy again.
  samples = tally.total
  np.testing.assert_allclose(
    metrics.step_accuracy(matrix, samples), overall, **CLOSE
  )
  average = metrics.average_incremental_accuracy(matrix, samples)
  # A mean of numbers rounded to 0.005.
  assert 100 * average == pytest.approx(
    float(read("avg_inc_pycil")), rel=0, abs=0.0051
  )
  np.testing.assert_allclose(
    metrics.forgetting(matrix), read("forgetting_chaudhry"), **CLOSE
  )


@pytest.mark.parametrize("case", [0, 1])
def test_pycil_forgetting_of_its_groups_of_ten(case):
  tasks = len(PREDICTIONS[f"case{case}/task_sizes"])
  # PyCIL counts groups of ten classes as tasks and pads its table with zeros.
  table = np.zeros((tasks, tasks))
  for t in range(tasks):
    groups = PREDICTIONS[f"case{case}/step{t}/pycil_groups10"]
    table[t, : len(groups)] = groups
  want = PREDICTIONS[f"case{case}/forgetting_pycil"]
  # Per cent in float32, whose step near 90 is 8e-6.
  np.testing.assert_allclose(
    metrics.forgetting(table, "clipped"), want, rtol=0, atol=2e-5
  )


def test_tally_by_hand():
  tally = metrics.Tally(
    total=np.array([10, 30, 0]),
    correct=np.array([4, 18, 0]),
    head_correct=np.array([5, 20, 0]),
    within_correct=np.array([9, 27, 0]),
    top5=np.array([10, 28, 0]),
    confusion=np.array([[5, 5, 0], [10, 20, 0], [0, 0, 0]]),
  )
  # Sample-weighted: the mean of the tasks' own rates would be 0.5.
  assert metrics.accuracy(tally) == 22 / 40
  assert metrics.task_id_accuracy(tally) == 25 / 40
  assert metrics.within_task_accuracy(tally) == 36 / 40
  assert metrics.top5_accuracy(tally) == 38 / 40
  np.testing.assert_array_equal(
    metrics.task_accuracies(tally), [0.4, 0.6, np.nan]
  )


def test_an_empty_tally_is_refused():
  nothing = np.zeros(2, int)
  tally = metrics.Tally(*[nothing] * 5, np.zeros((2, 2), int))
  for metric in (
    metrics.accuracy,
    metrics.task_id_accuracy,
    metrics.within_task_accuracy,
    metrics.top5_accuracy,
  ):
    with pytest.raises(ValueError, match="total=0 samples were evaluated"):
      metric(tally)
  assert np.isnan(metrics.task_accuracies(tally)).all()
