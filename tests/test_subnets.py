"""Heads whose branches train as subnets: what is held, moved and learnt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import bank as bank_lib
from mhil import (
  checkpoint,
  cutting,
  facts,
  inputs,
  losses,
  networks,
  objectives,
  optimizers,
  partitions,
  phases,
  prepare,
  programs,
  progress,
  rehearsal,
  sharding,
  subnets,
  trainer,
  transforms,
)
from mhil import run as run_lib
from tests import tiny

RECIPE = tiny.RECIPE._replace(rate=optimizers.constant(1e-2))
HIDDEN = (8, 16)
EVERY = 3  # 5 steps an epoch, 10 a task: the last round of a task is short.


def branch_of(hidden, norm="batch"):
  how = {"norm": norm, "axis": "data", "output_norm": norm == "batch"}
  return networks.mlp(4, 3, hidden, **how)


def parts(n, method="ist", norm="batch", statistics="running", **how):
  """The whole branch's objective, and the partition."""
  whole = branch_of(HIDDEN, norm)
  cut, part = cutting.copies(n), whole
  if method == "ist":
    cut = subnets.neurons(HIDDEN, n)
    part = branch_of(tuple(h // n for h in HIDDEN), norm)
  learn = objectives.end_to_end(part)
  partition = subnets.partition(cut, learn, every=EVERY, method=method, **how)
  objective = objectives.end_to_end(whole)
  return subnets.tested(objective, whole, statistics), partition


@functools.cache
def build(
  n=2,
  *,
  head=1,
  data=1,
  memory=tiny.NONE,
  recipe=RECIPE,
  plain=False,
  each=20,
  **settings,
):
  stream, dataset = tiny.stream(), tiny.dataset(each=each)
  mesh = sharding.make_mesh(head=head, data=data, subnet=n)
  objective, partition = parts(n, **settings)
  transform = None
  if memory.size:
    how = {"batch": recipe.batch, **memory._asdict()}
    transform = rehearsal.transform(mesh, dataset, **how)
  if plain:
    partition = partitions.NONE
  given = mesh, stream, dataset, objective, losses.dce(), recipe, 0
  return prepare.build(*given, transform, partition)


def everything():
  """Heads, samples, exemplars and subnets at once, on 8 devices."""
  return build(2, head=2, data=2, memory=tiny.Memory(draws=4), deal=True)


def whole(run, state):
  return run.whole(state.bank)


def after(run, steps, exchanging=True):
  """The state after so many steps of task 0."""
  state, feed = run_lib.start(run), tiny.feed(run, 0)
  for step, given in zip(range(steps), inputs.steps(run, feed, 0)):
    state = run.step(state, given[0], feed.task, given[1])
    jax.block_until_ready(state)
    if exchanging:
      state = run.exchange(state, step + 1)
  return state


def leaves(tree):
  return [np.array(x) for x in jax.tree.leaves(tree)]


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True)
  )


# 42 samples: five batches of 8, and one of two samples and six fillers.
RAGGED = {
  "norm": "none",
  "each": 21,
  "recipe": RECIPE._replace(optimizer=optimizers.sgd(0.0)),
}


def assert_copies_of(state, plain):
  """All parts are alike, and what plain training has made."""
  for x, y in zip(leaves(state.bank.bank.params), leaves(plain.bank.params)):
    for part in range(1, x.shape[2]):
      np.testing.assert_array_equal(x[:, :, 0], x[:, :, part])
    # Sums over parts of the samples, in another order.
    np.testing.assert_allclose(x[:, :, 0], y, rtol=1e-4, atol=1e-6)


def of(bank, head, *part):
  """Trees of one head, or of one part of it, on the host."""
  held = {"params": bank.params, "stats": bank.stats}
  return jax.tree.map(lambda x: np.asarray(x)[(head, 0, *part)], held)


class TestReduction:
  @pytest.mark.slow
  def test_one_subnet_is_plain_training_bit_for_bit(self):
    """Adam's state is dealt: a reset in each round would be another method."""
    one = trainer.fit(build(1, deal=True))
    plain = trainer.fit(build(1, plain=True))
    assert one.metrics["params_sha256"] == plain.metrics["params_sha256"]
    assert one.progress.history == plain.progress.history
    for field in "accuracy_matrix", "steps", "parameters":
      assert one.metrics[field] == plain.metrics[field]

  @pytest.mark.slow
  @pytest.mark.parametrize("n", [2, 4])
  def test_a_fresh_branch_is_that_of_plain_training(self, n):
    run, plain = build(n), build(1, plain=True)
    got = whole(run, run_lib.start(run)).params
    assert same(got, run_lib.start(plain).bank.params)


