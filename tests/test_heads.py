import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import bank as bank_lib
from mhil import (
  compiling,
  inputs,
  local,
  losses,
  modules,
  networks,
  optimizers,
  phases,
  prepare,
  programs,
  sharding,
  transforms,
)
from mhil import run as run_lib
from tests import tiny

P = jax.P
# Weight decay, which would move a frozen layer if it could.
DECAY = optimizers.adam(0.1)
# Samples of all classes seen, from the first step of a task on.
EVERY = {
  "recipe": tiny.RECIPE._replace(cumulative=True),
  "memory": tiny.NONE,
}


def canonical(tree, count):
  """Heads in order, as numpy `[heads, ...]` leaves."""
  return [
    bank_lib.flatten(np.asarray(x))[:count] for x in jax.tree.leaves(tree)
  ]


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def spans_head(run):
  return [c for c in run.traffic if "head" in c.axes]


class TestTraffic:
  @pytest.mark.slow
  @pytest.mark.parametrize("kind", ["learned", "zero", "per_class", "none"])
  def test_dce_step_has_no_collective_at_all(self, kind):
    run = tiny.build(head=3, loss=losses.dce(kind))
    assert run.traffic == []

  @pytest.mark.slow
  def test_dce_moves_only_gradients_over_data(self):
    run = tiny.build(head=3, data=2)
    assert run.traffic and not spans_head(run)
    assert {c.axes for c in run.traffic} == {("data",)}

  @pytest.mark.parametrize("loss", [losses.ce(), losses.distributed_ce()])
  def test_audit_sees_the_traffic_of_coupled_losses(self, loss):
    assert spans_head(tiny.build(head=3, loss=loss))

  def test_distributed_ce_moves_two_floats_a_sample(self):
    run = tiny.build(head=3, loss=losses.distributed_ce())
    found = spans_head(run)
    assert {c.kind for c in found} == {"all-reduce"}
    # A max and a sum, float32, of a batch of 8 and 4 drawn.
    assert sum(c.bytes for c in found) == 2 * 4 * (8 + 4)

  def test_ce_gathers_every_logit(self):
    run = tiny.build(head=3, loss=losses.ce())
    (found,) = spans_head(run)
    assert found.kind == "all-gather"
    assert found.bytes == 3 * 2 * 4 * (8 + 4)


class TestIndependence:
  @pytest.mark.slow
  def test_a_head_alone_is_bit_identical(self):
    """Head m in a program without the others ends with the same bits."""
    whole = tiny.build(head=3, **EVERY)
    together = run_lib.start(whole)
    together = tiny.steps(whole, together, 2, 4)
    for m in range(3):
      alone = run_with_only(whole, m, steps=4)
      want = jax.tree.map(
        lambda x, m=m: bank_lib.flatten(np.asarray(x))[m], together.bank.params
      )
      assert same(jax.tree.leaves(alone), jax.tree.leaves(want))

  @pytest.mark.parametrize("kind", ["learned", "zero", "per_class", "none"])
  def test_no_head_feels_another(self, kind):
    """Disturbing head 0's parameters changes head 0 and nothing else."""
    run = tiny.build(head=1, loss=losses.dce(kind), **EVERY)
    calm = run_lib.start(run)
    moved = disturb(run_lib.start(run), 0)
    calm, moved = (tiny.steps(run, s, 2, 3) for s in (calm, moved))
    a, b = (canonical(s.bank.params, 3) for s in (calm, moved))
    assert same([x[1:] for x in a], [x[1:] for x in b])
    assert not same([x[:1] for x in a], [x[:1] for x in b])

  def test_with_ce_heads_feel_each_other(self):
    """The control of the test above."""
    run = tiny.build(head=1, loss=losses.ce(), **EVERY)
    calm = run_lib.start(run)
    moved = disturb(run_lib.start(run), 0)
    calm, moved = (tiny.steps(run, s, 2, 3) for s in (calm, moved))
    a, b = (canonical(s.bank.params, 3) for s in (calm, moved))
    assert not same([x[1:] for x in a], [x[1:] for x in b])


def disturb(state, head):
  """Adds one to every parameter of a head."""

  def move(x):
    moved = np.array(x)
    flat = moved.reshape(-1, *x.shape[2:])
    flat[head] += 1
    return jax.device_put(moved, x.sharding)

  params = jax.tree.map(move, state.bank.params)
  return state._replace(bank=state.bank._replace(params=params))


