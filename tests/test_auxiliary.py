"""Nets of the interfaces and their losses, against written-out formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from mhil import auxiliary, networks, objectives, pieces
from mhil.layers import Numerics

BATCH = Numerics("batch")


def count(make):
  params, _ = jax.eval_shape(
    lambda key: pieces.build({"net": make}).init("net", key), jax.random.key(0)
  )
  return networks.count_parameters(params)


# Convolutions (features in, out), then dense sizes, for 16, 32 and 64 inputs.
SIZES = {
  "0c1f": ([], 1),
  "0c2f": ([], 2),
  "1c1f": ([1], 1),
  "1c2f": ([1], 2),
  "1c3f": ([1], 3),
  "2c2f": ([1, 2], 2),
}


@pytest.mark.parametrize(
  "inputs, wide, stride", [(16, 32, 2), (32, 64, 2), (64, 64, 1)]
)
@pytest.mark.parametrize("kind", auxiliary.CLASSIFIERS)
def test_classifiers_have_the_released_sizes(kind, inputs, wide, stride):
  convolutions, dense = SIZES[kind]
  want, width = 0, inputs
  for _ in convolutions:
    want, width = want + 9 * width * wide + 2 * wide, wide
  for out in [*[128] * (dense - 1), 10]:
    want, width = want + (width + 1) * out, out

  def make(rngs):
    return auxiliary.Classifier(inputs, 10, kind, 64, 128, BATCH, rngs=rngs)

  assert count(make) == want
  net = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  strides = [getattr(net, f"conv{i}").conv.stride for i in convolutions]
  assert strides == [stride, 1][: len(convolutions)]


def test_the_list_of_classifiers_is_complete():
  assert {*auxiliary.CLASSIFIERS} == SIZES.keys()


def test_encoders_and_decoders_have_the_released_sizes():
  shape = (16, 16, 32)

  def size(net, *arguments):
    return count(lambda rngs: net(*arguments, BATCH, rngs=rngs))

  first = 9 * 3 * 12 + 12 + 2 * 12
  second = 9 * 12 * 32 + 32 + 2 * 32
  assert size(auxiliary.Encoder, 3, shape, 3) == first + second
  assert size(auxiliary.Encoder, 16, shape, 1) == 16 * 32 + 32 + 2 * 32
  narrow = 9 * 32 * 12 + 12 + 2 * 12
  assert size(auxiliary.Decoder, 32, (32, 32, 3)) == narrow + 9 * 12 * 3 + 3


@pytest.mark.parametrize("k", [1, 3])
def test_encoders_reach_the_shape_of_their_interface(k):
  net = auxiliary.Encoder(3, (3, 2, 5), k, Numerics("none"), rngs=nnx.Rngs(0))
  y = jax.eval_shape(lambda x: net(x, True), jnp.zeros((2, 9, 8, 3)))
  assert y.shape == (2, 3, 2, 5)


@pytest.mark.parametrize(
  "old, new, window, stride",
  [
    ((8, 8), (4, 2), (2, 4), (2, 4)),
    ((6, 6), (6, 6), (1, 1), (1, 1)),
    ((28, 7), (3, 3), (10, 3), (9, 2)),
  ],
)
def test_mean_pool_averages_windows(old, new, window, stride):
  x = np.random.default_rng(0).standard_normal((2, *old, 3)).astype(np.float32)
  got = jax.jit(lambda x: auxiliary.mean_pool(x, new))(x)
  seen = np.zeros(old)
  for i, j in np.ndindex(new):
    rows = slice(i * stride[0], i * stride[0] + window[0])
    columns = slice(j * stride[1], j * stride[1] + window[1])
    seen[rows, columns] = 1
    # A hundred float32 terms.
    np.testing.assert_allclose(
      got[:, i, j], x[:, rows, columns].mean((1, 2)), rtol=1e-4, atol=1e-6
    )
  assert seen.all()


@pytest.mark.parametrize(
  "old, new", [((2, 3), (5, 7)), ((1, 1), (4, 4)), ((4, 4), (4, 4))]
)
def test_up_sample_is_linear_and_keeps_the_corners(old, new):
  x = np.random.default_rng(0).standard_normal((2, *old, 3)).astype(np.float32)
  got = jax.jit(lambda x: auxiliary.up_sample(x, new))(x)
  rows, columns = (np.linspace(0, a - 1, b) for a, b in zip(old, new))
  across = np.apply_along_axis(
    lambda line: np.interp(columns, np.arange(old[1]), line), 2, x
  )
  want = np.apply_along_axis(
    lambda line: np.interp(rows, np.arange(old[0]), line), 1, across
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  corners = np.ix_([0, 1], [0, -1], [0, -1])
  np.testing.assert_allclose(got[corners], x[corners], rtol=1e-6)


# -- losses ------------------------------------------------------------------


def batch(b, padded=2):
  rng = np.random.default_rng(1)
  owners, columns = rng.integers(0, 2, b), rng.integers(0, 2, b)
  columns[0] = 5  # A class of its own: nobody to agree with.
  weight = np.full(b, 1 / (b - padded), np.float32)
  weight[b - padded :] = 0
  features = rng.standard_normal((b, 6)).astype(np.float32)
  labels = jnp.asarray(owners, jnp.int32), jnp.asarray(columns, jnp.int32)
  given = objectives.Batch(jnp.zeros((b, 1)), *labels, jnp.asarray(weight))
  return jnp.asarray(features), given


def written_out(features, given, temperature=0.07):
  z = np.asarray(features, np.float64)
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  label = np.asarray(given.owners) * 10 + np.asarray(given.columns)
  real = np.flatnonzero(given.weight)
  out = np.zeros(len(z))
  for i in real:
    others = [k for k in real if k != i]
    s = {k: z[i] @ z[k] / temperature for k in others}
    total = np.log(sum(np.exp(list(s.values()))))
    alike = [s[k] - total for k in others if label[k] == label[i]]
    out[i] = -np.mean(alike) if alike else 0
  return out, real


def test_contrast_is_the_written_out_formula():
  features, given = batch(12)
  got = jax.jit(lambda x: auxiliary.contrast(x, given, None))(features)
  want, real = written_out(features, given)
  assert want[0] == 0 and np.count_nonzero(want) > 6
  # Logits up to 1 / 0.07, in float32.
  np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-5)


def test_padding_moves_nothing_in_contrast():
  features, given = batch(12)

  def loss(x):
    return jnp.sum(given.weight * auxiliary.contrast(x, given, None))

  grad = jax.jit(jax.grad(loss))(features)
  np.testing.assert_array_equal(grad[10:], 0)
  assert np.all(np.any(grad[:10], axis=1))


def test_contrast_is_finite_where_nothing_can_be_compared():
  features, given = batch(1, padded=0)

  def loss(x):
    return jnp.sum(auxiliary.contrast(x, given, None))

  for x in features, jnp.zeros_like(features):
    value, grad = jax.jit(jax.value_and_grad(loss))(x)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_contrast_compares_with_the_whole_batch_over_data():
  features, given = batch(12)

  def total(x, given, axis):
    return jnp.sum(given.weight * auxiliary.contrast(x, given, axis))

  mesh = jax.make_mesh((2,), ("data",))
  alone = jax.jit(jax.grad(functools.partial(total, axis=None)))
  spread = jax.jit(
    jax.shard_map(
      jax.grad(functools.partial(total, axis="data")),
      mesh=mesh,
      in_specs=P("data"),
      out_specs=P("data"),
    )
  )
  place = jax.NamedSharding(mesh, P("data"))
  got = spread(*jax.device_put((features, given), place))
  # Sums of a dozen float32 terms in another order, over 0.07.
  np.testing.assert_allclose(got, alone(features, given), rtol=1e-4, atol=1e-5)


def test_restoration_is_the_binary_cross_entropy_of_pixels():
  rng = np.random.default_rng(0)
  guess = rng.standard_normal((2, 3, 3, 2)).astype(np.float32)
  pixels = rng.uniform(0, 1, guess.shape)
  mean, std = np.array([0.4, 0.6]), np.array([0.2, 0.3])
  images = jnp.asarray((pixels - mean) / std, jnp.float32)
  got = jax.jit(
    lambda guess: auxiliary.restoration(guess, images, (list(mean), list(std)))
  )(guess)
  p = 1 / (1 + np.exp(-guess.astype(np.float64)))
  want = -(pixels * np.log(p) + (1 - pixels) * np.log(1 - p)).mean((1, 2, 3))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_restoration_clips_what_augmentation_leaves_outside():
  images = jnp.full((1, 2, 2, 1), 9.0)
  got = auxiliary.restoration(jnp.zeros((1, 2, 2, 1)), images, ((0.0,), (1.0,)))
  np.testing.assert_allclose(got, np.log(2), rtol=1e-6)  # Not -8 + log 2.
  got = auxiliary.restoration(jnp.ones((1, 2, 2, 1)), images, ((0.0,), (1.0,)))
  np.testing.assert_allclose(got, np.log1p(np.e) - 1, rtol=1e-6)
