"""A stream that turns out longer ends as if it had been planned so."""

import functools

import jax
import numpy as np
import pytest

from experiments import longer
from mhil import (
  across,
  checkpoint,
  growing,
  losses,
  metrics,
  partitions,
  prepare,
  progress,
  rehearsal,
  sharding,
  streams,
  trainer,
)
from mhil import buffer as buffer_lib
from mhil import run as run_lib
from mhil.recipe import Recipe
from tests import test_relay, test_subnets, tiny

SHORT, LONG = 6, 8


@functools.cache
def build(
  classes=LONG,
  *,
  head=2,
  data=1,
  memory=tiny.NONE,
  loss="dce",
  norm="none",
  **recipe,
):
  """A run over the first classes of one set, two a task, in their order."""
  dataset = longer.beginning(tiny.dataset(LONG), classes)
  stream = streams.class_incremental(classes, increment=2, order_seed=None)
  mesh = sharding.make_mesh(head=head, data=data)
  transform = None
  if memory.size:
    transform = rehearsal.transform(mesh, dataset, batch=8, **memory._asdict())
  objective = tiny.objective(stream.head_width + 1, norm)
  how = Recipe(**({"epochs": 2, "batch": 8, "log_every": 4} | recipe))
  parts = mesh, stream, dataset, objective, getattr(losses, loss)(), how
  return prepare.build(*parts, 0, transform)


@functools.cache
def short(**settings):
  return trainer.fit(build(SHORT, **settings))


@functools.cache
def whole(**settings):
  return trainer.fit(build(LONG, **settings))


def apart(a, b):
  """Names of arrays that differ in as much as one bit."""
  pairs = zip(
    jax.tree.leaves_with_path(across.fetch(a.state)),
    jax.tree.leaves(across.fetch(b.state)),
    strict=True,
  )
  return [
    jax.tree_util.keystr(path)
    for (path, x), y in pairs
    if x.shape != y.shape or x.tobytes() != y.tobytes()
  ]


def same(grown, planned):
  """The whole state, every loss and every count of every test."""
  assert apart(grown, planned) == []
  ours, wanted = (progress.to_json(r.progress) for r in (grown, planned))
  for name in "step", "tallies", "history", "logged", "probes", "tasks":
    assert ours[name] == wanted[name], name
  for name in "params_sha256", "accuracy_matrix":
    assert grown.metrics[name] == planned.metrics[name]


def balanced(**changed):
  return tiny.Memory(**({"size": 16} | changed))


KEPT = {"memory": balanced()}
CASES = {
  "new heads learn": {"train_heads": "new"},
  "all learn, and remember": {"memory": balanced()},
}
SLOW = {
  "all learn": {},
  "the last layer": {"train_heads": "readout"},
  "batch norm": {"norm": "batch"},
  "from scratch": {"from_scratch": True},
  "all samples": {"cumulative": True},
  "a balanced end": {"memory": balanced(), "balanced_epochs": 1},
  "cross-entropy": {"loss": "ce"},
  "distributed": {"loss": "distributed_ce"},
  "workers": {"memory": balanced(), "data": 2},
  "local draws": {"memory": balanced(scope="local", draws=4), "data": 2},
  "on the host": {"memory": balanced(place="host"), "data": 2},
  "herding": {"memory": balanced(selection="herding"), "data": 2},
  "reservoir": {"memory": balanced(policy="reservoir"), "data": 2},
}


