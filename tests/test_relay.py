"""Stages on devices of their own: the same numbers, a batch later."""

import functools

import jax
import numpy as np
import pytest

from mhil import bank as bank_lib
from mhil import (
  checkpoint,
  local,
  losses,
  modules,
  networks,
  objectives,
  optimizers,
  prepare,
  rehearsal,
  relay,
  sharding,
  stages,
  trainer,
)
from mhil import run as run_lib
from tests import tiny

SHAPE = (4, 4, 1)
# What each case sends on: features alone; the image too, and old inputs.
METHODS = {
  "greedy": modules.GREEDY,
  "wide": modules.GREEDY,
  "context": modules.Method(
    "R2", "0c1f", restore=(1.0, 1.0), pixels=((0.5,), (0.25,))
  ),
  "contrast": modules.Method("E", "0c1f", loss="contrast", hidden=6),
}
# Stages of the wide one work for milliseconds, which can be seen.
WIDTHS = {"greedy": (8, 6, 5), "wide": (1024, 1024, 1024)}


@functools.cache
def cut(case):
  if case in WIDTHS:
    branch = networks.mlp(16, 3, WIDTHS[case], "batch", axis="data")
    where = ["dense0", "dense1"]
  else:
    branch = networks.resnet_cifar(8, 3, (3, 3, 4), "batch", 1, axis="data")
    where = ["stem", "stage1.block0"]
  return modules.split(branch, SHAPE, where, METHODS[case])


@functools.cache
def build(
  case="greedy", stage=1, at_once=True, head=1, data=1, train_heads="all"
):
  mesh = sharding.make_mesh(stage=stage, head=head, data=data)
  objective = local.local(cut(case))
  if stage > 1:
    parts = local.stages(cut(case), SHAPE, stage)
    how = {"parts": parts, "at_once": at_once}
    spread = functools.partial(relay.spread, **how)
    objective = objective._replace(spread=spread)
  images = tiny.dataset(6, each=12, shape=SHAPE)
  memory = rehearsal.transform(
    stages.meshes(mesh)[0], images, batch=8, **tiny.MEMORY._asdict()
  )
  # Adam would move a parameter without gradient by the sign of its rounding.
  recipe = tiny.RECIPE._replace(
    optimizer=optimizers.sgd(),
    rate=optimizers.cosine(0.05),
    train_heads=train_heads,
  )
  parts = mesh, tiny.stream(), images, objective, losses.dce(), recipe
  return prepare.build(*parts, 0, memory)


@functools.cache
def fitted(*case, **settings):
  run = build(*case, **settings)
  return run, trainer.fit(run)


def heads_of(run, state):
  """Parameters and statistics of the heads of the stream, on the host."""
  bank = run.whole(state.bank)
  n = len(run.stream.tasks)
  return jax.tree.map(
    lambda x: bank_lib.flatten(np.asarray(x))[:n], (bank.params, bank.stats)
  )


def close(got, want, **tolerance):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize(
  "case, settings",
  [
    ("greedy", {"stage": 3}),
    ("greedy", {"stage": 2, "head": 2}),
    pytest.param("context", {"stage": 3}, marks=pytest.mark.slow),
    pytest.param("contrast", {"stage": 2}, marks=pytest.mark.slow),
  ],
)
def test_stages_come_to_the_same_numbers(case, settings):
  """Over three tasks with a memory, D-CE, tests between them."""
  one, many = fitted(case), fitted(case, **settings)
  got, want = (heads_of(run, done.state) for run, done in (many, one))
  # Here they are equal bit for bit; another XLA may fuse otherwise.
  close(got, want, rtol=1e-5, atol=1e-6)
  for name in ("accuracy_after_task", "average_incremental_accuracy"):
    assert one[1].metrics[name] == many[1].metrics[name]
  # The control: there was something to learn.
  start = heads_of(one[0], run_lib.start(one[0]))
  for name, part in want[0].items():
    pairs = zip(jax.tree.leaves(part), jax.tree.leaves(start[0][name]))
    assert any(np.abs(a - b).max() > 1e-3 for a, b in pairs), name


@pytest.mark.slow
def test_only_gradients_over_data_are_collective():
  run, done = fitted("greedy", stage=2, data=2)
  one, alone = fitted("greedy", data=2)
  close(
    heads_of(run, done.state), heads_of(one, alone.state), rtol=1e-5, atol=1e-6
  )
  assert {axis for c in run.traffic for axis in c.axes} == {"data"}


