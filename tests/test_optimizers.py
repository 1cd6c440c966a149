import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import bank, checkpoint, networks, optimizers, trainer
from mhil import run as run_lib
from tests import tiny

# Float32 against float64 over 20 steps: each rounds at 6e-8.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def at(rate, step, steps):
  """The rate as a compiled step sees it; `step` may be an array."""
  steps = np.int32(steps)
  return np.asarray(jax.jit(rate)(np.asarray(step, np.int32), steps))


def rates(step, steps=20):
  """A schedule that changes mid-way."""
  return 0.1 if step < steps // 2 else 0.01


def tree(seed):
  rng = np.random.default_rng(seed)
  shapes = {"kernel": (3, 2), "bias": (2,), "scale": (2,)}
  return {"layer": {k: rng.normal(size=shape) for k, shape in shapes.items()}}


def norm(tree):
  return math.sqrt(sum(float(np.sum(x**2)) for x in jax.tree.leaves(tree)))


def trained(optimizer, count=20):
  """Parameters after the steps, moved as a head is."""

  @jax.jit
  def step(params, state, grads, scale):
    changes, state = optimizer.update(grads, state, params)
    return jax.tree.map(lambda p, u: p - scale * u, params, changes), state

  params = jax.tree.map(jnp.float32, tree(0))
  state = optimizer.init(params)
  for i in range(count):
    grads = jax.tree.map(jnp.float32, tree(i + 1))
    params, state = step(params, state, grads, rates(i))
  return params["layer"]


def by_hand(
  name, *, momentum, decay, nesterov, inside=False, clip=math.inf, count=20
):
  """SGD as PyTorch documents it, in float64; `inside` is the other way."""
  p, v = tree(0)["layer"][name], 0.0
  for i in range(count):
    g = tree(i + 1)["layer"]
    g = g[name] * min(1, clip / norm(g)) + decay * p
    v = momentum * v + (rates(i) * g if inside else g)
    update = g + momentum * v if nesterov else v
    p = p - (update if inside else rates(i) * update)
  return p


class TestSgd:
  @pytest.mark.parametrize("nesterov", [False, True])
  @pytest.mark.parametrize("decay", [0.0, 0.05])
  def test_follows_the_torch_convention(self, nesterov, decay):
    got = trained(optimizers.sgd(0.9, decay, nesterov))
    for name, value in got.items():
      want = by_hand(name, momentum=0.9, decay=decay, nesterov=nesterov)
      np.testing.assert_allclose(value, want, **FLOAT32)

  def test_other_convention_is_another_path(self):
    """The control: with the rate inside momentum the end differs."""
    options = {"momentum": 0.9, "decay": 0.05, "nesterov": False}
    far = by_hand("kernel", **options, inside=True) - by_hand(
      "kernel", **options
    )
    assert np.abs(far).max() > 0.01

  def test_decay_spares_normalisation_and_biases(self):
    got = trained(optimizers.sgd(0.9, 0.05, decay_norm=False))
    for name, value in got.items():
      decay = 0.05 if name == "kernel" else 0.0
      want = by_hand(name, momentum=0.9, decay=decay, nesterov=False)
      np.testing.assert_allclose(value, want, **FLOAT32)

  def test_clips_before_decay_and_momentum(self):
    # Of the 20 gradients some are longer than 3 and some are not.
    got = trained(optimizers.sgd(0.9, 0.05, clip=3.0))
    for name, value in got.items():
      want = by_hand(name, momentum=0.9, decay=0.05, nesterov=False, clip=3.0)
      np.testing.assert_allclose(value, want, **FLOAT32)

  def test_state_keeps_its_form(self):
    optimizer = optimizers.sgd(0.9, 0.05, True, decay_norm=False, clip=1.0)
    params = jax.tree.map(jnp.float32, tree(0))
    before = optimizer.init(params)
    _, after = optimizer.update(params, before, params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    # Momentum is all there is to save.
    assert len(jax.tree.leaves(after)) == len(jax.tree.leaves(params))

  @pytest.mark.parametrize("nesterov", [False, True])
  def test_without_momentum_there_is_nothing_to_save(self, nesterov):
    optimizer = optimizers.sgd(0.0, 0.05, nesterov, clip=1.0)
    state = optimizer.init(jax.tree.map(jnp.float32, tree(0)))
    assert not jax.tree.leaves(state)
    got = trained(optimizers.sgd(0.0, 0.05, nesterov))
    for name, value in got.items():
      want = by_hand(name, momentum=0.0, decay=0.05, nesterov=False)
      np.testing.assert_allclose(value, want, **FLOAT32)

  def test_a_run_without_optimiser_state_is_saved_and_resumed(self, tmp_path):
    recipe = tiny.RECIPE._replace(optimizer=optimizers.sgd(0.0))
    run = tiny.build(recipe=recipe, memory=tiny.NONE)
    want, steps = trainer.fit(run), iter(range(6))
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      part = trainer.fit(
        run, checkpoints=saves, stop=lambda: next(steps, None) is None
      )
    assert not part.finished
    with checkpoint.Checkpoints(tmp_path, every=2) as saves:
      rest = trainer.fit(run, checkpoints=saves, resume=True)
    assert rest.metrics["params_sha256"] == want.metrics["params_sha256"]


class TestAdam:
  @pytest.mark.parametrize("decay_norm", [False, True])
  def test_decay_is_outside_the_moments(self, decay_norm):
    got = trained(optimizers.adam(0.05, decay_norm=decay_norm), count=1)
    for name, value in got.items():
      p, g = tree(0)["layer"][name], tree(1)["layer"][name]
      decay = 0.05 if decay_norm or name == "kernel" else 0.0
      # The first step of Adam is the sign of the gradient.
      want = p - 0.1 * (np.sign(g) + decay * p)
      np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)

  def test_clip_limits_what_enters(self):
    params = jax.tree.map(jnp.float32, tree(0))
    grads = jax.tree.map(lambda x: 1e3 * x, params)
    optimizer = optimizers.adam(clip=1.0)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    # Adam's first moment is a tenth of the first gradient.
    first = next(s for s in state if hasattr(s, "mu")).mu
    assert norm(first) == pytest.approx(0.1, rel=1e-5)