def run_with_only(whole, m, steps):
  """Trains head `m` in a bank that holds nothing else: its parameters.

  The program sees one head, opened as the first, with the priors and targets
  that it has among the others.
  """
  mesh = sharding.make_mesh()

  def take(x):
    return bank_lib.flatten(np.asarray(x))[m][None, None]

  feed = tiny.feed(whole, 2)
  classes_of = jax.numpy.array(whole.stream.head_of)

  def prior(counts, owners, opened):
    return whole.loss.prior(counts, classes_of, 3)

  tables = bank_lib.Task(
    np.int32(1),
    *feed.task[1:5],
    np.zeros((1, 1), np.int32),
    take(feed.task.valid),
  )
  tables = place(tables, mesh, bank_lib.TASK_SPEC)
  bank = jax.tree.map(take, run_lib.start(whole).bank)
  first = np.int32(feed.phase.steps.start)
  transform = transforms.none(whole.dataset.classes)
  state = programs.State(first, bank, ())
  state = place(state, mesh, programs.state_spec(transform))
  batches = sharding.replicated(inputs.batches(whole, feed, 0), mesh)
  owners = np.where(np.asarray(whole.train_set.owners) == m, 0, 1)
  samples = whole.train_set._replace(owners=owners.astype(np.int32))
  samples = sharding.replicated(samples, mesh)
  step = jax.jit(
    programs.train_step(
      mesh,
      whole.dataset,
      whole.objective,
      whole.loss._replace(prior=prior),
      whole.recipe.optimizer,
      run_lib.rate_of(whole.recipe),
      "all",
      transform,
    )
  )
  for _ in range(steps):
    state = step(state, batches, tables, samples)
  return jax.tree.map(lambda x: np.asarray(x)[0, 0], state.bank.params)


def place(tree, mesh, specs):
  return jax.tree.map(
    lambda spec, part: sharding.place(part, mesh, spec),
    specs,
    tree,
    is_leaf=lambda x: isinstance(x, P),
  )


class TestLayout:
  @pytest.mark.slow
  def test_heads_do_not_depend_on_the_mesh(self):
    """Three heads on 1, 2 or 3 devices start and end with the same bits."""
    ends = []
    for head in (1, 2, 3):
      run = tiny.build(head=head)
      state = run_lib.start(run)
      for t in range(3):
        state = run_lib.renew(run, state, t)
        state = tiny.steps(run, state, t, 3)
      ends.append(canonical(state.bank.params, 3))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])

  @pytest.mark.slow
  def test_data_axis_changes_only_rounding(self):
    ends = []
    for data in (1, 2, 4):
      # Workers that store apart store other samples; without, all is alike.
      run = tiny.build(data=data, norm="batch", memory=tiny.NONE)
      state = tiny.steps(run, run_lib.start(run), 2, 3)
      ends.append(canonical((state.bank.params, state.bank.stats), 3))
    for other in ends[1:]:
      for x, y in zip(ends[0], other, strict=True):
        # Gradients are summed in another order; three Adam steps of 1e-3
        # turn a last-bit difference of a near-zero gradient into 1e-5.
        np.testing.assert_allclose(x, y, atol=2e-5)

  def test_arrange_deals_in_turn(self):
    mesh = sharding.make_mesh(head=2)
    table = bank_lib.arrange(np.arange(5), mesh, fill=-1)
    np.testing.assert_array_equal(table, [[0, 1], [2, 3], [4, -1]])
    np.testing.assert_array_equal(bank_lib.flatten(table)[:5], np.arange(5))

  def test_shardings_survive_a_step(self):
    run = tiny.build(head=3)
    state = run_lib.start(run)
    before = jax.tree.map(kind, state)
    state = tiny.steps(run, state, 0, 1)
    assert jax.tree.map(kind, state) == before