class TestExchange:
  @pytest.mark.slow
  @pytest.mark.parametrize("n", [2, 4])
  def test_equals_collecting_and_dealing_anew(self, n):
    run = build(n)
    before = after(run, EVERY, exchanging=False)
    joined = jax.tree.map(np.array, whole(run, before))
    old = jax.tree.map(np.array, before.bank.apart.index)
    then = run.exchange(before, EVERY)
    assert any(
      not np.array_equal(old[k], then.bank.apart.index[k]) for k in old
    )
    # Nothing is lost: the branch is the same before and after. Shared leaves
    # are averaged, of equal copies then.
    for name in "params", "stats":
      assert same(getattr(whole(run, then), name), getattr(joined, name))
    # Each part holds what its index says.
    cut = subnets.neurons(HIDDEN, n)
    for head in range(3):
      flat = cut.flat(of(joined, head))
      for i in range(n):
        mine = {k: np.asarray(t)[i] for k, t in then.bank.apart.index.items()}
        want = cutting.take(cut, flat, mine)
        got = cut.flat(of(then.bank.bank, head, i))
        for name in want:
          np.testing.assert_array_equal(got[name], want[name], err_msg=name)

  def test_every_neuron_is_in_one_subnet(self):
    run = build(4)
    seen = []
    state = run_lib.start(run)
    for done in range(EVERY, 4 * EVERY, EVERY):
      state = run.exchange(state, done)
      for name, table in state.bank.apart.index.items():
        units = dict(dense0=8, dense1=16)[name]
        assert sorted(np.asarray(table).ravel()) == list(range(units))
      seen.append(np.asarray(state.bank.apart.index["dense1"]).tobytes())
    assert len(set(seen)) == len(seen), "each round has other subnets"

  def test_permutations_are_uniform(self):
    """Each pair of neurons meets as often as any other."""
    index = {"a": np.zeros((2, 4), np.int32)}
    draw = jax.jit(jax.vmap(lambda key: partitions.draw(key, index)["a"]))
    tables = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    together = np.zeros((8, 8))
    for part in tables.reshape(-1, 4):
      together[np.ix_(part, part)] += 1
    pairs = together[~np.eye(8, dtype=bool)] / 4000
    # P = 3/7; four standard errors of a share of 4,000.
    np.testing.assert_allclose(pairs, 3 / 7, atol=4 * 0.5 / 4000**0.5)

  def test_only_the_seed_and_the_step_decide(self):
    run = build(2)
    a, b = run_lib.start(run), after(run, 2)
    a, b = (run.exchange(state, EVERY) for state in (a, b))
    assert same(a.bank.apart.index, b.bank.apart.index)

  def test_between_rounds_nothing_happens(self):
    run = build(2)
    state = run_lib.start(run)
    assert run.exchange(state, EVERY + 1) is state

  def test_the_last_round_of_a_task_is_merged_though_it_is_short(self):
    run = build(2)
    (phase,) = run.phases_of(0)
    assert phase.steps.stop % EVERY, "not short"
    state = run_lib.start(run)
    old = leaves(state.bank.apart.index)
    state = run.exchange(state, phase.steps.stop)
    assert any(not np.array_equal(x, y) for x, y in zip(
      old, leaves(state.bank.apart.index)
    ))  # fmt: skip

  @pytest.mark.slow
  @pytest.mark.parametrize("deal", [False, True])
  def test_the_optimiser_is_reset_or_dealt(self, deal):
    run = build(2, deal=deal)
    before = after(run, EVERY, exchanging=False)
    held = {
      "opt": jax.tree.map(lambda x: np.array(x)[0, 0], before.bank.bank.opt)
    }
    old = jax.tree.map(np.array, before.bank.apart.index)
    state = run.exchange(before, EVERY)
    assert any(name.startswith("opt") for name in state.bank.apart.rest) == deal
    counts = np.asarray(state.bank.bank.opt[0].count)
    assert (counts[0] == (EVERY if deal else 0)).all()
    mean = np.asarray(state.bank.bank.opt[0].mu["dense0"]["dense"]["kernel"])
    if not deal:
      assert not mean.any()
      return
    cut = subnets.neurons(HIDDEN, 2)
    parts = jax.vmap(cut.flat)(held)
    name = next(k for k in parts if "mu|dense0.dense.kernel" in k)
    joined = cutting.merge(cut, {name: parts[name]}, {}, old)[name]
    new = state.bank.apart.index["dense0"]
    for i in range(2):
      np.testing.assert_array_equal(mean[0, 0, i], joined[:, new[i]])