class TestBitForBit:
  @pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)]
  )
  def test_as_if_planned(self, case):
    """Three heads lie in four entries of two devices; the fourth is new."""
    how = (CASES | SLOW)[case]
    grown = trainer.fit(build(LONG, **how), after=short(**how))
    same(grown, whole(**how))
    # What was known was not learnt again.
    before = short(**how).progress
    assert grown.progress.history[: len(before.history)] == tuple(
      (*row, None) for row in before.history
    )
    assert grown.progress.seconds[:3] == before.seconds

  @pytest.mark.slow
  @pytest.mark.parametrize("way", [(1, 4), (3, 1)])
  def test_on_another_mesh(self, way):
    a, b = way
    grown = trainer.fit(build(LONG, head=b), after=short(head=a))
    same(grown, whole(head=b))

  @pytest.mark.parametrize("stop", [1, 13])
  def test_stopped_within_a_task(self, stop, tmp_path):
    """Saved there, and gone on with from the save."""
    how = {"memory": balanced()}
    calls = iter(range(stop - 1))
    with checkpoint.Checkpoints(tmp_path) as saves:
      part = trainer.fit(
        build(SHORT, **how),
        checkpoints=saves,
        stop=lambda: next(calls, None) is None,
      )
    assert not part.finished and part.progress.step == stop
    with checkpoint.Checkpoints(tmp_path) as saves:
      grown = trainer.fit(build(LONG, **how), checkpoints=saves, resume=True)
    same(grown, whole(**how))

  @pytest.mark.slow
  def test_stages_of_a_branch(self):
    def run(classes):
      one = test_relay.build(stage=2, head=2)
      data = tiny.dataset(LONG, each=12, shape=test_relay.SHAPE)
      data = longer.beginning(data, classes)
      stream = streams.class_incremental(classes, increment=2, order_seed=None)
      parts = one.grid, stream, data, one.objective, one.loss, one.recipe
      return prepare.build(*parts, 0)

    before = trainer.fit(run(SHORT))
    same(trainer.fit(run(LONG), after=before), trainer.fit(run(LONG)))

  @pytest.mark.slow
  def test_copies_of_a_branch_that_train_apart(self):
    objective, partition = test_subnets.parts(2, "local_sgd")
    mesh = sharding.make_mesh(head=2, subnet=2)

    def run(classes):
      data = longer.beginning(tiny.dataset(LONG), classes)
      stream = streams.class_incremental(classes, increment=2, order_seed=None)
      loss, recipe = losses.dce(), test_subnets.RECIPE
      given = mesh, stream, data, objective, loss, recipe, 0, None, partition
      return prepare.build(*given)

    before = trainer.fit(run(SHORT))
    same(trainer.fit(run(LONG), after=before), trainer.fit(run(LONG)))

  def test_what_would_fail_is_seen(self):
    """The control: another seed draws another fourth head, and trains apart."""
    # On one device, so that the shorter run has no room for a fourth.
    before, run = short(head=1), build(head=1)

    def drawn(run):
      like = run_lib.shapes(run_lib.start(run))
      held = growing.lifted(before.state), before.progress
      bank = across.fetch(growing.grow(run, *held, like)[0].bank)
      return [x.reshape(-1, *x.shape[2:]) for x in jax.tree.leaves(bank.params)]

    other = run._replace(seed=1)
    pairs = list(zip(drawn(other), drawn(run)))
    assert all((x[:3] == y[:3]).all() for x, y in pairs)
    assert any((x[3] != y[3]).any() for x, y in pairs)
    assert apart(trainer.fit(other, after=before), whole(head=1))

  def test_the_result_that_it_goes_on_from_stays(self):
    before = short()
    kept = jax.tree.map(np.array, before.state)
    trainer.fit(build(LONG), after=before)
    jax.tree.map(np.testing.assert_array_equal, kept, before.state)


@pytest.mark.slow
class TestPerClass:
  """Its slots are dealt to all classes, so more classes leave fewer each."""

  @property
  def how(self):
    return {"memory": balanced(policy="per_class", candidates=8), "data": 2}

  def grown(self):
    run = build(LONG, **self.how)
    before = short(**self.how)
    like = run_lib.shapes(run_lib.start(run))
    state = growing.lifted(before.state)
    return growing.grow(run, state, before.progress, like)[0]

  def test_no_row_goes_that_has_a_slot(self):
    old, new = short(**self.how).state.memory, self.grown().memory
    before, after = (np.asarray(x.buffer.fill).sum(0) for x in (old, new))
    assert before.tolist() == [3, 3, 3, 3, 2, 2]
    assert after.tolist() == [2] * 6 + [0] * 2
    layouts = [buffer_lib.layout("per_class", 16, c, 2) for c in (SHORT, LONG)]
    was, now = (
      set(rehearsal.held(layout, x.buffer).tolist())
      for layout, x in zip(layouts, (old, new))
    )
    assert now < was

  def test_it_is_not_as_if_planned(self):
    """A planned run kept fewer rows of the first classes from the start."""
    grown = trainer.fit(build(LONG, **self.how), after=short(**self.how))
    assert grown.finished and len(grown.progress.tallies) == 4
    assert apart(grown, whole(**self.how))


