"""A network that does not grow: one head for the classes of all tasks."""

import functools
import types

import jax
import numpy as np
import pytest

from experiments import build as build_lib
from experiments import compare, suites
from mhil import (
  across,
  checkpoint,
  growing,
  losses,
  networks,
  optimizers,
  phases,
  prepare,
  rehearsal,
  serving,
  sharding,
  streams,
  trainer,
)
from mhil import config as config_lib
from mhil import run as run_lib
from mhil.recipe import Recipe
from tests import test_trainer, tiny

SIZES = (1, 3, 2)
RECIPE = Recipe(rate=optimizers.constant(0.02), epochs=6, batch=8, log_every=4)


@functools.cache
def build(
  fixed=True,
  sizes=SIZES,
  data=1,
  memory=tiny.MEMORY,
  recipe=RECIPE,
  probe=None,
):
  dataset = tiny.dataset(sum(sizes))
  stream = streams.class_incremental(6, sizes=sizes, fixed=fixed)
  mesh = sharding.make_mesh(data=data)
  transform = None
  if memory.size:
    transform = rehearsal.transform(mesh, dataset, batch=8, **memory._asdict())
  objective = tiny.objective(stream.head_width + 1)._replace(probe=probe)
  parts = mesh, stream, dataset, objective, losses.ce(), recipe
  return prepare.build(*parts, 0, transform)


@functools.cache
def trained(**settings):
  return trainer.fit(build(**settings))


def test_its_classes_lie_in_one_head_in_their_order():
  grown = streams.class_incremental(6, sizes=SIZES)
  stream = streams.class_incremental(6, sizes=SIZES, fixed=True)
  assert stream.tasks == grown.tasks and stream.sizes == SIZES
  assert len(grown.heads) == 3 and stream.heads == (stream.order,)
  assert grown.head_width == 3 and stream.head_width == 6
  assert not stream.head_of.any()
  assert [stream.column_of[c] for c in stream.order] == list(range(6))
  assert stream.class_of.tolist() == [list(stream.order)]
  assert stream.by_task == grown and grown.by_task == grown
  assert [stream.newest(t) for t in range(3)] == [0, 0, 0]
  assert [grown.newest(t) for t in range(3)] == [0, 1, 2]


def test_with_one_task_it_is_the_network_that_grows():
  """The same program on the same numbers, bit for bit."""
  fixed, grown = (trained(fixed=f, sizes=(6,)) for f in (True, False))
  for name in "params_sha256", "accuracy_matrix", "parameters":
    assert fixed.metrics[name] == grown.metrics[name]
  assert fixed.progress.history == grown.progress.history
  assert fixed.metrics["last_accuracy"] > 0.5


def test_it_does_not_grow():
  fixed, grown = trained().metrics, trained(fixed=False).metrics
  branch = networks.mlp(4, 7, hidden=(8,))
  size = networks.count_parameters(branch.init(jax.random.key(0))[0])
  assert fixed["parameters"] == {"total": size, "per_head": size}
  assert grown["parameters"]["total"] > 2 * size
  assert fixed["compiles"]["after_first_task"] == 0
  assert {len(row) for row in trained().progress.history} == {2}


@pytest.mark.parametrize("t", range(3))
def test_it_chooses_among_the_classes_that_it_has_seen(t):
  """Counts of a test, from logits of the branch alone."""
  run = build()
  done = trainer.fit(run, stop=stops_after(run, t))
  stream, data = run.stream, run.dataset
  seen = stream.seen(t)
  params, stats = jax.tree.map(
    lambda x: x[0, 0],
    across.fetch((done.state.bank.params, done.state.bank.stats)),
  )
  rows = np.isin(data.test_labels, seen)
  pixels = (data.test_images[rows] / 255 - 0.5) / 0.25
  logits = run.objective.predict(params, stats, pixels.astype(np.float32))
  column = np.asarray(logits)[:, : len(seen)].argmax(1)
  chosen, labels = np.array(stream.order)[column], data.test_labels[rows]
  task_of = stream.by_task.head_of
  tally = done.progress.tallies[t]
  for i in range(t + 1):
    mine = task_of[labels] == i
    assert tally.total[i] == mine.sum() > 0
    assert tally.correct[i] == (chosen == labels)[mine].sum()
    assert tally.head_correct[i] == (task_of[chosen] == i)[mine].sum()
  assert not np.any(tally.total[t + 1 :])
  np.testing.assert_array_equal(done.predict(data.test_images[rows]), chosen)


def stops_after(run, t):
  last = run.phases_of(t)[-1].steps.stop
  # Asked after every step but a task's last, and after each test.
  return test_trainer.stop_after(last - 1)


def test_classes_to_come_do_not_move_it():
  """Nothing is learnt of a class before its task, though it has a logit."""
  run = build(memory=tiny.NONE)
  fresh = run_lib.start(run)
  before = across.fetch(fresh.bank.params["readout"])
  done = trainer.fit(run, stop=stops_after(run, 0))
  after = across.fetch(done.state.bank.params["readout"])
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    np.testing.assert_array_equal(old[..., 1:], new[..., 1:])


def test_a_memory_keeps_what_fine_tuning_forgets():
  kept = trained(memory=tiny.MEMORY._replace(size=30)).metrics
  lost = trained(memory=tiny.NONE).metrics
  assert kept["accuracy_after_task"][-1] > lost["accuracy_after_task"][-1] + 0.2