@pytest.mark.slow
def test_waiting_for_each_batch_changes_nothing():
  got, want = (
    heads_of(run, done.state)
    for run, done in (
      fitted("greedy", stage=3, at_once=False),
      fitted("greedy", stage=3),
    )
  )
  # The same compiled programs on the same numbers.
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_old_heads_stay_frozen():
  run, done = fitted("greedy", stage=2, train_heads="new")
  one, alone = fitted("greedy", train_heads="new")
  close(
    heads_of(run, done.state), heads_of(one, alone.state), rtol=1e-5, atol=1e-6
  )


def states(run, count):
  """After each of the first steps of the first task."""
  state, feed = run_lib.start(run), tiny.feed(run, 0)
  batches = tiny.inputs.batches(run, feed, 0)
  for done in range(count):
    state = run.step(state, batches, feed.task, run.train_set)
    state = run.exchange(state, done + 1)
    yield state


def steps(run, count):
  """Parameters too, for which the host waits."""
  for state in states(run, count):
    yield jax.tree.map(np.asarray, [p.bank.params for p in state.bank]), state


def pending(state):
  return [leaf for leaf in jax.tree.leaves(state) if not leaf.is_ready()]


@pytest.mark.slow
def test_in_turn_nothing_is_on_its_way_when_the_next_batch_begins():
  """So what a step in turn takes is what the stages take one by one."""
  turn, once = (build("wide", stage=3, at_once=how) for how in (False, True))
  assert not any(map(pending, states(turn, 4)))
  # The control: to send a stage its work takes less time than the work.
  assert any(map(pending, states(once, 8)))


def moved(before, after):
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after))
  return any(np.any(a != b) for a, b in pairs)


def test_a_stage_works_one_batch_behind_the_one_before():
  run = build("greedy", stage=3)
  start = [p.bank.params for p in run_lib.start(run).bank]
  before = jax.tree.map(np.asarray, start)
  last = len(run.phases[0].steps)
  for done, (after, state) in enumerate(steps(run, last), 1):
    assert [moved(a, b) for a, b in zip(before, after)] == [
      True,
      done > 1,
      done > 2,
    ]
    # At the end of a phase the later stages have finished what was on its way.
    behind = [int(p.flight.step) for p in state.bank]
    if done < last:
      assert behind[:2] == [done - 1] * 2
    else:
      assert behind == [last - 1] * 3
    before = after


def test_each_piece_lies_with_its_stage_and_nowhere_else():
  run = build("greedy", stage=3)
  state = run_lib.start(run)
  owned = [set(part.bank.params) for part in state.bank]
  assert set.union(*owned) == set(run.whole(state.bank).params)
  assert sum(map(len, owned)) == len(set.union(*owned))
  for part, mesh in zip(state.bank, stages.meshes(run.grid)):
    for leaf in jax.tree.leaves(part):
      assert leaf.sharding.device_set == set(mesh.devices.flat)
    assert set(part.bank.stats) == set(part.bank.params)
  # Everything else is at home, with the first.
  for leaf in jax.tree.leaves((run.train_set, run.test_set, state.memory)):
    assert leaf.sharding.device_set == set(run.mesh.devices.flat)


def test_no_program_has_a_collective():
  run = build("greedy", stage=3)
  assert len(run.programs) == 3 and run.traffic == []
  assert run.compiles == (3, 1)
  for program, mesh in zip(run.programs, stages.meshes(run.grid)):
    assert sharding.collectives(program, mesh) == []


def test_what_is_handed_on_is_the_formula():
  """Float32 features of each head and sample, forward, and nothing else."""
  heads, classes, sizes, batch = 3, 6, (8, 6), 8 + 4
  run, done = fitted("greedy", stage=3)
  for k, sent in enumerate(relay.handed_on(done.state.bank)):
    assert sent["features"] == heads * batch * sizes[k] * 4
    tables = 3 * 4 + 1 + 4 * classes + heads * (4 + 2)  # `Task`
    assert sent["other"] == tables + 16 * batch + heads * 3 * 4 + 4 + 8
  # With heads on two devices, each sends those of its own.
  run, done = fitted("greedy", stage=2, head=2)
  (sent,) = relay.handed_on(done.state.bank)
  width = run.objective.spread.keywords["parts"][1].arrives[modules.OUT]
  assert sent["features"] == 2 * batch * width.size * 4


@pytest.mark.slow
def test_older_inputs_and_images_are_handed_on_too():
  """With R2 the last module reads the input of the one before."""
  heads, batch, image = 3, 8 + 4, 4 * 4 * 1
  bank = run_lib.start(build("context", stage=3)).bank
  sent = relay.handed_on(bank)
  interface = 4 * 4 * 3
  for each, numbers in zip(sent, (interface, 2 * interface), strict=True):
    assert each["features"] == 4 * heads * batch * numbers
  plain = relay.handed_on(run_lib.start(build("greedy", stage=3)).bank)
  for each, other in zip(sent, plain, strict=True):
    assert each["other"] - other["other"] == 4 * batch * image