class TestCheck:
  tasks = ((0, 3), (2, 1))

  def stream(self, *tasks):
    return streams.Stream(tasks)

  def test_good(self):
    growing.check(self.tasks, self.stream(*self.tasks))
    growing.check(self.tasks, self.stream(*self.tasks, (5, 4), (6,)))
    # Of a run that did not note its tasks, nothing is known.
    growing.check((), self.stream((0,)))

  @pytest.mark.parametrize(
    ("tasks", "message"),
    [
      (
        ((0, 1),),
        r"stream\.sizes=\(2,\) is shorter than the \(2, 2\) of .*bring",
      ),
      (
        ((0, 3, 2, 1), (4,)),
        r"stream\.sizes=\(4, 1\) does not begin .*use stream\.sizes="
        r"\(2, 2, 1\)",
      ),
      (
        ((0, 3), (2, 1), (4, 5, 6)),
        r"stream\.sizes=\(2, 2, 3\) has a task of 3 classes, .*room for 2; "
        r"use stream\.sizes=\(2, 2, 2, 1\)",
      ),
      (
        ((0, 1), (2, 5), (4, 3)),
        r"stream\.order=\(0, 1, 2, 5, 4, 3\) gives the 2 tasks .*use "
        r"stream\.order=\(0, 3, 2, 1, 5, 4\)",
      ),
      (
        ((0, 2), (3, 1)),
        r"stream\.order=\(0, 2, 3, 1\) gives .*=\(0, 3, 2, 1\)",
      ),
    ],
  )
  def test_bad(self, tasks, message):
    with pytest.raises(ValueError, match=message) as caught:
      growing.check(self.tasks, self.stream(*tasks))
    assert "\n" not in str(caught.value)

  def test_units_that_are_dealt(self):
    growing.check_partition(partitions.NONE)
    growing.check_partition(test_subnets.parts(2, "local_sgd")[1])
    message = r"mesh\.subnet=2 with subnets\.method=ist has dealt .*subnet=1"
    with pytest.raises(ValueError, match=message):
      growing.check_partition(test_subnets.parts(2)[1])

  @pytest.mark.parametrize("epochs", [1, 3])
  def test_another_length_of_the_tasks_that_are_done(self, epochs):
    message = r"step=30 of the run that is to go on is not in task 3, whose"
    with pytest.raises(ValueError, match=message):
      trainer.fit(build(LONG, epochs=epochs), after=short())

  @pytest.mark.parametrize(
    ("how", "other", "message"),
    [
      ({}, {"memory": balanced()}, r"other parts than this run; use its"),
      ({}, {"norm": "batch"}, r"other parts than this run; use its"),
      (KEPT, {"memory": balanced(size=20)}, r"memory\.size is another"),
      (KEPT, {"memory": balanced(draws=2)}, r"memory\.draws is another"),
      (KEPT, {"memory": balanced(policy="reservoir")}, r"memory\.policy is"),
    ],
  )
  def test_a_run_of_other_parts(self, how, other, message):
    before = short(**how)
    with pytest.raises(ValueError, match=message) as caught:
      trainer.fit(build(LONG, **other), after=before)
    assert "\n" not in str(caught.value)

  def test_it_is_asked_before_anything_is_moved(self):
    before = short()
    tasks = ((1, 0), *before.progress.tasks[1:])
    other = before._replace(progress=before.progress._replace(tasks=tasks))
    with pytest.raises(ValueError, match=r"use stream\.order=\(1, 0, 2"):
      trainer.fit(build(LONG), after=other)


class TestProgress:
  def done(self, entries):
    tally = metrics.Tally(*(np.arange(1, entries + 1),) * 5, np.eye(entries))
    row = (4, 0.5, None)
    return progress.Progress(
      4, (tally,), (row,), tasks=((0,), (1,)), logged=4, seconds=(1.0,)
    )

  @pytest.mark.parametrize("entries", [2, 3])
  def test_it_is_that_of_more_tasks(self, entries):
    tasks = ((0,), (1,), (2,))
    wide = progress.widen(self.done(entries), streams.Stream(tasks), 4)
    assert wide.history == ((4, 0.5, None, None),) and wide.tasks == tasks
    (tally,) = wide.tallies
    assert tally.total.tolist() == [*range(1, entries + 1), *[0] * 4][:4]
    assert tally.confusion.shape == (4, 4)
    assert tally.confusion.sum() == entries

  def test_what_was_dropped_stays_so(self):
    done = self.done(2)
    dropped = done.tallies[0]._replace(confusion=np.zeros((0, 0), int))
    done = done._replace(tallies=(dropped, done.tallies[0]))
    longer = streams.Stream(((0,), (1,), (2,)))
    first, second = progress.widen(done, longer, 4).tallies
    assert first.confusion.shape == (0, 0) and second.confusion.shape == (4, 4)
    assert first.total.tolist() == [1, 2, 0, 0]

  def test_entries_of_no_head_go(self):
    same = streams.Stream(((0,), (1,)))
    (tally,) = progress.widen(self.done(4), same, 2).tallies
    assert tally.total.tolist() == [1, 2]
    assert tally.confusion.tolist() == [[1, 0], [0, 1]]

  def test_tasks_survive_and_may_be_missing(self):
    saved = progress.to_json(self.done(2))
    assert progress.from_json(saved).tasks == ((0,), (1,))
    del saved["tasks"]
    assert progress.from_json(saved).tasks == ()