class TestTraffic:
  @pytest.mark.parametrize("n", [2, 4])
  def test_a_local_step_tells_nobody_anything(self, n):
    assert build(n).traffic == []

  @pytest.mark.slow
  def test_beside_heads_and_samples_too(self):
    run = everything()
    assert run.traffic, "gradients are summed over data"
    assert not [c for c in run.traffic if {"subnet", "head"} & set(c.axes)]

  @pytest.mark.parametrize("n", [2, 4])
  def test_an_exchange_moves_what_the_formula_says(self, n):
    self.check(build(n))

  @pytest.mark.slow
  def test_the_formula_holds_for_dealt_state_and_several_heads(self):
    self.check(everything())

  @staticmethod
  def check(run):
    bank = run_lib.start(run).bank.bank
    one = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[3:], x.dtype),
      partitions.trees(bank, run.partition.deal),
    )
    rows = bank.loss.shape[0]
    got = sharding.bytes_over(run.exchanged, "subnet")
    cut = subnets.neurons(HIDDEN, run.partition.parts)
    want = cutting.traffic(cut, jax.eval_shape(cut.flat, one))
    assert got == rows * want > 0
    assert {c.axes for c in run.exchanged} == {("subnet",)}

  @pytest.mark.slow
  def test_the_first_deal_is_a_full_exchange(self):
    run, fixed = (build(2, norm="none", renew=x) for x in (True, False))
    assert run.dealt == run.exchanged
    assert fixed.dealt == run.dealt != fixed.exchanged
    for method in "local_sgd", "data_parallel":
      # Copies are alike from the start.
      assert build(2, method=method, norm="none").dealt == ()

  @pytest.mark.slow
  def test_fixed_subnets_exchange_what_they_share(self):
    run = build(2, norm="none", renew=False)
    # The readout's bias of three heads.
    assert [(c.kind, c.bytes) for c in run.exchanged] == [
      ("all-reduce", 3 * 3 * 4)
    ]
    state = run_lib.start(run)
    index = leaves(state.bank.apart.index)
    order = cutting.home(subnets.neurons(HIDDEN, 2))
    assert not same(index, order), "not drawn"
    assert same(run.exchange(state, EVERY).bank.apart.index, index)


class TestSamples:
  @pytest.mark.slow
  def test_each_subnet_has_its_own(self):
    mesh = sharding.make_mesh(subnet=4)
    batch = transforms.Batch(*(jnp.arange(8) for _ in range(5)))

    def local(batch):
      mine = programs.share(batch, bank_lib.PARTS)
      return jax.tree.map(lambda x: x[None], mine)

    P = jax.P
    spread = jax.shard_map(
      local, mesh=mesh, in_specs=P(), out_specs=P("subnet")
    )
    got = spread(sharding.replicated(batch, mesh))
    for x in got:
      assert np.asarray(x).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]

  @pytest.mark.slow
  def test_a_subnet_without_samples_stands_still(self):
    """Two samples for four subnets, in the last batch of a pass."""
    run = build(4, **RAGGED)
    order = inputs.order_of(run, tiny.feed(run, 0), 0)
    real = (order >= 0).reshape(len(order), -1, 4).sum(1)
    assert real[-1].tolist() == [1, 1, 0, 0] and (real[:-1] == 2).all()
    before, then = (
      leaves(after(run, steps, exchanging=False).bank.bank.params)
      for steps in (len(order) - 1, len(order))
    )
    for x, y in zip(before, then):
      np.testing.assert_array_equal(x[0, 0, 2:], y[0, 0, 2:])
    for part in 0, 1:
      # Its kernels and biases; a ReLU that sleeps leaves single ones alone.
      assert any((x[0, 0, part] != y[0, 0, part]).any()
                 for x, y in zip(before, then))  # fmt: skip

  @pytest.mark.slow
  def test_a_task_is_learnt_and_not_by_chance(self):
    recipe = RECIPE._replace(epochs=30)
    learnt = trainer.fit(build(2, recipe=recipe))
    control = trainer.fit(
      build(2, recipe=recipe._replace(rate=optimizers.constant(0.0)))
    )
    first = [x.metrics["accuracy_after_task"][0] for x in (learnt, control)]
    assert first[0] > 0.9 > 0.8 > first[1]