def test_features_are_sent_as_the_branch_computes_them():
  half = networks.mlp(16, 3, (8, 6), dtype=np.dtype("bfloat16"), axis="data")
  split = modules.split(half, SHAPE, ["dense0"], modules.GREEDY)
  _, last = local.stages(split, SHAPE, 2)
  (sent,) = last.arrives.values()
  assert sent.shape == (8,) and sent.dtype.itemsize == 2


def test_images_go_where_a_later_stage_reads_them():
  both = "greedy", "context"
  greedy, context = (local.stages(cut(case), SHAPE, 3) for case in both)
  assert [stage.images for stage in greedy] == [False] * 3
  # Interface 0 reads the image, interface 1 too by R2.
  assert [stage.images for stage in context] == [True] * 3
  old = [sorted(stage.arrives) for stage in context]
  assert old == [[], [modules.OUT], [modules.OUT, 1]]
  flat = [sorted(stage.arrives) for stage in greedy]
  assert flat == [[], [modules.OUT], [modules.OUT]]


@pytest.mark.parametrize(
  "case, head",
  [
    ("greedy", 1),
    pytest.param("context", 1, marks=pytest.mark.slow),
    pytest.param("greedy", 2, marks=pytest.mark.slow),
  ],
)
def test_a_run_that_was_stopped_between_stages_ends_alike(case, head, tmp_path):
  """On as many devices along `head`, or on more."""
  run, whole = fitted(case, stage=3)
  later = build(case, stage=3, head=head)
  # In the first task, the second stage has a batch in hand.
  calls = iter(range(100))
  with checkpoint.Checkpoints(tmp_path) as saves:
    stop = functools.partial(lambda: next(calls) == 1)
    done = trainer.fit(run, checkpoints=saves, stop=stop)
    assert not done.finished and done.progress.step == 2
    again = trainer.fit(later, checkpoints=saves, resume=True)
  assert again.finished
  assert again.metrics["params_sha256"] == whole.metrics["params_sha256"]
  assert again.progress.history[-1] == whole.progress.history[-1]


def test_the_loss_of_a_phase_is_that_of_one_device():
  totals = []
  for settings in {"stage": 3}, {}:
    _, done = fitted("greedy", **settings)
    rows = np.array(done.progress.history, float)
    lengths = np.diff(rows[:, 0], prepend=0)
    first = rows[:, 0] <= len(build("greedy").phases[0].steps)
    totals.append((rows[first, 1] * lengths[first]).sum())
  # Sums of float32 in another order; a batch that came through late is in a
  # later row of the same phase.
  np.testing.assert_allclose(*totals, rtol=1e-5)


# -- bad input ---------------------------------------------------------------


def one_line(raised, words):
  text = str(raised.value)
  assert words in text and "use " in text and "\n" not in text


def test_more_stages_than_modules_are_named():
  with pytest.raises(ValueError) as raised:
    local.stages(cut("greedy"), SHAPE, 4)
  one_line(raised, "mesh.stage=4 is more than the 3 modules")


def test_modules_that_are_not_apart_are_named():
  method = modules.GREEDY._replace(isolated=False)
  joined = modules.split(cut("greedy").branch, SHAPE, ["dense0"], method)
  with pytest.raises(ValueError) as raised:
    local.stages(joined, SHAPE, 2)
  one_line(raised, "local.isolated=false sends gradients back")


@pytest.mark.parametrize(
  "words, changed",
  [
    ("loss.name=ce asks for the logits of all heads", {"loss": losses.ce()}),
    (
      "train.train_heads=readout trains on features of the whole branch",
      {"recipe": tiny.RECIPE._replace(train_heads="readout")},
    ),
  ],
)
def test_what_needs_the_whole_branch_is_named(words, changed):
  run = build("greedy")._replace(**changed)
  with pytest.raises(ValueError) as raised:
    relay.check(run, local.stages(cut("greedy"), SHAPE, 2))
  one_line(raised, words)


def test_an_objective_without_parts_is_named():
  mesh = sharding.make_mesh(stage=2)
  parts = tiny.parts(memory=tiny.NONE)
  objective = objectives.end_to_end(cut("greedy").branch)
  with pytest.raises(ValueError) as raised:
    prepare.build(mesh, *parts[1:3], objective, *parts[4:6], 0)
  one_line(raised, "mesh.stage=2 would do the same work several times")
