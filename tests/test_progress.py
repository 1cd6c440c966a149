"""What is measured survives a save, and does not outgrow it."""

import json

import numpy as np

from mhil import metrics, progress


def tally(tasks, seed):
  rng = np.random.default_rng(seed)
  counts = rng.integers(1, 9, (5, tasks), np.int32)
  return metrics.Tally(*counts, rng.integers(0, 9, (tasks, tasks), np.int32))


def recorded(tasks):
  note = progress.Recorder(
    progress.Progress(), lambda step, row: None, range(tasks), tasks
  )
  for t in range(tasks):
    note.begin(t)
    note.step += 1
    with note.waiting():
      pass
    note.end(tally(tasks, t), {})
  return note.progress()


def test_only_the_last_test_keeps_its_table():
  done = recorded(4)
  np.testing.assert_array_equal(done.tallies[3].confusion, tally(4, 3)[5])
  for t, kept in enumerate(done.tallies[:3]):
    assert kept.confusion.size == 0
    for ours, all_of_it in zip(kept[:5], tally(4, t)):
      np.testing.assert_array_equal(ours, all_of_it)


def test_what_is_measured_is_the_same_after_a_save():
  done = recorded(4)
  text = json.dumps(progress.to_json(done))
  again = progress.from_json(json.loads(text))
  assert progress.measured(again) == progress.measured(done)
  found = progress.measured(done)
  assert found["confusion_between_heads"] == tally(4, 3)[5].tolist()
  assert found["accuracy_after_task"] == [
    metrics.accuracy(tally(4, t)) for t in range(4)
  ]


def test_a_save_does_not_grow_with_the_cube_of_the_tasks():
  sizes = [len(json.dumps(progress.to_json(recorded(n)))) for n in (20, 80)]
  # Four times the tasks: 16 times the counts, the cube would be 64 times.
  assert 12 < sizes[1] / sizes[0] < 20