class TestBaselines:
  @pytest.mark.slow
  def test_local_sgd_averages_its_copies(self):
    run = build(2, method="local_sgd")
    before = after(run, EVERY, exchanging=False)
    params, others = (
      leaves(before.bank.bank.params),
      leaves(before.bank.bank.stats),
    )
    assert any((x[:, :, 0] != x[:, :, 1]).any() for x in params)
    joined = leaves(whole(run, before).params)
    for x, mean in zip(params, joined):
      np.testing.assert_array_equal(mean, x.mean(2))
    then = leaves(run.exchange(before, EVERY).bank.bank.params)
    for x, mean in zip(then, joined):
      np.testing.assert_array_equal(x, np.stack([mean, mean], 2))
    size = sum(x[0, 0, 0].size for x in params)
    stats = sum(x[0, 0, 0].size for x in others)
    (found,) = {c.kind for c in run.exchanged}
    assert found == "all-reduce"
    assert sum(c.bytes for c in run.exchanged) == 3 * 4 * (size + stats)

  @pytest.mark.slow
  def test_data_parallel_is_one_net_on_all_samples(self):
    recipe = RECIPE._replace(optimizer=optimizers.sgd(0.9))
    how = {"norm": "none", "recipe": recipe}
    run = build(2, method="data_parallel", **how)
    state, plain = after(run, 5), after(build(1, plain=True, **how), 5)
    assert_copies_of(state, plain)
    size = sum(x[0, 0, 0].size for x in leaves(state.bank.bank.params))
    assert run.exchanged == ()
    # A loop over heads: its body counts once. The loss and the number of
    # samples are a number each.
    assert sharding.bytes_over(run.traffic, "subnet") == 4 * (size + 2)

  @pytest.mark.slow
  def test_data_parallel_weighs_samples_alike_where_a_batch_is_short(self):
    """Two parts have a sample each in the sixth step, two have none."""
    run = build(4, method="data_parallel", **RAGGED)
    plain = build(1, plain=True, **RAGGED)
    assert_copies_of(after(run, 6), after(plain, 6))

  @pytest.mark.slow
  def test_data_parallel_reports_the_loss_of_all_samples(self):
    run = build(4, method="data_parallel", **RAGGED)
    plain = after(build(1, plain=True, **RAGGED), 6)
    found = np.asarray(after(run, 6).bank.bank.loss)[0, 0]
    # Six losses of order one, summed in another order.
    np.testing.assert_allclose(found, float(plain.bank.loss[0, 0]), rtol=1e-4)

  @pytest.mark.slow
  @pytest.mark.parametrize("method", ["data_parallel", "local_sgd", "ist"])
  def test_old_heads_can_train_their_readout_alone(self, method):
    """A readout's step is another one than the branch's."""
    recipe = RECIPE._replace(
      optimizer=optimizers.sgd(0.9), train_heads="readout", cumulative=True
    )
    how = {"norm": "none", "recipe": recipe}
    run = build(2, method=method, **how)
    state = tiny.steps(run, run_lib.start(run), 1, 4)
    first = run_lib.start(run).bank.bank.params
    for head, frozen in (0, True), (1, False):
      for name, (x, y) in {
        k: (leaves(first[k]), leaves(state.bank.bank.params[k])) for k in first
      }.items():
        moved = any((a[head] != b[head]).any() for a, b in zip(x, y))
        assert moved != (frozen and name != "readout"), (head, name)
    if method == "data_parallel":
      one = build(1, plain=True, **how)
      assert_copies_of(state, tiny.steps(one, run_lib.start(one), 1, 4))
    else:
      last = leaves(state.bank.bank.params["readout"])
      assert any((x[0, 0, 0] != x[0, 0, 1]).any() for x in last)