class TestOpenAndClosed:
  @pytest.mark.parametrize("head", [1, 3])
  def test_closed_heads_do_not_move(self, head):
    run = tiny.build(head=head)
    before = run_lib.start(run)
    kept = canonical(before.bank, 3)
    after = canonical(tiny.steps(run, before, 0, 3).bank, 3)
    assert same([x[1:] for x in kept], [x[1:] for x in after])
    assert not same([x[:1] for x in kept], [x[:1] for x in after])

  def test_closed_heads_do_not_score(self):
    run = tiny.build(head=1)
    state = run_lib.start(run)
    predict = phases.predictor(run, state, 0)
    found = set(predict(run.dataset.test_images).tolist())
    assert found <= set(run.stream.tasks[0])

  @pytest.mark.slow
  @pytest.mark.parametrize("mode", ["new", "readout", "all"])
  @pytest.mark.parametrize("head", [1, 3])
  def test_train_heads(self, mode, head):
    recipe = tiny.RECIPE._replace(train_heads=mode, optimizer=DECAY)
    run = tiny.build(head=head, recipe=recipe)
    state = run_lib.start(run)
    kept = jax.tree.map(np.asarray, state.bank.params)
    state = tiny.steps(run, state, 2, 3)
    moved = {
      name: [
        not same(
          [bank_lib.flatten(x)[m] for x in jax.tree.leaves(kept[name])],
          [
            bank_lib.flatten(np.asarray(x))[m]
            for x in jax.tree.leaves(state.bank.params[name])
          ],
        )
        for m in range(3)
      ]
      for name in kept
    }
    features = {
      "all": [True] * 3,
      "readout": [False, False, True],
      "new": [False, False, True],
    }
    assert moved["dense0"] == features[mode]
    assert moved["readout"] == (
      features["new"] if mode == "new" else [True] * 3
    )

  @pytest.mark.slow
  def test_padded_classes_never_win(self):
    run = tiny.build(head=1, sizes=(3, 1, 2))
    state = tiny.steps(run, run_lib.start(run), 2, 4)
    predict = phases.predictor(run, state, 2)
    found = predict(run.dataset.test_images)
    # Classes would be named twice, or a hole be filled by class 0, if padding
    # could win: the counts of the evaluation see the true columns only.
    tally = phases.evaluate(run, state, tiny.feed(run, 2))
    hits = (found == run.dataset.test_labels).sum()
    assert int(np.sum(np.asarray(tally.correct))) == hits
    scores = phases.class_scores(run)
    table = np.asarray(
      jax.jit(scores)(
        state.bank,
        tiny.feed(run, 2).task,
        sharding.replicated(run.dataset.test_images, run.mesh),
      )
    )
    padded = [(1, 1), (1, 2), (2, 2)]
    assert all((table[:, h, c] == losses.MASKED).all() for h, c in padded)
    assert (np.delete(table.reshape(-1, 9), [4, 5, 8], 1) > -1e29).all()


# One step of plain gradient descent on samples of all classes.
DESCENT = EVERY["recipe"]._replace(
  optimizer=optimizers.sgd(0.0),
  rate=optimizers.constant(0.5),
  correction=False,
)


def moves_by_the_joint_gradient(run, logits, names):
  """One step of these pieces descends cross-entropy over all classes.

  `logits` is `(params, stats, images) -> [b, c+1]` of one head in training.
  """
  before, feed = run_lib.start(run), tiny.feed(run, 2)
  heads = [
    jax.tree.map(lambda x, i=i: jnp.array(np.asarray(x)[0, i]), before.bank)
    for i in range(3)
  ]
  row = np.asarray(inputs.batches(run, feed, 0).order)[0]
  set_ = run.dataset
  x = jnp.asarray((set_.train_images[row] / 255.0 - 0.5) / 0.25, jnp.float32)
  label = set_.train_labels[row]
  column = 2 * run.stream.head_of[label] + run.stream.column_of[label]

  def joint(params):
    each = [logits(p, h.stats, x)[:, :2] for p, h in zip(params, heads)]
    table = jax.nn.log_softmax(jnp.concatenate(each, 1))
    return -jnp.mean(table[jnp.arange(len(x)), column])

  grads = jax.jit(jax.grad(joint))([h.params for h in heads])
  after = tiny.steps(run, before, 2, 1).bank.params
  for i, (h, g) in enumerate(zip(heads, grads)):
    for name in names:
      want = jax.tree.map(lambda p, g: p - 0.5 * g, h.params[name], g[name])
      got = jax.tree.map(lambda x, i=i: np.asarray(x)[0, i], after[name])
      # Sums of 8 samples in another order.
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6), got, want
      )


