"""Local learning: isolation, reductions, memory, streams, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build
from mhil import config as config_lib
from mhil import (
  cuts,
  local,
  losses,
  modules,
  networks,
  objectives,
  optimizers,
  prepare,
  rehearsal,
)
from mhil import (
  run as run_lib,
)
from tests import tiny

KEY = jax.random.key(0)


def cross_entropy(label):
  def criterion(logits):
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, label[:, None], 1)[:, 0]

  return criterion


def batch_of(images, labels):
  b = len(labels)
  return objectives.Batch(
    jnp.asarray(images),
    jnp.zeros(b, int),
    jnp.asarray(labels),
    jnp.full(b, 1 / b, jnp.float32),
  )


def each_loss(cut, batch, criterion):
  """`(params, stats) -> (losses [K], (logits, stats))`."""

  def run(params, stats):
    x, out = local.Flow(batch.images, {}), []
    for j in range(len(cut.modules)):
      common = cut, [j], batch, criterion
      loss, (x, stats) = local.advance(params, stats, x, *common)
      out.append(loss)
    return jnp.stack(out), (x.out, stats)

  return run


def step(cut, batch, criterion):
  """`(params, stats) -> Step`."""

  def run(params, stats):
    method = local.local(cut)
    return method.step(params, stats, {}, batch, criterion, KEY)

  return run


def quick(function, *arguments):
  """Compiled without optimisation, which takes a fraction of the time."""
  lowered = jax.jit(function).lower(*arguments)
  return lowered.compile({"xla_backend_optimization_level": 0})


# -- a small branch ----------------------------------------------------------

SHAPE, CLASSES = (8, 8, 2), 3
CUTS = ("stem", "stage1.block0", "stage2.block0")


@functools.cache
def small(norm="batch", **options):
  """Stem and four blocks, with 4, 4 and 8 features."""
  return networks.resnet_cifar(14, CLASSES + 1, (4, 4, 8), norm, 2, **options)


@functools.cache
def small_batch(b=6):
  rng = np.random.default_rng(0)
  images = rng.standard_normal((b, *SHAPE)).astype(np.float32)
  return batch_of(images, np.arange(b) % (CLASSES + 1))


@functools.cache
def start(cut):
  params, stats, _ = quick(local.local(cut).init, KEY)(KEY)
  return params, stats


@functools.cache
def small_step(cut):
  batch = small_batch()
  take = step(cut, batch, cross_entropy(batch.columns))
  return quick(take, *start(cut))(*start(cut))


@functools.cache
def small_cut(mode, isolated=True):
  method = METHODS[mode]._replace(isolated=isolated)
  return modules.split(small(), SHAPE, CUTS, method)


METHODS = {
  "R0": modules.GREEDY,
  "E": modules.DGL._replace(mode="E"),
  "R1": modules.DGL._replace(mode="R1"),
  "R2": modules.DGL._replace(mode="R2"),
  "R4": modules.Method("R4", "2c2f"),
  "R1E": modules.Method(
    "R1E",
    "1c3f",
    loss="contrast",
    restore=(1, 1),
    pixels=((0.5,), (0.25,)),
    hidden=16,
  ),
}
# What stands at interfaces 0, 1 and 2.
NETS = {
  "R0": ([], [], []),
  "E": (["enc"], ["enc"], ["enc"]),
  "R1": (["0"], ["0"], ["0"]),
  "R2": (["0"], ["0", "1"], ["0", "1"]),
  "R4": (["0"], ["0", "1"], ["0", "1", "2"]),
  "R1E": (["enc"], ["enc", "0"], ["enc", "0"]),
}


def encoders(mode, j):
  return {
    f"enc{j}" if name == "enc" else f"resenc{j}_{name}"
    for name in NETS[mode][j]
  }


@pytest.mark.parametrize("mode", METHODS)
def test_nothing_unused_is_created(mode):
  cut = small_cut(mode)
  want = {f"aux{j}" for j in range(3)}
  want = want.union(*(encoders(mode, j) for j in range(3)))
  if any(METHODS[mode].restore):
    want |= {f"decoder{j}" for j in range(3)}
  params, stats, _ = jax.eval_shape(local.local(cut).init, KEY)
  assert set(cut.nets.names) == want
  assert set(params) == set(stats) == want | set(small().pieces)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["R0", "R4", "R1E"])
def test_a_loss_moves_its_module_and_the_encoders_before_it(mode):
  cut = small_cut(mode)
  batch = small_batch()
  run = each_loss(cut, batch, cross_entropy(batch.columns))
  jacobian, _ = quick(jax.jacrev(run, has_aux=True), *start(cut))(*start(cut))
  grads = small_step(cut).grads
  for i in range(4):
    own = {*cut.modules[i], f"aux{i}", f"decoder{i}"}
    own |= encoders(mode, i - 1) if i else set()
    own |= {"readout"} if i == 3 else set()
    for name, part in jacobian.items():
      moved = any(np.any(leaf[i]) for leaf in jax.tree.leaves(part))
      assert moved == (name in own), (i, name)
      if name in own:  # The step takes the same gradient, module by module.
        for one, other in zip(
          jax.tree.leaves(part), jax.tree.leaves(grads[name])
        ):
          # Another order of the same float32 sums; those for a bias before
          # a normalisation are 0 up to rounding.
          np.testing.assert_allclose(one[i], other, rtol=1e-4, atol=1e-5)
  assert set(grads) == set(jacobian)


@pytest.mark.slow
def test_the_control_is_not_isolated():
  cut, isolated = small_cut("R1E", isolated=False), small_cut("R1E")
  own = set(small().pieces).union(*(encoders("R1E", j) for j in range(3)))
  grads = small_step(cut).grads
  assert set(grads) == own
  assert modules.used(cut, grads) == grads
  for name, grad in grads.items():
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grad)), name
  # The same network computes the same; only its training differs.
  params, stats = start(isolated)
  used = modules.used(isolated, params)
  x = small_batch().images
  jax.tree.map(np.testing.assert_array_equal, used, start(cut)[0])
  np.testing.assert_array_equal(
    quick(local.local(cut).predict, used, stats, x)(used, stats, x),
    quick(local.local(isolated).predict, params, stats, x)(params, stats, x),
  )


@pytest.mark.parametrize("where, isolated", [((), True), (["stem"], False)])
def test_one_module_is_end_to_end_bit_for_bit(where, isolated):
  branch = networks.resnet_cifar(8, CLASSES + 1, (4, 4), channels=2)
  method = modules.Method(isolated=isolated)
  batch = small_batch()

  def step_of(objective):
    params, stats, side = quick(objective.init, KEY)(KEY)

    @jax.jit
    def step(params, stats):
      criterion = cross_entropy(batch.columns)
      return (
        objective.step(params, stats, side, batch, criterion, KEY),
        objective.predict(params, stats, batch.images),
        objective.features(params, stats, batch.images),
      )

    return params, step(params, stats)

  cut = modules.split(branch, SHAPE, where, method)
  got, want = map(step_of, (local.local(cut), objectives.end_to_end(branch)))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_greedy_learning_is_each_module_under_a_linear_readout():
  cut, total = small_cut("R0"), 0.0
  taken = small_step(cut)
  grads = taken.grads
  params, stats = start(cut)
  batch = small_batch()
  x = batch.images
  for j, module in enumerate(cut.modules):
    reader = {"aux": params[f"aux{j}"]["dense1"]} if j < 3 else {}
    own = {name: params[name] for name in module}
    own |= reader or {"aux": params["readout"]["dense"]}

    def run(own, x, module=module):
      for name in module:
        x, _ = small().piece(name, own[name], stats[name], x, True)
      logits = x.mean((1, 2)) @ own["aux"]["kernel"] + own["aux"]["bias"]
      return cross_entropy(batch.columns)(logits).mean(), x

    take = jax.value_and_grad(run, has_aux=True)
    (loss, x), grad = quick(take, own, x)(own, x)
    read = grads[f"aux{j}"]["dense1"] if j < 3 else grads["readout"]["dense"]
    got = {name: grads[name] for name in module} | {"aux": read}
    # Another order of the same float32 sums.
    total += loss
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(grad)):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(total, taken.loss, rtol=1e-6)


def test_a_net_starts_alike_in_every_mode():
  one, other = (
    start(modules.split(small(), SHAPE, CUTS, modules.Method(mode)))[0]
    for mode in ("R0", "R1E")
  )
  shared = {name: other[name] for name in one}
  jax.tree.map(np.testing.assert_array_equal, one, shared)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "none"])
def test_other_normalisations_and_dtypes(norm):
  branch = networks.convnet(SHAPE, 4, (4, 6, 6), norm, dtype=jnp.bfloat16)
  method = METHODS["R1E"]._replace(loss="softmax")
  cut = modules.split(branch, SHAPE, ["conv0", "conv1"], method)
  out = small_step(cut)
  assert jax.tree.structure(out.stats) == jax.tree.structure(start(cut)[1])
  for leaf in jax.tree.leaves(out):
    assert leaf.dtype == jnp.float32
    assert np.all(np.isfinite(leaf))


def temporary(depth, where, method):
  """Bytes that the step of a network with equal blocks needs besides."""
  branch = networks.resnet_cifar(depth, 4, (8, 8, 8))
  where = branch.pieces[:-2] if where == "every" else where
  cut = modules.split(branch, (16, 16, 3), where, method)
  batch = batch_of(np.ones((64, 16, 16, 3), np.float32), np.arange(64) % 4)
  shapes = jax.eval_shape(local.local(cut).init, KEY)[:2]
  take = quick(step(cut, batch, cross_entropy(batch.columns)), *shapes)
  return take.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_that_of_one_module_whatever_the_depth():
  method = modules.Method("R1E", "0c1f")
  short, long = (temporary(depth, "every", method) for depth in (14, 26))
  # Eight more modules; what is allowed are their gradients.
  assert long < 1.1 * short
  control = [temporary(depth, [], modules.DGL) for depth in (14, 26)]
  assert control[1] > 1.5 * control[0]


@pytest.mark.slow
def test_interfaces_are_what_leaves_each_module():
  cut = small_cut("E")
  params, stats = start(cut)
  x = small_batch().images
  found = quick(local.interfaces(cut), params, stats, x)(params, stats, x)
  widths = [module[-1] for module in cut.modules]
  assert len(found) == len(widths) == 4
  assert [y.shape for y in found] == [(6, 4), (6, 4), (6, 8), (6, 8)]
  whole = quick(local.local(cut).features, params, stats, x)(params, stats, x)
  np.testing.assert_allclose(found[-1], whole, rtol=1e-6)


def test_numbers_that_predict_are_counted_by_what_is_read():
  cut = small_cut("E")
  params, stats = start(cut)
  predict, x = local.local(cut).predict, small_batch().images
  used = networks.used_numbers(predict, params, stats, x)
  count = networks.count_parameters
  assert used == count(modules.used(cut, params)) < count(params)


# -- costs, and stages that they balance -------------------------------------


def uneven(widths, classifier="0c1f"):
  branch = networks.mlp(16, 3, widths)
  method = modules.GREEDY._replace(classifier=classifier)
  return modules.split(branch, (4, 4, 1), ["dense0", "dense1"], method)


@pytest.mark.parametrize(
  "widths, costs, first",
  [
    # Products of a layer, then of the classifier or the readout on it.
    ((64, 4, 4), (16 * 64 + 64 * 3, 64 * 4 + 4 * 3, 4 * 4 + 4 * 3), 1),
    ((4, 4, 64), (16 * 4 + 4 * 3, 4 * 4 + 4 * 3, 4 * 64 + 64 * 3), 2),
  ],
)
def test_stages_have_modules_of_about_equal_cost(widths, costs, first):
  cut = uneven(widths)
  assert local.costs(cut, (4, 4, 1)) == costs
  names = ["dense0", "aux0", "dense1", "aux1", "dense2", "readout"]
  one, two = local.stages(cut, (4, 4, 1), 2)
  assert one.names == tuple(names[: 2 * first])
  assert two.names == tuple(names[2 * first :])


def test_a_classifier_counts_to_its_module():
  """It is as dear as what it is behind, so the stages end elsewhere."""
  (first, *_), (dear, *_) = (
    local.costs(uneven((4, 4, 64), kind), (4, 4, 1))
    for kind in ("0c1f", "0c2f")
  )
  # 128 hidden units between the features and the outputs.
  assert dear - first == 4 * 128 + 128 * 3 - 4 * 3
  stages = local.stages(uneven((4, 4, 64), "0c2f"), (4, 4, 1), 2)
  assert stages[0].names == ("dense0", "aux0")


# -- inside the heads of a stream --------------------------------------------


def built(objective, head=1, data=1, loss="dce", **recipe):
  """A run over images of 4x4 pixels, two classes a task."""
  mesh, stream, *_ = tiny.parts(head=head, data=data, memory=tiny.NONE)
  images = tiny.dataset(6, shape=(4, 4, 1))
  memory = rehearsal.transform(
    mesh, images, batch=tiny.RECIPE.batch, **tiny.MEMORY._asdict()
  )
  recipe = tiny.RECIPE._replace(**recipe)
  parts = mesh, stream, images, objective, getattr(losses, loss)(), recipe
  return prepare.build(*parts, 0, memory)


def remembering(run, state):
  """Steps of task 1 with samples of task 0 in the memory, and of no step."""
  memory = tiny.steps(run, run_lib.start(run), 0, 3).memory
  return tiny.steps(run, state._replace(memory=memory), 1, 4)


@functools.cache
def image_branch(norm="group"):
  return networks.convnet((4, 4, 1), 3, (4, 4), norm, axis="data")


@functools.cache
def stream_run(
  k=2,
  head=1,
  data=1,
  train_heads="all",
  how="softmax",
  norm="group",
  loss="dce",
):
  branch = image_branch(norm)
  method = modules.Method("E" if k > 1 else "R0", loss=how, hidden=8)
  cut = modules.split(branch, (4, 4, 1), ["conv0"][: k - 1], method)
  # Adam would move a parameter without gradient by the sign of its rounding.
  recipe = {"optimizer": optimizers.sgd(), "rate": optimizers.constant(0.05)}
  recipe["train_heads"] = train_heads
  return built(local.local(cut), head=head, data=data, loss=loss, **recipe)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("loss", ["dce", "ce"])
def test_one_module_is_end_to_end_in_a_stream(loss, norm):
  one = stream_run(k=1, loss=loss, norm=norm)
  whole = objectives.end_to_end(image_branch(norm))
  plain = built(whole, loss=loss, **one.recipe._asdict())
  # Two heads learn, so that a normaliser over heads has something to join.
  got, want = (remembering(run, run_lib.start(run)) for run in (one, plain))
  jax.tree.map(np.testing.assert_array_equal, got.bank, want.bank)


@pytest.mark.slow
def test_heads_learn_locally_with_dce():
  run = stream_run(head=2)
  state = run_lib.start(run)
  before = jax.tree.map(np.asarray, state.bank.params)
  state = remembering(run, state)
  # Nothing crosses from head to head, whatever the auxiliary loss.
  assert not any("head" in c.axes for c in run.traffic)
  assert np.all(np.asarray(state.bank.bad_step) == -1)
  for name, part in state.bank.params.items():
    now = [np.asarray(leaf) for leaf in jax.tree.leaves(part)]
    pairs = list(zip(jax.tree.leaves(before[name]), now))
    for head in (0, 0), (0, 1):
      assert any(np.any(a[head] != b[head]) for a, b in pairs), name
    assert all(np.all(a[1] == b[1]) for a, b in pairs)  # Still closed.


@pytest.mark.slow
def test_dce_is_the_loss_of_classifier_and_head():
  loss = losses.dce("learned")
  targets = jnp.arange(6) % (CLASSES + 1)
  prior, valid = jnp.zeros(CLASSES + 1), jnp.ones(CLASSES, bool)

  def criterion(logits):
    return loss.value(logits, targets, prior, valid)

  cut = modules.split(small(), SHAPE, CUTS[1:2], modules.GREEDY)
  run = each_loss(cut, small_batch(), criterion)
  first, last = quick(run, *start(cut))(*start(cut))[0]
  params, stats = start(cut)
  x = small_batch().images
  for name in cut.modules[0]:
    x, _ = small().piece(name, params[name], stats[name], x, True)
  dense = params["aux0"]["dense1"]
  logits = x.mean((1, 2)) @ dense["kernel"] + dense["bias"]
  np.testing.assert_allclose(first, criterion(logits).mean(), rtol=1e-5)
  logits, _ = small().apply(params, stats, small_batch().images, True)
  np.testing.assert_allclose(last, criterion(logits).mean(), rtol=1e-5)


@pytest.mark.slow
def test_old_heads_move_their_readout_only():
  run = stream_run(train_heads="readout")
  state = run_lib.start(run)
  before = jax.tree.map(np.asarray, state.bank.params)
  state = remembering(run, state)
  for name, part in state.bank.params.items():
    now = [np.asarray(leaf) for leaf in jax.tree.leaves(part)]
    pairs = list(zip(jax.tree.leaves(before[name]), now))
    assert any(np.any(a[1] != b[1]) for a, b in pairs), name
    assert any(np.any(a[0] != b[0]) for a, b in pairs) == (name == "readout")


@pytest.mark.slow
def test_spread_over_data_changes_nothing():
  one, two = (stream_run(data=data, how="contrast") for data in (1, 2))
  got, want = (tiny.steps(run, run_lib.start(run), 0, 3) for run in (two, one))
  for a, b in zip(
    jax.tree.leaves(got.bank.params), jax.tree.leaves(want.bank.params)
  ):
    # Float32 sums over the batch in another order, three times.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# -- bad input ---------------------------------------------------------------

BAD = {
  "cuts='stage4.block0' is not inside resnet10": {"where": ["stage4.block0"]},
  "cuts='readout' is not inside": {"where": ["readout"]},
  "out of order": {"where": ["stage1.block0", "stem"]},
  "repeats": {"where": ["stem", "stem"]},
  "modules=5 has no published list for resnet10": {"where": 5},
  "mode='R3' is not known; use one of R0, E": {"method": modules.Method("R3")},
  "classifier='3c1f' is not known": {"method": modules.Method("R0", "3c1f")},
  "loss='hinge' is not known": {"method": modules.Method(loss="hinge")},
  "mode=R8 asks for more context than 4 modules have; use R0 or E or R1": {
    "method": modules.Method("R8")
  },
  "mode=E asks for more context than 1 modules have; use R0": {
    "where": [],
    "method": modules.Method("E"),
  },
  "leaves module 2 without a loss": {"method": modules.Method(task=(1.0, 0.0))},
  "restore=(0, 2) asks for pixels, and pixels=None does not say": {
    "method": modules.Method(restore=(0, 2))
  },
}


# Modes that K modules can have, by the release or by their own context.
FITTING = {
  1: "R0",
  2: "R0 E R1",
  3: "R0 E R1 R1E R2",
  4: "R0 E R1 R1E R2 R4",
  7: "R0 E R1 R1E R2 R4",
  8: "R0 E R1 R1E R2 R4 R8",
  15: "R0 E R1 R1E R2 R4 R8",
  16: "R0 E R1 R1E R2 R4 R8 R16",
}


@pytest.mark.parametrize("k", FITTING)
def test_a_mode_has_all_the_context_that_it_names(k):
  """R2 in two modules would be R1, and R1E in two would be E."""
  branch, fits = networks.mlp(4, 3, (2,) * k), FITTING[k].split()

  def refusal(mode):
    # A dense branch takes no context, which is found later.
    method = modules.GREEDY._replace(mode=mode)
    try:
      modules.split(branch, (2, 2, 1), branch.pieces[: k - 1], method)
    except ValueError as error:
      return str(error)
    return ""

  for mode in modules.MODES:
    words = f"local.mode={mode} asks for more context than {k} modules have"
    assert refusal(mode).startswith(words) == (mode not in fits)
    if mode not in fits:
      assert refusal(mode).endswith(f"use {' or '.join(fits)}")


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_in_one_line(message):
  given = {"where": CUTS, "method": modules.DGL} | BAD[message]
  with pytest.raises(ValueError) as raised:
    modules.split(small(), SHAPE, given["where"], given["method"])
  text = str(raised.value)
  assert message in text and text.startswith("local.")
  assert "use" in text and "\n" not in text


def test_what_restores_nothing_needs_no_pixels():
  for method in (
    modules.DGL,
    modules.Method(restore=(1, 1), isolated=False),
  ):
    assert modules.split(small(), SHAPE, CUTS, method).method.pixels is None


@pytest.mark.parametrize(
  "method",
  [
    modules.DGL,
    modules.Method("E", "0c1f"),
    modules.GREEDY._replace(restore=(1, 1), pixels=((0.0,), (1.0,))),
  ],
)
def test_dense_interfaces_need_a_dense_method(method):
  branch = networks.mlp(4, 3, (6, 5))
  with pytest.raises(ValueError, match="needs feature maps, and mlp has none"):
    modules.split(branch, (2, 2, 1), ["dense0"], method)
  cut = modules.split(branch, (2, 2, 1), ["dense0"], modules.GREEDY)
  assert cut.nets.names == ("aux0",)


# -- from a configuration ----------------------------------------------------


def configured(**changes):
  """The split of a ResNet-32 that a configuration asks for."""
  config = config_lib.Config()
  changes = {"network.name": "resnet32", "network.norm": "batch"} | changes
  for field, value in changes.items():
    config_lib.assign(config, field, value)
  dataset = tiny.dataset(4, shape=(8, 8, 3))
  branch = build.make_branch(config.network, dataset, 5)
  return build.make_split(config.local, branch, dataset), dataset


def test_a_configuration_becomes_a_split():
  cut, dataset = configured(
    **{
      "local.modules": 4,
      "local.lists": "balanced",
      "local.mode": "R1E",
      "local.classifier": "2c2f",
      "local.loss": "contrast",
      "local.restore_first": 6,
      "local.restore_last": 1.0,
      "local.task_first": 0,
    }
  )
  assert [module[-1] for module in cut.modules[:-1]] == [
    *cuts.published("resnet32", 4, balanced=True)
  ]
  assert cut.weights == ((6.0, 0.0), (3.5, 0.5), (1.0, 1.0))
  assert cut.method == modules.Method(
    mode="R1E",
    classifier="2c2f",
    loss="contrast",
    restore=(6.0, 1.0),
    task=(0.0, 1.0),
    pixels=(dataset.mean, dataset.std),
  )
  assert cut.branch.numerics.axis == "data"


def test_cuts_by_number_and_the_control():
  cut, _ = configured(**{"local.cuts": (0, 9), "local.isolated": False})
  assert [module[-1] for module in cut.modules[:-1]] == [
    "stem",
    "stage2.block3",
  ]
  assert cut.method == modules.Method(isolated=False, pixels=cut.method.pixels)


@pytest.mark.parametrize("number", [-1, 16])
def test_a_number_outside_the_network_is_named(number):
  with pytest.raises(
    ValueError, match=r"is not inside resnet32; use .* 0 to 15"
  ):
    configured(**{"local.cuts": (1, number)})