class TestStatistics:
  @pytest.mark.slow
  @pytest.mark.parametrize("n", [1, 2])
  def test_collected_ones_are_those_of_the_merged_net(self, n):
    """Or of a net that was never cut."""
    run = build(n, statistics="collected", plain=n == 1)
    state = after(run, EVERY)
    rows = np.flatnonzero(
      np.isin(run.dataset.train_labels, run.stream.tasks[0])
    )
    settled = phases.whole(run, state, 0)
    merged = whole(run, state)
    assert same(settled.params, merged.params)
    kernel = np.asarray(merged.params["dense0"]["dense"]["kernel"])[0, 0]
    images = run.dataset.train_images[rows].reshape(len(rows), -1) / 255
    mean = ((images - 0.5) / 0.25 @ kernel).mean(0)
    # 1,024 draws of 40 images stand for them: four standard errors or so.
    got = settled.stats["dense0"]["norm"]["mean"][0, 0]
    spread = np.sqrt(settled.stats["dense0"]["norm"]["var"][0, 0])
    assert (np.abs(got - mean) < 4 * spread / 32).all()
    assert not same(settled.stats, merged.stats)

  @pytest.mark.slow
  @pytest.mark.parametrize("n", [1, 2])
  def test_a_batch_s_own_go_by_its_company(self, n):
    run = build(n, statistics="batch", plain=n == 1)
    state = run_lib.start(run)
    predict = phases.predictor(run, state, 2)
    images = run.dataset.test_images
    whole_batch, alone = predict(images), predict(images[:3])
    assert (whole_batch[:3] != alone).any()

  @pytest.mark.slow
  @pytest.mark.parametrize("n", [1, 2])
  def test_what_is_multiplied_does_not_go_by_them(self, n):
    # They are means over the mesh, which a count by the shapes has not.
    found = []
    for statistics in "running", "batch":
      run = build(n, statistics=statistics, plain=n == 1)
      numbers = facts.of_run(run, run_lib.start(run))
      found.append(numbers["inference"]["multiply_adds"])
    assert found[0] == found[1] > 0

  def test_running_ones_do_not(self):
    run = build(2)
    state = run_lib.start(run)
    predict = phases.predictor(run, state, 2)
    images = run.dataset.test_images
    np.testing.assert_array_equal(predict(images)[:3], predict(images[:3]))