class TestDecayNorm:
  @pytest.mark.parametrize(
    "branch",
    [
      networks.resnet_cifar(8, 3, widths=(2, 2, 4, 4)),
      networks.convnet((8, 8, 1), 3, widths=(2, 4)),
      networks.mlp(4, 3, hidden=(5,)),
    ],
    ids=lambda branch: branch.name,
  )
  def test_spares_exactly_the_vectors_of_our_branches(self, branch):
    params, _ = jax.eval_shape(branch.init, jax.random.key(0))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    zeros = jax.tree.map(jnp.zeros_like, ones)
    optimizer = optimizers.sgd(0.0, 0.5, decay_norm=False)
    changes, _ = optimizer.update(zeros, optimizer.init(ones), ones)
    for leaf in jax.tree.leaves(changes):
      assert float(leaf.mean()) == (0.5 if leaf.ndim > 1 else 0.0)


@functools.cache
def one_step(data):
  """How far one clipped step of task 2 moves each of the three heads."""
  recipe = tiny.RECIPE._replace(
    optimizer=optimizers.sgd(clip=0.1),
    rate=optimizers.constant(0.5),
    cumulative=True,
  )
  run = tiny.build(data=data, recipe=recipe, memory=tiny.NONE)

  def flat(state):
    params = jax.device_get(state.bank.params)
    return jax.tree.map(bank.flatten, params)

  state = run_lib.start(run)
  old = flat(state)
  moved = jax.tree.map(np.subtract, flat(tiny.steps(run, state, 2, 1)), old)
  return [jax.tree.map(lambda x, m=m: x[m], moved) for m in range(3)]


class TestClipPerHead:
  def test_every_head_moves_by_its_own_norm(self):
    # Gradients of 0.6 to 0.8. Clipped together, only their sum of squares
    # would be the clip's, and each head's norm less.
    moved = [norm(x) for x in one_step(data=1)]
    # Differences of parameters of order 1 lose float32 digits.
    np.testing.assert_allclose(moved, 0.5 * 0.1, rtol=1e-5)

  def test_the_norm_is_of_the_whole_batch(self):
    one, two = one_step(data=1), one_step(data=2)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
      # The sum over two devices rounds in another order.
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


