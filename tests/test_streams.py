"""Streams against the class orders of the field's own toolboxes."""

import pathlib
import re

import numpy as np
import pytest

from mhil import streams

GOLDEN = pathlib.Path(__file__).parent / "golden"
PYCIL = np.load(GOLDEN / "class_orders_pycil.npz")
FIXED = np.load(GOLDEN / "class_orders_fixed.npz")
CONTINUUM = np.load(GOLDEN / "class_orders_continuum.npz")
PYCIL_CASES = sorted({name.split("/")[0] for name in PYCIL.files})
CONTINUUM_CASES = sorted({name.split("/")[0] for name in CONTINUUM.files})


def pycil_stream(case):
  numbers = re.match(r"c(\d+)_seed(\d+)_init(\d+)_inc(\d+)", case).groups()
  classes, seed, base, increment = map(int, numbers)
  seed = None if case.endswith("noshuffle") else seed
  return streams.class_incremental(
    classes, base=base, increment=increment, order_seed=seed
  )


def continuum_arguments(case):
  """Our arguments for a configuration of continuum's `ClassIncremental`."""
  given = {
    name: CONTINUUM[f"{case}/{name}"]
    for name in ("y", "increment_arg", "initial_increment", "nb_tasks_arg")
  }
  classes = len(np.unique(given["y"]))
  order = CONTINUUM[f"{case}/class_order_arg"]
  arguments = {"order": order if order.size else None, "order_seed": None}
  if given["nb_tasks_arg"]:
    return classes, arguments | {
      "increment": classes // int(given["nb_tasks_arg"])
    }
  if given["increment_arg"].size > 1:
    return classes, arguments | {"sizes": given["increment_arg"]}
  return classes, arguments | {
    "increment": int(given["increment_arg"][0]),
    "base": int(given["initial_increment"]) or None,
  }


@pytest.mark.parametrize("case", PYCIL_CASES)
def test_pycil_orders_and_tasks(case):
  stream = pycil_stream(case)
  np.testing.assert_array_equal(stream.order, PYCIL[f"{case}/order"])
  np.testing.assert_array_equal(stream.sizes, PYCIL[f"{case}/increments"])
  np.testing.assert_array_equal(stream.head_of, PYCIL[f"{case}/task_of_class"])
  # A new label counts through the heads: the head's start plus the column.
  starts = np.cumsum(stream.sizes) - stream.sizes
  np.testing.assert_array_equal(
    starts[stream.head_of] + stream.column_of, PYCIL[f"{case}/label_map"]
  )


@pytest.mark.parametrize("case", CONTINUUM_CASES)
def test_continuum_tasks_and_refusals(case):
  classes, arguments = continuum_arguments(case)
  if f"{case}/error" in CONTINUUM.files:
    with pytest.raises(ValueError, match=r"stream\.(increment|sizes)"):
      streams.class_incremental(classes, **arguments)
    return
  stream = streams.class_incremental(classes, **arguments)
  np.testing.assert_array_equal(stream.sizes, CONTINUUM[f"{case}/increments"])
  for t, task in enumerate(stream.tasks):
    # Continuum lists a task's classes sorted, not in the order of arrival.
    assert sorted(task) == sorted(CONTINUUM[f"{case}/task{t}_original_classes"])
  y = CONTINUUM[f"{case}/y"]
  np.testing.assert_array_equal(
    stream.head_of[y], CONTINUUM[f"{case}/task_label"]
  )


def test_seed_1993_is_the_order_that_code_bases_list():
  stream = streams.class_incremental(100, increment=10, order_seed=1993)
  for name in ("der_iCIFAR100_trial1", "facil_cifar100_icarl"):
    np.testing.assert_array_equal(stream.order, FIXED[name])


@pytest.mark.parametrize("classes, seed", [(100, 1993), (10, 0)])
def test_mammoth_maps_labels_with_the_inverse_of_our_order(classes, seed):
  # Mammoth maps class to label with the permutation itself, so its order of
  # arrival is the inverse of ours.
  label_map = FIXED[f"mammoth_label_map_c{classes}_seed{seed}"]
  ours = streams.class_incremental(classes, increment=1, order_seed=seed)
  theirs = streams.class_incremental(
    classes, increment=1, order=np.argsort(label_map)
  )
  np.testing.assert_array_equal(ours.order, label_map)
  np.testing.assert_array_equal(theirs.head_of, label_map)


@pytest.mark.parametrize(
  "name", [name for name in FIXED.files if not name.startswith("mammoth")]
)
def test_published_orders_are_accepted_and_kept(name):
  order = FIXED[name]
  stream = streams.class_incremental(len(order), increment=5, order=order)
  np.testing.assert_array_equal(stream.order, order)


def test_b50_with_five_steps():
  stream = streams.class_incremental(100, base=50, increment=10)
  assert stream.sizes == (50, 10, 10, 10, 10, 10)
  assert stream.head_width == 50
  assert len(stream.seen(0)) == 50
  assert stream.seen(2) == stream.order[:70]
  assert sorted(stream.seen(5)) == list(range(100))