class TestResume:
  @pytest.mark.slow
  @pytest.mark.parametrize("stop", [4, 6, 17])
  def test_inside_and_between_rounds_is_bit_identical(self, tmp_path, stop):
    run = everything()
    want = finished()
    calls = iter(range(stop - 1))
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      part = trainer.fit(
        run, checkpoints=saves, stop=lambda: next(calls, None) is None
      )
    assert not part.finished and part.progress.step == stop
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      rest = trainer.fit(run, checkpoints=saves, resume=True)
    assert rest.progress.history == want.progress.history
    assert same(rest.state, want.state)

  def test_another_number_of_subnets_is_refused(self, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as saves:
      saves.save(1, run_lib.start(build(2)), {})
    with checkpoint.Checkpoints(tmp_path) as saves:
      run = build(4)
      saved, _ = saves.restore(run_lib.start(run))
    with pytest.raises(ValueError, match=r"use the saved run's mesh\.subnet"):
      run_lib.refit(run, saved, run_lib.start(run))


@functools.cache
def finished():
  return trainer.fit(everything())


class TestComposition:
  def test_a_stream_of_tasks_whose_heads_train_as_subnets(self):
    found = finished()
    assert found.finished and found.metrics["mesh"] == {
      "data": 2, "head": 2, "stage": 1, "subnet": 2
    }  # fmt: skip
    assert found.metrics["compiles"]["after_first_task"] == 0
    assert found.metrics["exchange"]["every"] == EVERY
    assert found.metrics["memory"]["held"] == 12

  def test_shapes_and_places_stay(self):
    run = everything()
    start, end = run_lib.start(run), finished().state
    for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)

  def test_a_device_holds_its_subnet_and_no_more(self):
    run = build(4)
    bank, rest = (
      run_lib.start(run).bank.bank,
      run_lib.start(run).bank.apart.rest,
    )
    # Wider than long: first layer 4 x 8, hidden 8 x 16, last 16 x 3.
    held = [
      bank.params[layer]["dense"]["kernel"].addressable_shards[0].data.size
      for layer in ("dense0", "dense1", "readout")
    ]
    assert held == [3 * 4 * 8 // 4, 3 * 8 * 16 // 16, 3 * 16 * 3 // 4]
    (home,) = rest.values()
    assert home.addressable_shards[0].data.size == 3 * 8 * 16 // 4


class TestProgress:
  """The host sees heads, not parts: a mean loss, the first bad step of any."""

  LOSS = np.array([[[2.0, 4.0], [10.0, 20.0]]], np.float32)  # [l, h, n]
  BAD = np.array([[[-1, -1], [7, 5]]], np.int32)

  def test_the_loss_of_a_head_is_the_mean_of_its_parts(self):
    note = progress.Recorder(progress.Progress(), lambda *row: None, (0, 1), 2)
    note.step = 2
    note.push(self.LOSS, np.full_like(self.BAD, -1), (0, 1))
    note.flush()
    assert note.progress().history == ((2, 1.5, 7.5),)

  def test_a_bad_part_names_its_head(self):
    note = progress.Recorder(progress.Progress(), print, (0, 1), 2)
    with pytest.raises(progress.NotFinite) as raised:
      note.check(self.BAD)
    assert (raised.value.head, raised.value.step) == (1, 6)


class TestCoverage:
  # Layers of 4 x 8, 8 x 16 and 16 x 3, scale and shift of each hidden unit.
  WEIGHTS = 32 + 128 + 48 + 2 * (8 + 16)

  def test_counts_pairs_that_have_met(self):
    _, partition = parts(2)
    order = {k: np.arange(v).reshape(2, -1) for k, v in partition.units.items()}
    # Half of the weights between hidden layers were never trained.
    share = partitions.coverage(partition, [order], self.WEIGHTS)
    assert share == 1 - 64 / self.WEIGHTS
    other = order | {"dense0": order["dense0"][::-1]}
    share = partitions.coverage(partition, [order, other], self.WEIGHTS)
    assert share == 1.0

  def test_its_weights_are_all_of_the_branch_and_of_a_copy(self):
    params = jax.eval_shape(parts(2)[0].init, jax.random.key(0))[0]
    assert networks.count_parameters(params) == self.WEIGHTS
    _, copies = parts(2, "local_sgd")
    assert partitions.coverage(copies, [{}], self.WEIGHTS) == 1.0


class TestBadInput:
  def refused(self, word, function, *arguments, **how):
    with pytest.raises(ValueError) as raised:
      function(*arguments, **how)
    message = str(raised.value)
    assert word in message and "use" in message and "\n" not in message

  def test_widths_that_do_not_divide(self):
    self.refused("network.widths=(8, 9)", subnets.neurons, (8, 9), 4)

  def test_nothing_to_cut(self):
    self.refused("nothing to cut", subnets.neurons, (), 2)

  def test_no_local_step(self):
    cut, part = cutting.copies(2), objectives.end_to_end(branch_of(HIDDEN))
    self.refused("subnets.local_steps=0", subnets.partition, cut, part, every=0)

  def test_an_unknown_method_or_statistic(self):
    cut, part = cutting.copies(2), objectives.end_to_end(branch_of(HIDDEN))
    how = {"every": 2, "method": "gossip"}
    self.refused("subnets.method=", subnets.partition, cut, part, **how)
    given = part, branch_of(HIDDEN), "guessed"
    self.refused("subnets.statistics=", subnets.tested, *given)

  def test_a_mesh_of_another_size(self):
    _, partition = parts(2)
    mesh, none = sharding.make_mesh(subnet=4), transforms.none(6)
    args = mesh, RECIPE, none, partition
    self.refused("mesh.subnet=4", prepare.check_parts, *args)

  @pytest.mark.parametrize("field", ["train.batch", "memory.draws"])
  def test_samples_that_do_not_divide(self, field):
    _, partition = parts(4)
    mesh, none = sharding.make_mesh(subnet=4), transforms.none(6)
    batch = 10 if field == "train.batch" else 8
    transform = none._replace(added=0 if field == "train.batch" else 6)
    recipe = RECIPE._replace(batch=batch)
    args = mesh, recipe, transform, partition
    self.refused(f"{field}=", prepare.check_parts, *args)

  def test_an_objective_with_a_state_that_cannot_be_cut(self):
    objective, partition = parts(2)
    odd = objective._replace(
      init=lambda key: (*objective.init(key)[:2], {"x": jnp.zeros(3)})
    )
    split = partition.split(odd, optimizers.sgd())
    self.refused("mesh.subnet=2", split, jax.random.key(0))
