"""Branches against hand counts, golden numbers and XLA's own gradients."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax

from mhil import convolution, layers, networks
from tests.golden_fill import (
  by_name,
  distance,
  fill,
  images,
  load,
  values,
)

KEY = jax.random.key(0)
NAMES = ("NHWC", "HWIO", "NHWC")


@functools.cache
def initial(branch):
  return branch.init(KEY)


@functools.cache
def run(branch):
  return jax.jit(branch.apply, static_argnums=3)


def normal(seed, *shape, dtype=jnp.float32):
  draw = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(draw, dtype)


@functools.cache
def small(kind, **options):
  if kind == "mlp":
    norm = options.pop("norm", "layer")
    return networks.mlp(48, 4, (16, 8), norm, **options), (6, 4, 4, 3)
  if kind == "convnet":
    branch = networks.convnet((9, 8, 3), 4, (8, 16), **options)
    return branch, (6, 9, 8, 3)
  branch = networks.resnet_cifar(8, 4, (4, 4, 8), **options)
  return branch, (6, 8, 8, 3)


# -- the convolution ---------------------------------------------------------


def reference(x, w, stride, padding):
  return lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=NAMES,
    precision="highest",
  )


def gradients(conv, x, w, stride, padding):
  def loss(x, w):
    y = conv(x, w, stride, padding)
    # A weight per pixel, so that no two output gradients are equal.
    return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y)

  return jax.grad(loss, (0, 1))(x, w)


@pytest.mark.parametrize(
  "k, stride, padding, size",
  [
    (1, 1, 0, (7, 6)),
    (1, 2, 0, (7, 6)),
    (3, 1, 1, (7, 6)),
    (3, 2, 1, (7, 6)),
    (3, 2, 1, (8, 8)),
    (3, 2, 0, (8, 7)),
    (3, 3, 1, (8, 7)),
    (2, 1, 0, (5, 5)),
    (5, 2, 2, (9, 4)),
  ],
)
def test_conv_gradient_is_xlas(k, stride, padding, size):
  x, w = normal(0, 2, *size, 3), normal(1, k, k, 3, 4)

  @jax.jit
  def compare(x, w):
    return [
      gradients(conv, x, w, stride, padding)
      for conv in (convolution.conv, reference)
    ]

  got, want = compare(x, w)
  for one, other in zip(got, want, strict=True):
    assert one.shape == other.shape
    # Sums of about a hundred float32 terms in another order.
    assert distance(one, other) < 2e-6


def test_conv_gradient_in_bfloat16():
  x, w = (normal(0, 2, 6, 6, 3), normal(1, 3, 3, 3, 4))
  low = [a.astype(jnp.bfloat16) for a in (x, w)]
  high = [a.astype(jnp.float32) for a in low]
  got, want = jax.jit(
    lambda low, high: (
      gradients(convolution.conv, *low, 2, 1),
      gradients(reference, *high, 2, 1),
    )
  )(low, high)
  for one, other in zip(got, want, strict=True):
    assert one.dtype == jnp.bfloat16
    # The output gradient and the result are each rounded to 8 bits.
    assert distance(one.astype(jnp.float32), other) < 2**-6


def stacked(conv, w, x):
  return jax.grad(
    lambda w: sum(jnp.sum(jnp.tanh(conv(x, v, 1, 1))) for v in w)
  )(w)


def under_scan(conv, w, x):
  def step(total, v):
    return total + jnp.sum(jnp.tanh(conv(x, v, 1, 1))), None

  return jax.grad(lambda w: lax.scan(step, 0.0, w)[0])(w)


def under_vmap(conv, w, x):
  def one(v):
    return jax.grad(lambda v: jnp.sum(jnp.tanh(conv(x, v, 1, 1))))(v)

  return jax.vmap(one)(w)


def under_while(conv, w, x):
  def body(carry):
    i, dw = carry
    one = jax.grad(lambda v: jnp.sum(jnp.tanh(conv(x, v, 1, 1))))(w[i])
    return i + 1, dw.at[i].set(one)

  start = (0, jnp.zeros_like(w))
  return lax.while_loop(lambda carry: carry[0] < len(w), body, start)[1]


@pytest.mark.parametrize("how", [under_scan, under_vmap, under_while])
def test_conv_gradient_inside_control_flow(how):
  x, w = normal(0, 2, 6, 5, 3), normal(1, 3, 3, 3, 3, 4)
  got = jax.jit(lambda w: how(convolution.conv, w, x))(w)
  # Sums of sixty float32 terms in another order.
  want = jax.jit(lambda w: stacked(reference, w, x))(w)
  assert distance(got, want) < 2e-6


def test_conv_gradient_in_shard_map_sums_over_shared_axes():
  mesh = jax.make_mesh((2, 2), ("data", "head"))
  x, w = normal(0, 4, 6, 6, 3), normal(1, 2, 3, 3, 3, 4)

  def grads(w, x):  # One kernel a head, shared by the devices along data.
    def loss(v, x):
      return jnp.sum(jnp.tanh(convolution.conv(x, v, 2, 1)))

    dw, dx = jax.grad(loss, (0, 1))(w[0], x)
    return dw[None], dx

  mapped = jax.shard_map(
    grads,
    mesh=mesh,
    in_specs=(P("head"), P("data")),
    out_specs=(P("head"), P("data")),
  )
  place = [jax.NamedSharding(mesh, P(name)) for name in ("head", "data")]
  dw, dx = jax.jit(mapped)(*jax.device_put((w, x), tuple(place)))

  def loss(w, x):
    return sum(jnp.sum(jnp.tanh(reference(x, v, 2, 1))) for v in w)

  # Sums of a few hundred float32 terms in another order.
  want = jax.jit(jax.grad(loss, (0, 1)))(w, x)
  assert distance(dw, want[0]) < 2e-6
  assert distance(dx, want[1]) < 2e-6


def test_every_convolution_of_the_gradient_has_the_fast_layout():
  x, w = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 4)
  fast = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"

  def layouts(conv):
    text = jax.jit(lambda x, w: gradients(conv, jnp.tanh(x), w, 2, 1)).lower(
      x, w
    )
    lines = text.as_text().splitlines()
    return [fast in line for line in lines if "dim_numbers =" in line]

  assert layouts(convolution.conv)
  assert all(layouts(convolution.conv))
  assert not all(layouts(reference))  # The control: XLA's own is not.


# -- branches ----------------------------------------------------------------


@pytest.mark.parametrize(
  "branch, count",
  [
    (networks.resnet_cifar(20, 10), 272_474),
    (networks.resnet_cifar(32, 10), 466_906),
    (networks.resnet_cifar(110, 10), 1_730_714),
    (networks.resnet18(10), 11_173_962),
    # torchvision's ResNet-18: 11,689,512 with 1000 outputs.
    (networks.resnet18(1000, stem=7), 11_689_512),
    # 9 d f + 2 f for a layer, and 128 x 11 + 11.
    (networks.convnet((32, 32, 3), 11), 928 + 18_560 + 73_984 + 1_419),
    (networks.mlp(64, 11, (32, 16)), 65 * 32 + 33 * 16 + 17 * 11),
    (networks.mlp(64, 11, (32,), "batch"), 64 * 32 + 64 + 33 * 11),
    (networks.mlp(64, 11, ()), 65 * 11),
  ],
)
def test_parameter_counts(branch, count):
  params, stats = jax.eval_shape(branch.init, KEY)
  assert networks.count_parameters(params) == count
  # A pytree sorts its keys; the order is in `pieces`.
  assert set(params) == set(stats) == set(branch.pieces)


def test_multiply_adds_are_the_published_ones():
  golden = load("contsup_counts")
  column = list(golden["table_columns"]).index
  for depth in (32, 110):
    branch = networks.resnet_cifar(depth, 10)
    arguments = (
      *jax.eval_shape(branch.init, KEY),
      jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    evaluate = functools.partial(branch.apply, train=False)
    got = networks.multiply_adds(evaluate, *arguments)
    rows = golden["table"][golden["mode"] == "R0"]
    row = rows[rows[:, column("layers")] == depth][0]
    assert got == row[column("macs_inference")]


def test_multiply_adds_of_a_loop():
  def loop(x, w):
    return lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]

  got = networks.multiply_adds(loop, jnp.ones((2, 4)), jnp.ones((4, 4)))
  assert got == 3 * 2 * 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, train",
  [("mlp", True), ("convnet", True), ("resnet", True), ("resnet", False)],
)
def test_chain_of_pieces_is_apply(kind, train):
  branch, shape = small(kind)
  params, stats = initial(branch)
  image = normal(1, *shape)

  @jax.jit
  def chain(params, stats, x):
    moved = {}
    for name in branch.pieces:
      assert kind == "mlp" or x.ndim == 4  # Interfaces are not pooled.
      x, moved[name] = branch.piece(name, params[name], stats[name], x, train)
    return x, moved

  x, moved = chain(params, stats, image)
  logits, want = run(branch)(params, stats, image, train)
  np.testing.assert_array_equal(x, logits)
  jax.tree.map(np.testing.assert_array_equal, moved, want)


@pytest.mark.slow
def test_readout_of_features_is_apply():
  branch, shape = small("resnet")
  params, stats = initial(branch)

  @jax.jit
  def two_steps(params, stats, x):
    features, moved = branch.features(params, stats, x, True)
    assert features.shape == (shape[0], 8)
    assert features.dtype == jnp.float32
    return branch.readout(params, features), moved

  image = normal(1, *shape)
  got = two_steps(params, stats, image)
  want = run(branch)(params, stats, image, True)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_vmapped_init_is_init():
  branch, _ = small("convnet")
  keys = jax.random.split(KEY, 2)
  together = jax.jit(jax.vmap(branch.init))(keys)
  for i, key in enumerate(keys):
    entry = jax.tree.map(operator.itemgetter(i), together)
    jax.tree.map(np.testing.assert_array_equal, branch.init(key), entry)


def test_pieces_start_apart_and_with_the_right_spread():
  params, _ = initial(networks.resnet_cifar(14, 10, (4, 4, 8, 64)))
  one, two = (params["stage3.block1"][f"conv{i}"]["kernel"] for i in (1, 2))
  assert np.abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.02
  # 36,864 draws estimate a spread to 0.4 % at one sigma.
  np.testing.assert_allclose(one.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_statistics_move_only_in_training(norm):
  branch, shape = small("resnet", norm=norm)
  params, stats = initial(branch)
  x = normal(1, *shape)
  _, same = run(branch)(params, stats, x, False)
  jax.tree.map(np.testing.assert_array_equal, same, stats)
  _, moved = run(branch)(params, stats, x, True)
  assert jax.tree.structure(moved) == jax.tree.structure(stats)
  leaves = list(zip(jax.tree.leaves(stats), jax.tree.leaves(moved)))
  assert bool(leaves) == (norm == "batch")
  assert all(np.any(one != other) for one, other in leaves)


@pytest.mark.slow
def test_group_norm_ignores_the_rest_of_the_batch():
  branch, shape = small("convnet", norm="group")
  params, stats = initial(branch)
  x = 5 * normal(1, *shape) + 3
  logits, _ = run(branch)(params, stats, x, True)
  alone, _ = run(branch)(params, stats, x[:1], True)
  # The same sums; convolutions may block them differently by batch size.
  np.testing.assert_allclose(logits[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features, groups", [(16, 8), (12, 6), (11, 1)])
def test_group_norm_normalises_each_group(features, groups):
  norm = layers.make_norm(features, layers.Numerics("group"))
  x = 4 * normal(0, 3, 5, 5, features) + 7
  y = np.asarray(jax.jit(lambda x: norm(x, True))(x)).reshape(3, 25, groups, -1)
  # Means of at least 25 float32 values of order 1, and eps beside 16.
  np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(y.std((1, 3)), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_bfloat16_keeps_float32_where_it_matters(kind):
  branch, shape = small(kind)
  low, _ = small(kind, dtype=jnp.bfloat16)
  params, stats = initial(low)
  jax.tree.map(np.testing.assert_array_equal, params, initial(branch)[0])
  x = normal(1, *shape)
  name = low.pieces[0]
  first, _ = jax.eval_shape(
    lambda x: low.piece(name, params[name], stats[name], x, True), x
  )
  assert first.dtype == jnp.bfloat16

  def loss(params):
    logits, moved = low.apply(params, stats, x, True)
    return jnp.sum(logits**2), (logits, moved)

  grads, (logits, moved) = jax.jit(jax.grad(loss, has_aux=True))(params)
  want, _ = run(branch)(params, stats, x, True)
  # About ten roundings to 8 bits, each relative to its layer's values.
  assert distance(logits, want) < 0.05
  for tree in (params, moved, grads, logits):
    for leaf in jax.tree.leaves(tree):
      assert leaf.dtype == jnp.float32
      assert np.all(np.isfinite(leaf))


@pytest.mark.slow
def test_batch_norm_shares_statistics_over_the_data_axis():
  alone, shape = small("resnet")
  branch, _ = small("resnet", axis="data")
  params, stats = initial(alone)
  x = normal(1, *shape) * jnp.arange(1.0, 7)[:, None, None, None]
  weights = normal(2, 6, 4)

  def step(branch, params, x, weights):
    def loss(params):
      logits, moved = branch.apply(params, stats, x, True)
      return jnp.sum(weights * logits), moved

    return jax.grad(loss, has_aux=True)(params)

  mesh = jax.make_mesh((2,), ("data",))
  mapped = jax.shard_map(
    lambda *arguments: step(branch, *arguments),
    mesh=mesh,
    in_specs=(P(), P("data"), P("data")),
    out_specs=P(),
  )
  places = [jax.NamedSharding(mesh, spec) for spec in (P(), P("data"))]
  x_, weights_ = jax.device_put((x, weights), places[1])
  got = jax.jit(mapped)(jax.device_put(params, places[0]), x_, weights_)
  want = jax.jit(lambda *arguments: step(alone, *arguments))(params, x, weights)
  # Float32 sums over the batch in another order, through eight layers.
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "build, message",
  [
    (lambda: networks.mlp(4, 2, norm="bath"), "norm='bath'"),
    (lambda: networks.resnet_cifar(33, 10), "depth=33"),
    (lambda: networks.convnet((4, 4, 1), 2), "fewer widths"),
  ],
)
def test_errors_name_the_argument(build, message):
  with pytest.raises(ValueError, match=message):
    build()


# -- golden numbers ----------------------------------------------------------


def test_fill_formula():
  golden = load("fill_check")
  shapes = [(3, 3, 3, 16), (3, 3, 64, 64), (12,), (10,)]
  for name, shape in zip(golden["names"], shapes, strict=True):
    got = values(str(name), shape).ravel()
    np.testing.assert_array_equal(got[:8], golden[f"value_first8/{name}"])
    np.testing.assert_array_equal(got[-1], golden[f"value_last/{name}"])


STRIDES = {16: 2, 32: 2, 64: 1}  # Of an auxiliary head, by its input's width.


def auxiliary_params(width):
  wide = 32 if width == 16 else 64
  shapes = {
    "conv": {"kernel": (3, 3, width, wide)},
    "bn": {"scale": (wide,), "bias": (wide,)},
    "dense1": {"kernel": (wide, 128), "bias": (128,)},
    "dense2": {"kernel": (128, 10), "bias": (10,)},
  }
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def auxiliary(params, x):
  kernel = params["conv"]["kernel"]
  x = convolution.conv(x, kernel, STRIDES[x.shape[-1]], 1)
  x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)
  x = jax.nn.relu(x * params["bn"]["scale"] + params["bn"]["bias"])
  dense = params["dense1"]
  x = jax.nn.relu(x.mean((1, 2)) @ dense["kernel"] + dense["bias"])
  return x @ params["dense2"]["kernel"] + params["dense2"]["bias"]


def cross_entropy(logits, label):
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1)
  return -picked.mean()


@pytest.fixture(scope="module")
def golden_run():
  """Returns the golden file and what the same run gives here."""
  golden = load("contsup_r32_k4_R0_fill")
  branch = networks.resnet_cifar(32, 10)
  shapes, _ = jax.eval_shape(branch.init, KEY)
  stats = jax.jit(lambda: branch.init(KEY)[1])()
  params = fill(shapes)
  heads = [
    fill(auxiliary_params(width), f"aux{j}.")
    for j, width in enumerate((16, 32, 64))
  ]
  x, label = images(golden), golden["label"]
  cuts = [f"stage{stage}.block{block}" for stage, block in golden["cuts"]]

  def loss(params, heads):
    y, moved, losses = x, {}, []
    for name in branch.pieces:
      y, moved[name] = branch.piece(name, params[name], stats[name], y, True)
      if name in cuts:
        logits = auxiliary(heads[len(losses)], y)
        losses.append(cross_entropy(logits, label))
        y = lax.stop_gradient(y)
    losses.append(cross_entropy(y, label))
    return sum(losses), (jnp.stack(losses), y, moved)

  grads, (losses, logits, moved) = jax.jit(
    jax.grad(loss, (0, 1), has_aux=True)
  )(params, heads)
  evaluate = jax.jit(lambda stats: branch.apply(params, stats, x, False)[0])
  names = by_name(grads[0])
  for j, grad in enumerate(grads[1]):
    names |= by_name(grad, f"aux{j}.")
  return golden, {
    "grads": names,
    "local_losses": losses,
    "train_logits": logits,
    "eval_logits_init_stats": evaluate(stats),
    "eval_logits_after_pass": evaluate(moved),
    "stats": by_name(moved),
    "params": by_name(params),
  }


@pytest.mark.parametrize(
  "name",
  [
    "local_losses",
    "train_logits",
    "eval_logits_init_stats",
    "eval_logits_after_pass",
  ],
)
def test_golden_losses_and_logits(golden_run, name):
  golden, got = golden_run
  # Float32 against float64 differs by 1e-6 in the file's own framework.
  assert distance(got[name], golden[name]) < 1e-5


def test_golden_parameters(golden_run):
  golden, got = golden_run
  for i, name in enumerate(golden["param_names"]):
    if name in got["params"]:
      array = got["params"][name].astype(np.float64)
      # The sums are stored in float32.
      np.testing.assert_allclose(
        np.linalg.norm(array), golden["param_l2"][i], rtol=1e-6
      )
  assert set(got["params"]) <= set(golden["param_names"])


def test_golden_statistics(golden_run):
  golden, got = golden_run
  stored = [name for name in golden if name.startswith("stat_")]
  checked = 0
  for key in stored:
    kind, name = key.removeprefix("stat_").split("/")
    if not name.startswith("aux"):
      # Sums of 4 x 8 x 8 to 4 x 32 x 32 float32 values.
      assert distance(got["stats"][f"{name}.{kind}"], golden[key]) < 1e-5
      checked += 1
  assert checked == 8


def test_golden_gradients(golden_run):
  golden, got = golden_run
  # What one ReLU input next to zero can move, from the file.
  tolerance = max(1e-4, 5 * float(golden["kink_sensitivity"]))
  assert set(got["grads"]) == set(golden["param_names"])
  for name in golden["picked_names"]:
    grad, want = got["grads"][name], golden[f"grad/{name}"]
    assert distance(grad[..., : want.shape[-1]], want) < tolerance, name
  for i, name in enumerate(golden["param_names"]):
    norm = np.linalg.norm(got["grads"][name].astype(np.float64))
    np.testing.assert_allclose(
      norm, golden["grad_l2"][i], rtol=tolerance, err_msg=name
    )