@pytest.mark.parametrize(
  ("base", "increment", "tasks"),
  [(50, 10, 6), (50, 5, 11), (50, 2, 26), (None, 10, 10), (None, 5, 20)],
)
def test_the_fields_protocols(base, increment, tasks):
  stream = streams.class_incremental(
    100, base=base, increment=increment, order_seed=1993
  )
  assert len(stream.tasks) == tasks
  assert stream.sizes == (base or increment, *[increment] * (tasks - 1))
  assert sorted(stream.seen(tasks - 1)) == list(range(100))
  assert stream.order[:3] == (68, 56, 78)  # seed 1993 as the field has it


def test_head_and_column_of_each_class():
  stream = streams.class_incremental(5, sizes=(2, 1, 2), order=(3, 0, 4, 2, 1))
  assert stream.tasks == ((3, 0), (4,), (2, 1))
  assert stream.head_of.tolist() == [0, 2, 2, 0, 1]
  assert stream.column_of.tolist() == [1, 1, 0, 0, 0]
  for c in range(5):
    assert stream.tasks[stream.head_of[c]][stream.column_of[c]] == c


def test_order_seed_is_repeatable_and_matters():
  def order(seed):
    return streams.class_incremental(20, increment=5, order_seed=seed).order

  assert order(3) == order(3)
  assert order(3) != order(4)
  assert order(None) == tuple(range(20))
  assert all(type(c) is int for c in order(3))


def test_a_given_order_beats_the_seed_and_sizes_beat_the_increment():
  stream = streams.class_incremental(
    3, increment=3, sizes=(1, 2), order=(2, 1, 0), order_seed=7
  )
  assert stream.tasks == ((2,), (1, 0))


def test_all_classes_in_the_first_task_is_joint_training():
  assert streams.class_incremental(4, base=4, increment=3).sizes == (4,)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      {"classes": 10, "base": 2, "increment": 3},
      "stream.increment=3 does not divide the 8 classes after stream.base=2; "
      "use stream.sizes=(2, 3, 3, 2) or increment=2",
    ),
    (
      {"classes": 100, "increment": 7},
      "stream.increment=7 does not divide the 100 classes; "
      "use stream.sizes=(...) or increment=5",
    ),
    (
      {"classes": 4, "increment": 9},
      "stream.increment=9 does not divide the 4 classes; "
      "use stream.sizes=(4,) or increment=4",
    ),
    ({"classes": 4, "increment": 0}, "stream.increment=0 makes no tasks"),
    ({"classes": 4}, "stream.increment=None makes no tasks"),
    ({"classes": 0, "increment": 1}, "classes=0 leaves nothing to learn"),
    (
      {"classes": 4, "increment": 1, "base": 5},
      "stream.base=5 does not fit the 4 classes; use 1 to 4",
    ),
    (
      {"classes": 4, "increment": 1, "base": 0},
      "stream.base=0 does not fit the 4 classes",
    ),
    (
      {"classes": 4, "base": 1, "sizes": (1, 3)},
      "stream.base=1 contradicts stream.sizes",
    ),
    (
      {"classes": 10, "sizes": (5, 2, 2)},
      "stream.sizes=(5, 2, 2) add up to 9, not to the 10 classes; "
      "change a size by +1",
    ),
    (
      {"classes": 10, "sizes": (5, 0, 5)},
      "stream.sizes=(5, 0, 5) has a task without classes",
    ),
    ({"classes": 10, "sizes": ()}, "stream.sizes=() has a task without"),
    (
      {"classes": 4, "increment": 2, "order": (0, 1, 1, 7)},
      "stream.order=(0, 1, 1, 7) is no permutation of 0..3: missing 2, 3; "
      "repeated 1; unknown 7; name every class once",
    ),
    (
      {"classes": 20, "increment": 2, "order": (0, 1)},
      "missing 2, 3, 4, 5, 6 and 13 more; name every class once",
    ),
    (
      {"classes": 20, "increment": 2, "order": range(19)},
      "stream.order=(0, 1, 2, 3, 4, 5, 6, 7, ..) is no permutation",
    ),
  ],
)
def test_errors_name_the_field_and_the_fix(arguments, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    streams.class_incremental(**arguments)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("t", [-1, 3])
def test_seen_refuses_a_task_that_is_not_there(t):
  stream = streams.class_incremental(6, increment=2)
  with pytest.raises(ValueError, match=f"t={t} is not a task .* 0 to 2"):
    stream.seen(t)


def test_the_class_of_a_column_is_the_inverse_of_both_tables():
  stream = streams.class_incremental(6, sizes=(3, 1, 2), order_seed=0)
  table = stream.class_of
  assert table.shape == (3, 3) and (table == -1).sum() == 3
  classes = np.arange(6)
  found = table[stream.head_of[classes], stream.column_of[classes]]
  np.testing.assert_array_equal(found, classes)
