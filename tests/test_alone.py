"""Heads trained by processes without a link equal the run of one program."""

import functools

import jax
import numpy as np
import pytest

from mhil import alone, losses, metrics, prepare, sharding, trainer
from mhil import run as run_lib
from tests import tiny

SIZES = (2, 3, 1, 2)
KINDS = {
  "all": {},
  "new": {"train_heads": "new"},
  "readout": {"train_heads": "readout"},
  "scratch": {"from_scratch": True},
  "balanced": {"balanced_epochs": 1},
}
SLOW = "readout", "scratch", "balanced"
EACH = [
  pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ())
  for kind in KINDS
]
# Uneven, and out of step with any mesh.
SPLIT = ((0, 2, 3), (1,))


def parts(kind="all", head=1, **more):
  recipe = tiny.RECIPE._replace(**KINDS[kind])
  how = {"norm": "batch", "recipe": recipe} | more
  return tiny.parts(head=head, sizes=SIZES, **how)


@functools.cache
def trained(kind, heads=(), head=1):
  """A run, its result, and the scores after each task."""
  *most, transform = parts(kind, head)
  run = prepare.build(*most, 0, transform, heads_here=heads)
  tables = {}
  done = trainer.fit(run, scored=tables.__setitem__)
  return run, done, tables


@pytest.mark.slow
@pytest.mark.parametrize("kind", EACH)
def test_together_they_are_the_run_of_one_program(kind):
  _, whole, _ = trained(kind, head=2)
  banks = [trained(kind, heads)[1].state.bank for heads in SPLIT]
  bank = alone.join(whole.state.bank, banks, SPLIT)
  assert np.isfinite(np.asarray(whole.state.bank.loss)).all()
  jax.tree.map(np.testing.assert_array_equal, bank, whole.state.bank)


def test_all_remember_the_same():
  _, whole, _ = trained("all", head=2)
  for heads in SPLIT:
    _, part, _ = trained("all", heads)
    jax.tree.map(
      np.testing.assert_array_equal, part.state.memory, whole.state.memory
    )


@pytest.mark.slow
def test_another_memory_would_be_noticed():
  """The control of the test above: another seed."""
  _, whole, _ = trained("all", head=2)
  other = trainer.fit(prepare.build(*parts("all")[:-1], 1, parts("all")[-1]))
  found, wanted = other.state.memory.buffer, whole.state.memory.buffer
  assert (np.asarray(found.rows) != np.asarray(wanted.rows)).any()


@pytest.mark.parametrize("kind", ["all", "new"])
def test_scores_put_together_are_the_tests_of_one_program(kind):
  run, whole, tables = trained(kind, head=2)
  for t in range(len(SIZES)):
    n = int(whole.progress.tallies[t].total.sum())
    table = np.full((n, len(SIZES), max(SIZES)), losses.MASKED, np.float32)
    for heads in SPLIT:
      _, _, found = trained(kind, heads)
      table[:, list(heads)] = found[t]
    np.testing.assert_array_equal(table, tables[t])
    counts = alone.tally(run, table)
    wanted = metrics.Tally(
      *(x[: len(SIZES)] for x in whole.progress.tallies[t])
    )
    jax.tree.map(np.testing.assert_array_equal, counts[:5], wanted[:5])
  # Only the last test's table is kept, and `wanted` is that one by now.
  confusion = wanted.confusion[:, : len(SIZES)]
  np.testing.assert_array_equal(counts.confusion, confusion)
  assert confusion.any()


def test_a_head_that_is_not_there_is_always_wrong():
  _, part, tables = trained("all", (1,))
  first, second, third, last = part.progress.tallies
  # Of the first task alone nobody knows anything.
  assert first.total.tolist() == [14, 0, 0, 0]
  assert not (first.correct.any() or first.top5.any())
  assert (tables[0] == losses.MASKED).all() and tables[0].shape == (14, 1, 3)
  # The only head that is there gets every sample.
  assert last.confusion[:, 1].tolist() == last.total.tolist()
  assert second.head_correct.tolist() == [0, 21, 0, 0]
  assert 0 < second.correct[1] <= 21 and not second.correct[[0, 2, 3]].any()
  assert third.correct[2] == third.within_correct[2] == 0
  assert part.metrics["task_id_accuracy"] == 21 / (7 * sum(SIZES))


def test_only_its_own_heads_are_logged():
  _, part, _ = trained("all", (1,))
  for _, *row in part.progress.history:
    assert row[0] is None and row[2] is None and row[3] is None
  learnt = [row[2] is not None for row in part.progress.history]
  assert not learnt[0] and all(learnt[learnt.index(True) :])


def test_a_process_holds_its_heads_and_no_more():
  _, part, _ = trained("all", (0, 2, 3))
  shapes = {x.shape[:2] for x in jax.tree.leaves(part.state.bank)}
  assert shapes == {(3, 1)}
  assert part.metrics["parameters"]["total"] == (
    3 * part.metrics["parameters"]["per_head"]
  )


def test_what_was_learnt_is_not_what_was_drawn():
  run, part, _ = trained("all", (1,))
  drawn = run_lib.start(run).bank.params
  moved = jax.tree.map(
    lambda a, b: (np.asarray(a) != np.asarray(b)).any(),
    drawn,
    part.state.bank.params,
  )
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
  "heads, changed, words",
  [
    ((4,), {}, "heads=4 does not name heads of this stream, each once; use"),
    ((1, 1), {}, "heads=1,1 does not name heads of this stream, each once"),
    ((-1,), {}, "heads=-1 does not name"),
    ((1,), {"head": 2}, "mesh.head=2 is more than the 1 of heads=1; use mesh"),
    ((1,), {"loss": losses.ce()}, "loss.name=ce couples all heads, and heads"),
    (
      (1,),
      {"memory": tiny.MEMORY._replace(selection="herding")},
      "memory.selection=herding chooses by the features of each newest",
    ),
  ],
)
def test_heads_that_need_the_others_are_refused(heads, changed, words):
  *most, transform = parts("all", **changed)
  with pytest.raises(ValueError, match=words) as raised:
    prepare.build(*most, 0, transform, heads_here=heads)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("axis", ["stage", "subnet"])
def test_branches_in_parts_are_refused(axis):
  mesh = sharding.make_mesh(**{axis: 2})
  _, stream, _, _, loss, _, transform = parts("all")
  words = (
    rf"mesh\.{axis}=2 cuts the branches of heads=1, .*; use mesh\.{axis}=1"
  )
  with pytest.raises(ValueError, match=words):
    alone.check((1,), mesh, stream, loss, transform)
