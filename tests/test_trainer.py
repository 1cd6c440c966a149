from typing import ClassVar

import jax
import numpy as np
import pytest

from mhil import (
  checkpoint,
  inputs,
  losses,
  optimizers,
  phases,
  pipeline,
  prepare,
  progress,
  trainer,
)
from mhil import run as run_lib
from tests import tiny

TIMING = (
  "seconds_per_task",
  "waiting_share",
  "test_ms_per_image",
  "devices",
  "mesh",
  "step_bytes_per_device",
)


def train(
  recipe=tiny.RECIPE,
  *,
  seed=0,
  head=1,
  loss=None,
  memory=tiny.MEMORY,
  **watch,
):
  run = tiny.build(seed, head=head, loss=loss, recipe=recipe, memory=memory)
  return trainer.fit(run, **watch)


def numbers(result):
  return {k: v for k, v in result.metrics.items() if k not in TIMING}


@pytest.fixture(scope="module")
def whole():
  """A run from start to end."""
  return train()


class Clock:
  """A clock that goes when a test says so."""

  def __init__(self):
    self.now = 0.0

  def perf_counter(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  made = Clock()
  monkeypatch.setattr(progress, "time", made)
  return made


def stop_after(steps):
  """A `stop` that is true from the given call on."""
  calls = iter(range(steps))
  return lambda: next(calls, None) is None


class TestNumbers:
  def test_learns_the_blobs(self, whole):
    assert whole.finished
    assert whole.metrics["steps"] == sum(whole.metrics["steps_per_task"])
    table = np.array(whole.metrics["accuracy_matrix"], float)
    assert np.isnan(table[np.triu_indices(3, 1)]).all()
    assert not np.isnan(table[np.tril_indices(3)]).any()

  def test_compiles_are_counted_not_assumed(self, whole):
    compiles = {"train_step": 1, "evaluate": 1, "after_first_task": 0}
    assert whole.metrics["compiles"] == compiles
    note = progress.Recorder(progress.Progress(), print, (0,), 1)
    for count in (5, 5, 8):
      note.compiled(count)
    assert note.compiled_later == 3

  def test_accuracy_is_that_of_predict(self, whole):
    data = tiny.dataset()
    hit = whole.predict(data.test_images) == data.test_labels
    assert hit.mean() == pytest.approx(whole.metrics["last_accuracy"])

  def test_predict_takes_odd_batches(self, whole):
    images = tiny.dataset().test_images[:3]
    assert whole.predict(images).shape == (3,)

  @pytest.mark.slow
  def test_longer_training_beats_the_control_that_cannot_learn(self):
    recipe = tiny.RECIPE._replace(epochs=40)
    learnt = train(recipe._replace(rate=optimizers.constant(1e-2)))
    control = train(recipe._replace(rate=optimizers.constant(0.0)))
    assert learnt.metrics["last_accuracy"] > 0.8
    assert control.metrics["last_accuracy"] < 0.5

  def test_history_has_a_row_every_log_and_at_each_task_end(self, whole):
    steps = [row[0] for row in whole.progress.history]
    ends = np.cumsum(whole.metrics["steps_per_task"]).tolist()
    assert set(ends) <= set(steps)
    assert set(range(4, ends[-1], 4)) <= set(steps)
    closed = [row[3] for row in whole.progress.history if row[0] <= ends[1]]
    assert closed and all(x is None for x in closed)

  @pytest.mark.slow
  def test_seed_moves_the_run(self, whole):
    assert (
      train(seed=1).metrics["params_sha256"] != whole.metrics["params_sha256"]
    )

  @pytest.mark.slow
  def test_same_seed_same_bits_on_other_devices(self, whole):
    assert (
      train(head=3).metrics["params_sha256"] == whole.metrics["params_sha256"]
    )

  def test_memory_is_reported_and_kept(self, whole):
    memory = whole.metrics["memory"]
    assert memory["samples"] == memory["held"] == tiny.MEMORY.size
    assert memory["bytes"] == tiny.MEMORY.size * 4
    held = whole.state.memory.buffer
    labels = tiny.dataset().train_labels[held.number]
    assert sorted(labels.ravel()) == sorted(2 * list(range(6)))
    np.testing.assert_array_equal(labels, held.label)
    images = tiny.dataset().train_images[held.number]
    np.testing.assert_array_equal(images, held.rows)


class TestBounds:
  @pytest.mark.slow
  def test_from_scratch_starts_every_task_anew(self):
    recipe = tiny.RECIPE._replace(from_scratch=True, cumulative=True)
    run = tiny.build(recipe=recipe, memory=tiny.NONE)
    state = tiny.steps(run, run_lib.start(run), 0, 2)
    again = run_lib.renew(run, state, 1)
    fresh = run_lib.start(run, 1)
    for x, y in zip(
      jax.tree.leaves(again.bank), jax.tree.leaves(fresh.bank), strict=True
    ):
      np.testing.assert_array_equal(x, y)

  @pytest.mark.slow
  def test_keeping_everything_means_every_sample(self):
    recipe = tiny.RECIPE._replace(cumulative=True)
    run = tiny.build(recipe=recipe, memory=tiny.NONE)
    batches = inputs.batches(run, tiny.feed(run, 2), 0)
    rows = np.asarray(batches.order).reshape(-1)
    every = len(tiny.dataset().train_labels)
    assert sorted(rows[rows >= 0].tolist()) == list(range(every))

  @pytest.mark.slow
  def test_no_memory_means_new_samples_only(self):
    run = tiny.build(memory=tiny.NONE, loss=losses.ce())
    rows = np.asarray(inputs.batches(run, tiny.feed(run, 2), 0).order)
    labels = run.dataset.train_labels[rows[rows >= 0]]
    assert set(labels) == set(run.stream.tasks[2])
    assert trainer.fit(run).finished


class TestResume:
  @pytest.mark.parametrize("after", [1, 5, 13, 20])
  def test_stopped_and_resumed_is_bit_identical(self, whole, tmp_path, after):
    with checkpoint.Checkpoints(tmp_path, every=3) as saves:
      part = train(checkpoints=saves, stop=stop_after(after))
    assert not part.finished
    with checkpoint.Checkpoints(tmp_path, every=3) as saves:
      rest = train(checkpoints=saves, resume=True)
    assert numbers(rest) == numbers(whole)
    assert rest.progress.history == whole.progress.history

  @pytest.mark.slow
  @pytest.mark.parametrize("heads", [(3, 2), (2, 1), (1, 3)])
  def test_resumed_on_another_mesh(self, whole, tmp_path, heads):
    before, after = heads
    with checkpoint.Checkpoints(tmp_path, every=3) as saves:
      train(checkpoints=saves, stop=stop_after(15), head=before)
    with checkpoint.Checkpoints(tmp_path, every=3) as saves:
      rest = train(checkpoints=saves, resume=True, head=after)
    assert numbers(rest) == numbers(whole)

  def test_a_finished_run_only_reports(self, whole, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saves:
      train(checkpoints=saves)
    with checkpoint.Checkpoints(tmp_path) as saves:
      again = train(checkpoints=saves, resume=True)
    assert numbers(again) == numbers(whole)

  def test_progress_survives_json(self, whole):
    import json

    text = json.dumps(progress.to_json(whole.progress))
    back = progress.from_json(json.loads(text))
    assert progress.measured(back) == progress.measured(whole.progress)


class TestStreamed:
  """Images read as they are needed: the same run, bit for bit."""

  RECIPES: ClassVar = {
    "plain": (tiny.RECIPE._replace(batch=12), {}),
    # Batches with gaps, batch statistics, and devices that share them.
    "data": (
      tiny.RECIPE._replace(batch=12, balanced_epochs=1),
      {
        "norm": "batch",
        "data": 2,
        "head": 3,
        "memory": tiny.Memory(selection="herding"),
      },
    ),
  }

  @staticmethod
  def runs(name):
    recipe, settings = TestStreamed.RECIPES[name]
    return [
      tiny.build(recipe=recipe._replace(streamed=streamed), **settings)
      for streamed in (True, False)
    ]

  @pytest.mark.slow
  @pytest.mark.parametrize("name", RECIPES)
  def test_equals_the_run_in_memory(self, name):
    streamed, held = (trainer.fit(run) for run in self.runs(name))
    assert numbers(streamed) == numbers(held)
    assert streamed.progress.history == held.progress.history

  @pytest.mark.slow
  def test_keeps_no_images_on_the_devices(self):
    streamed, held = self.runs("plain")
    assert streamed.train_set.images is streamed.test_set.images is None
    images = held.train_set.images.nbytes + held.test_set.images.nbytes
    assert images == 4 * (120 + 42)

  def test_of_several_processes_each_reads_its_own_rows(self, monkeypatch):
    """As of two: half of each batch, and never the rest."""
    run, _ = self.runs("plain")
    images, size = run.dataset.train_images, run.recipe.batch
    feed = phases.open_phase(run, run.phases[0])
    given = {}

    def put(part, size, where):
      assert size == run.recipe.batch
      return part

    monkeypatch.setattr(inputs.across, "put_rows", put)
    for part in slice(0, size // 2), slice(size // 2, size), slice(0, size):
      read = []

      class Source:
        def __getitem__(self, rows, read=read):
          read.append(len(rows))
          return images[rows]

      monkeypatch.setattr(inputs.across, "rows_here", lambda *_, p=part: p)
      here = run._replace(dataset=run.dataset._replace(train_images=Source()))
      steps = inputs.steps(here, feed, 0)
      found = [samples.images for _, samples in steps]
      given[part.start, part.stop] = np.stack(found)
      assert set(read) == {part.stop - part.start}
    halves = given[0, size // 2], given[size // 2, size]
    np.testing.assert_array_equal(np.concatenate(halves, 1), given[0, size])

  @pytest.mark.slow
  @pytest.mark.parametrize("name", RECIPES)
  @pytest.mark.parametrize("after", [2, 10, 16])
  def test_resume_inside_a_pass(self, tmp_path, name, after):
    run, _ = self.runs(name)
    want = trainer.fit(run)
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      part = trainer.fit(run, checkpoints=saves, stop=stop_after(after))
    step = part.progress.step
    (phase,) = (phase for phase in run.phases if step in phase.steps)
    assert (step - phase.steps.start) % phase.per_epoch, "not inside a pass"
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      rest = trainer.fit(run, checkpoints=saves, resume=True)
    assert numbers(rest) == numbers(want)

  @pytest.mark.slow
  def test_each_test_part_has_one_shape_and_every_image_counts(self):
    run, held = (
      tiny.build(recipe=tiny.RECIPE._replace(streamed=x, test_batch=4))
      for x in (True, False)
    )
    parts = list(inputs.tests(run, 21))
    assert [counted for _, counted in parts] == [4, 4, 4, 3, 3, 3]
    assert {part.images.shape for part, _ in parts} == {(4, 2, 2, 1)}
    for i, (part, counted) in enumerate(parts):
      want = held.test_set.images[i:21:6]
      np.testing.assert_array_equal(part.images[:counted], want)

  def test_steps_sent_ahead_are_counted_until_they_are_done(self, clock):
    """The host of a run in memory is done long before its devices."""
    note = progress.Recorder(progress.Progress(), print, (0,), 1)
    note.begin(0)
    for _ in range(3):
      with note.waiting():
        clock.now += 1.0
      clock.now += 0.25  # sending a step
    clock.now += 20.0  # the devices, still at work
    note.flush()
    clock.now += 400.0  # a test, which is no step
    note.begin(1)
    with note.waiting():
      clock.now += 1.0
    assert note.progress().waited == 4.0
    assert note.progress().stepped == 20.75

  def test_waiting_is_measured(self, monkeypatch, clock):
    """All the time that a slow source takes, and nothing else."""
    run, _ = self.runs("plain")
    read = pipeline.ahead

    def slow(*arguments, **options):
      for each in read(*arguments, **options):
        clock.now += 3.0
        yield each

    monkeypatch.setattr(pipeline, "ahead", slow)
    done = trainer.fit(run._replace(step=Timed(run.step, clock)))
    # Reading the tests is slow too, and no step waits for it.
    assert done.progress.waited == 3.0 * done.progress.step
    assert done.metrics["waiting_share"] == 0.75
    # The reads of the last test, over the images of all tasks.
    images = int(done.progress.tallies[-1].total.sum())
    assert done.progress.tested in (3.0, 6.0, 9.0, 12.0)
    told = done.metrics["test_ms_per_image"] * images
    assert told == pytest.approx(1e3 * done.progress.tested)


class Timed:
  """A compiled step that takes a second."""

  def __init__(self, step, clock):
    self._step, self._clock = step, clock

  def __call__(self, *arguments):
    self._clock.now += 1.0
    return self._step(*arguments)

  def __getattr__(self, name):
    return getattr(self._step, name)


class TestMemories:
  """Phases whose rows depend on what was learnt before."""

  RECIPE = tiny.RECIPE._replace(balanced_epochs=2)
  HERDING = tiny.Memory(18, 4, 0, "per_class", "herding")
  RESERVOIR = tiny.Memory(policy="reservoir")

  @pytest.mark.slow
  @pytest.mark.parametrize("memory", [HERDING, RESERVOIR])
  @pytest.mark.parametrize("after", [12, 22, 31])
  def test_resume_inside_any_phase(self, tmp_path, memory, after):
    how = {"recipe": self.RECIPE, "memory": memory}
    want = train(**how)
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      part = train(checkpoints=saves, stop=stop_after(after), **how)
    assert not part.finished
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      rest = train(checkpoints=saves, resume=True, **how)
    assert numbers(rest) == numbers(want)
    for x, y in zip(*(jax.tree.leaves(r.state.memory) for r in (rest, want))):
      np.testing.assert_array_equal(x, y)

  def test_the_phases_of_the_tasks_are_all_phases(self):
    run = tiny.build(recipe=self.RECIPE, memory=self.HERDING)
    of = [run.phases_of(t) for t in range(3)]
    assert sum(of, ()) == run.phases
    kinds = [[phase.balanced for phase in phases] for phases in of]
    assert kinds == [[False], [False, True], [False, True]]

  def test_balanced_pass_sees_the_memory_alone(self):
    run = tiny.build(recipe=self.RECIPE, memory=self.HERDING)
    _, phase = run.phases_of(1)
    assert phase.balanced
    state = run_lib.start(run)
    for t in range(2):
      state = phases.keep(run, state, t)
    held = run.transform.held(state.memory)
    feed = phases.open_phase(run, phase, held)
    order = np.asarray(inputs.batches(run, feed, 0).order)[: phase.per_epoch]
    rows = order[order >= 0]
    assert sorted(rows.tolist()) == sorted(held.tolist())
    counts = np.bincount(run.dataset.train_labels[rows], minlength=6)
    assert set(counts[list(run.stream.seen(1))]) == {3}
    # Nothing of it is stored again.
    after = run.step(
      state, inputs.batches(run, feed, 0), feed.task, run.train_set
    )
    assert run.transform.held(after.memory).tolist() == held.tolist()

  @pytest.mark.slow
  @pytest.mark.parametrize("policy", ["balanced", "reservoir"])
  def test_balanced_pass_of_a_buffer_that_holds_samples_twice(self, policy):
    recipe = tiny.RECIPE._replace(epochs=3, balanced_epochs=1)
    memory = tiny.Memory(size=120, policy=policy)
    run = tiny.build(recipe=recipe, memory=memory)
    done = trainer.fit(run)
    held = done.metrics["memory"]
    # 120 samples passed three times, and no class is full before it has 20.
    assert held["distinct"] < held["held"] <= 120
    assert done.finished

  def test_padding_of_a_pass_is_of_the_pass(self):
    """Batch statistics of the last batch must not see another class."""
    run = tiny.build(recipe=tiny.RECIPE._replace(batch=32))
    feed = tiny.feed(run, 1)
    order = np.asarray(inputs.batches(run, feed, 0).order)
    order = order[: feed.phase.per_epoch]
    assert (order < 0).any(), "the last batch must have gaps"
    rows = np.where(order < 0, ~order, order)
    seen = np.isin(run.dataset.train_labels[rows], run.stream.seen(1))
    assert seen.all()
    assert 0 not in run.stream.seen(1), "row 0 is the row that must not leak"


class TestDivergence:
  @pytest.mark.slow
  def test_names_step_head_and_last_save(self, tmp_path):
    recipe = tiny.RECIPE._replace(
      optimizer=optimizers.sgd(),
      rate=lambda step, steps: jax.numpy.where(step < 3, 0.0, 1e30),
    )
    with (
      checkpoint.Checkpoints(tmp_path, every=2) as saves,
      pytest.raises(
        trainer.Diverged,
        match=r"^the loss of head 0 became NaN or infinite at step 5; "
        r"last good checkpoint: step 4; lower",
      ),
    ):
      train(recipe, checkpoints=saves)

  @pytest.mark.slow
  def test_a_state_that_is_not_finite_is_never_saved(self, tmp_path):
    """The loss is still finite when the parameters overflow at step 4."""
    recipe = tiny.RECIPE._replace(
      optimizer=optimizers.sgd(),
      rate=lambda step, steps: jax.numpy.where(step < 3, 0.0, jax.numpy.inf),
    )
    with (
      checkpoint.Checkpoints(tmp_path, every=2) as saves,
      pytest.raises(
        trainer.Diverged,
        match=r"^bank\.params\.\S+ of head 0 became NaN or infinite by "
        r"step 4; last good checkpoint: step 2; lower",
      ),
    ):
      train(recipe, checkpoints=saves)

  @pytest.mark.slow
  @pytest.mark.parametrize(
    "loss, named",
    [
      (losses.dce(), "the loss of head 1 became"),
      (losses.ce(), "the loss, first seen in head 0, became"),
      (losses.distributed_ce(), "the loss, first seen in head 0, became"),
    ],
    ids=lambda x: getattr(x, "name", ""),
  )
  def test_a_shared_normaliser_hides_the_origin(self, loss, named, monkeypatch):
    """Head 1 is born bad, and is first used in task 1."""
    start = run_lib.start

    def poison(x):
      rows = np.array(x)
      rows[1] = np.nan
      return jax.device_put(rows, x.sharding)

    def bad(run):
      state = start(run)
      params = jax.tree.map(poison, state.bank.params)
      return state._replace(bank=state.bank._replace(params=params))

    monkeypatch.setattr(run_lib, "start", bad)
    run = tiny.build(loss=loss)
    step = run.phases_of(1)[0].steps.start + 1
    with pytest.raises(trainer.Diverged, match=rf"^{named} .* step {step}; "):
      trainer.fit(run)


class TestMistakes:
  @pytest.mark.parametrize(
    ("settings", "message"),
    [
      (
        {"memory": tiny.Memory(121)},
        r"memory\.size=121 is more than the 120 .*; use .*-1",
      ),
      (
        {"recipe": tiny.RECIPE._replace(batch=41)},
        r"train\.batch=41 is more than the 40 samples of task 0; .*40",
      ),
      (
        # Five steps an epoch and task.
        {"recipe": tiny.RECIPE._replace(epochs=2**31 // 15 + 1)},
        r"train\.epochs=143165577 and .* make 2,147,483,6.. steps",
      ),
    ],
  )
  def test_more_than_there_is(self, settings, message):
    with pytest.raises(ValueError, match=message):
      trainer.train(*tiny.parts(**settings))

  def test_as_much_as_there_is(self):
    recipe = tiny.RECIPE._replace(batch=40)
    prepare.check(*tiny.parts(recipe=recipe)[:3], recipe, 120)

  def test_a_set_that_no_device_holds(self):
    dataset = tiny.dataset()
    prepare.check_room(dataset, None)
    prepare.check_room(dataset, 648)
    with pytest.raises(ValueError, match=r"648 bytes.* 647 .*streamed=true"):
      prepare.check_room(dataset, 647)

  def test_batch_must_divide(self):
    parts = tiny.parts(data=2, recipe=tiny.RECIPE._replace(batch=5))
    with pytest.raises(ValueError, match=r"train\.batch=5 .* use"):
      trainer.train(*parts)

  def test_stream_must_fit_the_data(self):
    parts = list(tiny.parts())
    parts[1] = tiny.stream((2, 2))
    with pytest.raises(ValueError, match=r"4 classes.*6"):
      trainer.train(*parts)

  def test_unknown_train_heads(self):
    recipe = tiny.RECIPE._replace(train_heads="some")
    with pytest.raises(ValueError, match=r"train_heads='some'.*readout"):
      train(recipe)