@pytest.mark.slow
def test_workers_are_as_one():
  one, two = trained().metrics, trained(data=2).metrics
  assert two["accuracy_matrix"] == one["accuracy_matrix"]


@pytest.mark.parametrize("after", [3, 30, 80])
def test_resumed_it_is_bit_identical(tmp_path, after):
  run = build()
  with checkpoint.Checkpoints(tmp_path) as saves:
    part = trainer.fit(
      run, checkpoints=saves, stop=test_trainer.stop_after(after)
    )
    assert not part.finished
    rest = trainer.fit(run, checkpoints=saves, resume=True)
  whole = trained()
  assert rest.metrics["params_sha256"] == whole.metrics["params_sha256"]
  assert rest.progress.history == whole.progress.history
  assert rest.metrics["accuracy_matrix"] == whole.metrics["accuracy_matrix"]


@pytest.mark.slow
def test_herding_and_streaming():
  herded = trained(memory=tiny.MEMORY._replace(selection="herding"))
  assert herded.metrics["memory"]["held"] == 12
  streamed = trained(recipe=RECIPE._replace(streamed=True))
  assert streamed.metrics["params_sha256"] == trained().metrics["params_sha256"]
  assert (
    streamed.metrics["accuracy_matrix"] == trained().metrics["accuracy_matrix"]
  )


def test_exported_it_answers_for_all_classes(tmp_path):
  run, done = build(), trained()
  told = serving.save(tmp_path, run, done.state)
  assert told["classes"] == list(run.stream.order)
  assert told["missing_heads"] == told["missing_classes"] == []
  images = run.dataset.test_images
  classes, _ = serving.load(tmp_path)[0](images)
  np.testing.assert_array_equal(classes, done.predict(images))


def test_it_cannot_take_more_tasks():
  longer = streams.class_incremental(8, sizes=(*SIZES, 2), fixed=True)
  tasks = build().stream.tasks
  growing.check(tasks, build().stream)
  with pytest.raises(ValueError, match=r"network\.fixed=true has one head"):
    growing.check(tasks, longer)


def test_scores_by_task_have_nothing_beyond_a_task():
  run, done = build(), trained()
  task = phases.open_phase(run, run.phases_of(2)[0]).task
  images = sharding.replicated(run.dataset.test_images[:5], run.mesh)
  table = np.asarray(
    jax.jit(phases.class_scores(run))(done.state.bank, task, images)
  )
  assert table.shape == (5, 3, 3)
  empty = run.stream.by_task.class_of < 0
  assert empty.sum() == 3
  assert (table[:, empty] == losses.MASKED).all()
  assert (table[:, ~empty] > losses.MASKED).all()


def test_what_an_objective_measures_is_of_the_classes_seen():
  predict = tiny.objective(7).predict
  run = build(probe=lambda *given: {"logits": predict(*given)})
  done = trainer.fit(run)
  for t, tally in enumerate(done.progress.tallies):
    # One head's logits are the whole answer.
    right = tally.correct.sum() / tally.total.sum()
    assert done.progress.probes[t]["settled/logits"] == pytest.approx(right)


def test_its_head_is_open_and_learns_in_every_task():
  run = build()
  new = run._replace(recipe=RECIPE._replace(train_heads="new"))
  for t in range(3):
    assert run_lib.opened(run, t) == run_lib.training(run, t) == (0,)
    assert run_lib.training(new, t) == (0,)


def test_it_lies_on_no_two_devices_along_head():
  run = build()
  mesh = sharding.make_mesh(head=2)
  parts = run.stream, run.dataset, run.objective, run.loss, RECIPE
  with pytest.raises(ValueError, match=r"^mesh\.head=2 is more than the one"):
    prepare.build(mesh, *parts, 0)


def test_there_are_no_scores_of_heads_to_be_put_together():
  with pytest.raises(ValueError, match=r"^stream\.fixed=True has one head"):
    trainer.fit(build(), scored=lambda t, table: None)


def test_a_configuration_makes_it():
  config = config_lib.Config(loss=config_lib.Loss(name="ce"))
  for fixed in True, False:
    config.network.fixed = fixed
    stream = build_lib.parts(config).stream
    assert stream.fixed == fixed and len(stream.tasks) == 5
    assert len(stream.heads) == (1 if fixed else 5)


def bytes_of(row, image):
  """Parameters, of all heads, and exemplars of a row of ten classes."""
  config = compare.configure(row, 0)
  images = np.zeros((1, *image), np.uint8)
  dataset = types.SimpleNamespace(train_images=images)
  stream = build_lib.make_stream(config.stream, 10, config.network.fixed)
  branch = build_lib.branch_of(config, dataset, stream)
  params = jax.eval_shape(branch.init, jax.random.key(0))[0]
  numbers = len(stream.heads) * networks.count_parameters(params)
  return 4 * numbers + config.memory.size * images.nbytes


@pytest.mark.parametrize("by", ["exemplars", "width"])
@pytest.mark.parametrize(
  "suite, image, exemplars, parameters",
  [
    ("fashion_5x2", (28, 28, 1), 784_000, 119_740),
    ("digits", (8, 8, 1), 6_400, 87_100),
  ],
)
def test_memory_that_is_called_equal_is(
  by, suite, image, exemplars, parameters
):
  rows = {row.label: row for row in suites.SUITES[suite]}
  grown = bytes_of(rows["D-CE learned"], image)
  assert grown == exemplars + parameters  # As the tables have it.
  fixed = bytes_of(rows[f"CE, fixed network, equal memory by {by}"], image)
  assert 0.998 * grown < fixed <= grown