@pytest.mark.parametrize(
  "loss", [losses.ce(), losses.distributed_ce()], ids=lambda loss: loss.name
)
class TestJoint:
  @pytest.mark.parametrize("norm", ["none", "batch"])
  def test_a_step_is_that_of_cross_entropy_over_all_classes(self, loss, norm):
    settings = EVERY | {"recipe": DESCENT}
    run = tiny.build(head=3, loss=loss, norm=norm, **settings)
    branch = networks.mlp(4, 3, hidden=(8,), norm=norm)

    def logits(params, stats, x):
      return branch.apply(params, stats, x, True)[0]

    moves_by_the_joint_gradient(run, logits, ["dense0", "readout"])

  @pytest.mark.parametrize(
    "how",
    [
      modules.GREEDY._replace(isolated=False),
      modules.GREEDY._replace(loss="contrast", hidden=8),
    ],
    ids=["end to end", "contrast"],
  )
  def test_local_learning_too_with_batch_norm(self, loss, how):
    """The control wholly; with contrast what the loss of the head reaches."""
    sizes = 4, 3, (8, 8), "batch"
    branch = networks.mlp(*sizes, axis="data")
    cut = modules.split(branch, (2, 2, 1), ["dense0"], how)
    given = {"loss": loss, "recipe": DESCENT, "memory": tiny.NONE}
    mesh, stream, dataset, *_ = tiny.parts(head=3, **given)
    parts = mesh, stream, dataset, local.local(cut), loss, DESCENT
    alone = networks.mlp(*sizes)

    def logits(params, stats, x):
      for name in "dense0", "dense1":
        x, _ = alone.piece(name, params[name], stats[name], x, True)
        if how.isolated and name == "dense0":
          x = jax.lax.stop_gradient(x)
      return alone.readout(params, x)

    reached = ["dense1", "readout"]
    reached += [] if how.isolated else ["dense0"]
    moves_by_the_joint_gradient(prepare.build(*parts, 0), logits, reached)


class TestCoupled:
  @pytest.mark.slow
  def test_distributed_ce_trains_like_ce(self):
    ends = []
    for loss in (losses.ce(), losses.distributed_ce()):
      run = tiny.build(head=3, loss=loss)
      state = tiny.steps(run, run_lib.start(run), 2, 5)
      ends.append(canonical(state.bank.params, 3))
    for x, y in zip(*ends, strict=True):
      # The normaliser is summed in another order; five Adam steps of 1e-3.
      np.testing.assert_allclose(x, y, atol=2e-5)

  @pytest.mark.slow
  @pytest.mark.parametrize("head", [1, 2])
  def test_placement_changes_only_rounding(self, head):
    ends = []
    for devices in (head, 3):
      run = tiny.build(head=devices, loss=losses.ce())
      state = tiny.steps(run, run_lib.start(run), 2, 5)
      ends.append(canonical(state.bank.params, 3))
    for x, y in zip(*ends, strict=True):
      np.testing.assert_allclose(x, y, atol=2e-5)


class TestCost:
  def test_one_compile_for_a_whole_stream(self):
    """However many heads a device holds; counted by XLA's own events."""
    run = tiny.build(head=1)
    state = run_lib.start(run)
    warm(run, state)
    before = compiling.count()
    for t in range(3):
      state = run_lib.renew(run, state, t)
      state = tiny.steps(run, state, t, 2)
      state, *_ = run_lib.read(state)
      np.asarray(phases.evaluate(run, state, tiny.feed(run, t))[0])
    assert compiling.count() == before
    jax.jit(lambda x: x * 3 + 1)(np.float32(1))
    assert compiling.count() > before, "a compile must be seen"

  def test_nothing_goes_to_or_from_the_host(self):
    run = tiny.build(head=3)
    state = run_lib.renew(run, run_lib.start(run), 0)
    feed = tiny.feed(run, 0)
    task, batches = feed.task, inputs.batches(run, feed, 0)
    with jax.transfer_guard("disallow"):
      for _ in range(3):
        state = run.step(state, batches, task, run.train_set)
      with pytest.raises(Exception, match=r"[Dd]isallowed"):
        state.step + np.ones(3)  # the guard must see a transfer

  @pytest.mark.slow
  @pytest.mark.parametrize("train_heads", ["all", "new"])
  def test_temporary_memory_is_that_of_one_head(self, train_heads):
    recipe = tiny.RECIPE._replace(train_heads=train_heads)
    few, many = (
      tiny.build(head=1, sizes=sizes, recipe=recipe, memory=tiny.NONE)
      .step.memory_analysis()
      .temp_size_in_bytes
      for sizes in ((1, 1), (1,) * 16)
    )
    # Less what the priors of 16 heads take, a float for each output.
    assert many - few <= 4 * 16 * 2


def kind(x):
  """Shape, type and how it lies, however that is spelled."""
  return x.shape, x.dtype, x.sharding.devices_indices_map(x.shape)


def warm(run, state):
  """Compiles the small programs between tasks."""
  state = run_lib.renew(run, jax.tree.map(lambda x: x + 0, state), 0)
  state = tiny.steps(run, state, 0, 1)
  state, *_ = run_lib.read(state)
  np.asarray(phases.evaluate(run, state, tiny.feed(run, 0))[0])