class TestRates:
  def test_constant_and_cosine(self):
    assert at(optimizers.constant(0.3), 7, 10) == np.float32(0.3)
    cosine = optimizers.cosine(0.4)
    # cos(0), cos(60 deg), cos(90 deg), and past the last step cos(180 deg).
    got = [at(cosine, step, 12) for step in (0, 4, 6, 12)]
    np.testing.assert_allclose(got, [0.4, 0.3, 0.2, 0.0], atol=1e-7)

  @pytest.mark.parametrize("per_epoch", [1, 7, 39, 79, 391, 5005])
  def test_milestones_fall_between_epochs(self, per_epoch):
    rate = optimizers.steps(0.1, (100, 120), epochs=170)
    ends = np.array([100, 120, 170]) * per_epoch
    starts = np.array([0, 100, 120]) * per_epoch
    want = [0.1, 0.01, 0.001]
    for edge in starts, ends - 1:
      # 0.1 squared rounds once.
      np.testing.assert_allclose(at(rate, edge, ends[-1]), want, rtol=1e-6)

  def test_milestones_as_fractions(self):
    rate = optimizers.steps(0.8, (0.5, 0.75), 0.5)
    got = at(rate, np.arange(8), 8)
    want = [0.8] * 4 + [0.4] * 2 + [0.2] * 2
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert at(optimizers.steps(0.8, ()), 3, 8) == np.float32(0.8)

  def test_a_share_of_each_milestone(self):
    rate = optimizers.steps(0.8, (21, 26, 28), (0.5, 0.05, 0.01), epochs=30)
    found = [at(rate, step, 60) for step in (0, 41, 42, 51, 52, 55, 56, 59)]
    shares = [1, 1, 0.5, 0.5, 0.05, 0.05, 0.01, 0.01]
    np.testing.assert_allclose(found, 0.8 * np.array(shares), rtol=1e-6)
    with pytest.raises(ValueError, match=r"are 2, optimizer\.percents 1; name"):
      optimizers.steps(0.8, (1, 2), (0.5,), epochs=3)

  @pytest.mark.parametrize(
    "marks", [(120, 100), (100, 100), (0, 100), (100, 170), (-1,), (100, 200)]
  )
  def test_milestones_outside_the_task(self, marks):
    with pytest.raises(ValueError, match=r"optimizer.milestones=.*170 epochs"):
      optimizers.steps(0.1, marks, epochs=170)

  def test_warm_up_of_the_published_recipe(self):
    """170 epochs of 39 steps, 10 of warm-up, a tenth at 100 and 120."""
    rate = optimizers.steps(0.1, (100, 120), epochs=170)
    rate = optimizers.warm_up(rate, 10, epochs=170)
    steps = [0, 194, 389, 390, 3899, 3900, 4680]
    want = [0.1 / 390, 0.05, 0.1, 0.1, 0.1, 0.01, 0.001]
    np.testing.assert_allclose(at(rate, steps, 6630), want, rtol=1e-5)

  def test_warm_up_multiplies_what_it_warms(self):
    cosine = optimizers.cosine(0.2)
    warm = optimizers.warm_up(cosine, 0.25)
    steps = np.arange(16)
    ramp = np.minimum((steps + 1) / 4, 1)
    want = ramp * at(cosine, steps, 16)
    np.testing.assert_allclose(at(warm, steps, 16), want, rtol=1e-6)
    assert optimizers.warm_up(cosine, 0) is cosine

  @pytest.mark.parametrize("length", [-1, 31])
  def test_warm_up_longer_than_the_task(self, length):
    with pytest.raises(ValueError, match=r"optimizer.warm_up=.*use 0 to 30"):
      optimizers.warm_up(optimizers.constant(0.1), length, epochs=30)
    with pytest.raises(ValueError, match=r"optimizer.warm_up=.*use 0 to 30"):
      optimizers.epoch_cosine(0.1, 30, warm_up=length)

  def test_epoch_cosine_by_hand(self):
    """160 epochs of 49 steps at 0.8, ten of warm-up."""
    rate = optimizers.epoch_cosine(0.8, 160, warm_up=10)
    want = {
      1: 0.01,
      2: 0.4 * (1 + math.cos(math.pi / 80)) * 0.1 + 0.01 * 0.9,
      10: 0.4 * (1 + math.cos(math.pi / 16)) * 0.9 + 0.01 * 0.1,
      11: 0.4 * (1 + math.cos(11 * math.pi / 160)),
      80: 0.4,
      120: 0.4 * (1 - math.sqrt(0.5)),
      160: 0.0,
    }
    for epoch, value in want.items():
      first, last = 49 * (epoch - 1), 49 * epoch - 1
      got = at(rate, [first, last], 160 * 49)
      # Float32 cosines, of a rate of order 1.
      np.testing.assert_allclose(got, value, rtol=0, atol=2e-7)

  def test_epoch_cosine_without_warm_up(self):
    rate = optimizers.epoch_cosine(0.4, 2)
    got = at(rate, np.arange(4), 4)
    np.testing.assert_allclose(got, [0.2, 0.2, 0.0, 0.0], atol=1e-7)

  @pytest.mark.parametrize(
    "rate",
    [
      optimizers.constant(1.0),
      optimizers.cosine(1.0),
      optimizers.steps(1.0, (0.5,)),
      optimizers.warm_up(optimizers.cosine(1.0), 0.1),
      optimizers.epoch_cosine(1.0, 5, warm_up=1),
    ],
  )
  def test_one_compiled_rate_serves_tasks_of_any_length(self, rate):
    compiled = jax.jit(rate)
    for steps in 5, 50, 5_000_000:
      value = compiled(np.int32(0), np.int32(steps))
      assert value.shape == () and value.dtype == jnp.float32
      assert 0 <= float(value) <= 1
    assert compiled._cache_size() == 1
