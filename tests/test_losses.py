import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import losses, sharding

P = jax.P
HEADS, B, C = 4, 16, 3
REFERENCES = ("learned", "zero", "per_class", "none")


@functools.cache
def case(seed=0, heads=HEADS, c=C):
  """Logits of all heads, targets of each head, no prior, no padding."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (heads, B, c + 1)).astype(np.float32)
  owner, column = rng.integers(0, heads, B), rng.integers(0, c, B)
  targets = np.where(owner == np.arange(heads)[:, None], column, c)
  prior = np.zeros((heads, c + 1), np.float32)
  valid = np.ones((heads, c), bool)
  labels = owner * c + column
  return logits, targets.astype(np.int32), prior, valid, labels


def total(loss, logits, targets, prior, valid):
  """Sum over heads `[b]`, with whatever heads exchange, on one device."""
  mesh = sharding.make_mesh()

  def local(logits, targets, prior, valid):
    shared = None
    if loss.share:
      shared = loss.share(logits, prior, valid, "head")
    value = jax.vmap(loss.value, in_axes=(0, 0, 0, 0, None))
    return value(logits, targets, prior, valid, shared).sum(0)

  # Every normaliser is marked as differing over `head`, of size one here.
  run = jax.shard_map(
    local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  return jax.jit(run)(logits, targets, prior, valid)


def reference_ce(logits, labels):
  z = jnp.moveaxis(logits[:, :, :-1], 0, 1).reshape(B, -1)
  return -jax.nn.log_softmax(z)[jnp.arange(B), labels]


@pytest.mark.parametrize("make", [losses.ce, losses.distributed_ce])
def test_ce_forms_equal_plain_cross_entropy(make):
  logits, targets, prior, valid, labels = case()
  rest = make(), jnp.asarray(targets), prior, valid

  def ours(z):
    return total(rest[0], z, *rest[1:])

  # float32 sums of 12 exponentials in another order: a few ulp.
  np.testing.assert_allclose(
    ours(logits), reference_ce(logits, labels), rtol=1e-5
  )
  got = jax.grad(lambda z: ours(z).sum())(jnp.asarray(logits))
  want = jax.grad(lambda z: reference_ce(z, labels).sum())(jnp.asarray(logits))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_bounds_on_20000_random_logit_vectors():
  rng = np.random.default_rng(1)
  n, heads = 20_000, 3
  logits = rng.normal(0, rng.uniform(0.1, 8, (1, n, 1)), (heads, n, C + 1))
  owner, column = rng.integers(0, heads, n), rng.integers(0, C, n)
  targets = np.where(owner == np.arange(heads)[:, None], column, C)
  z = np.moveaxis(logits[:, :, :-1], 0, 1).reshape(n, -1)
  picked = z[np.arange(n), owner * C + column]
  ce = np.logaddexp.reduce(z, 1) - picked
  reference = np.logaddexp(np.logaddexp.reduce(z, 1), 0) - picked
  free = np.zeros(C + 1), np.ones(C, bool)
  with jax.enable_x64(True):
    zero, per_class = (
      sum(
        np.asarray(losses.dce(kind).value(logits[h], targets[h], *free))
        for h in range(heads)
      )
      for kind in ("zero", "per_class")
    )
  slack = 1e-9  # float64 rounding of sums below a few hundred
  assert (ce <= reference + slack).all()
  assert (reference <= zero + slack).all()
  assert (zero <= per_class + slack).all()
  # The bounds are not equalities that hold by accident.
  assert (per_class - zero).mean() > 0.1 and (zero - reference).mean() > 0.1


def smooth_ce(logits, labels, smoothing):
  z = jnp.moveaxis(logits[:, :, :-1], 0, 1).reshape(B, -1)
  target = jax.nn.one_hot(labels, z.shape[1]) * (1 - smoothing)
  return -jnp.sum(
    (target + smoothing / z.shape[1]) * jax.nn.log_softmax(z), axis=1
  )


@pytest.mark.parametrize("make", [losses.ce, losses.distributed_ce])
def test_label_smoothing_of_ce(make):
  logits, targets, prior, valid, labels = case()

  def ours(z):
    return total(make(0.1), z, jnp.asarray(targets), prior, valid).sum()

  def want(z):
    return smooth_ce(z, labels, 0.1).sum()

  z = jnp.asarray(logits)
  np.testing.assert_allclose(ours(z), want(z), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(ours)(z), jax.grad(want)(z), atol=1e-6)


def test_label_smoothing_leaves_out_masked_outputs():
  """In the first task there is no rest; it must not be smoothed over."""
  logits = np.array([[1.0, 2.0, 3.0]], np.float32)
  prior = np.array([0.0, 0.0, losses.MASKED], np.float32)
  value = losses.dce("learned", 0.2).value(
    logits, np.array([0], np.int32), prior, np.ones(2, bool)
  )
  logp = jax.nn.log_softmax(logits[0, :2])
  want = -(0.9 * logp[0] + 0.1 * logp[1])
  assert value[0] == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("kind", REFERENCES)
def test_dce_is_separable(kind):
  """The gradient of head m's loss is exactly zero for every other head."""
  logits, targets, prior, valid, _ = case()
  loss = losses.dce(kind)
  assert loss.share is None

  def per_head(z):
    run = jax.vmap(loss.value)
    return run(z, jnp.asarray(targets), prior, valid).sum(1)

  jacobian = np.asarray(jax.jacrev(per_head)(jnp.asarray(logits)))
  for m in range(HEADS):
    for j in range(HEADS):
      assert (jacobian[m, j] != 0).any() == (m == j)


@pytest.mark.parametrize(
  ("loss", "apart"),
  [(losses.dce(kind), True) for kind in REFERENCES]
  + [(losses.ce(), False), (losses.distributed_ce(), False)],
  ids=lambda x: getattr(x, "name", str(x)),
)
def test_only_ce_feels_what_other_heads_say(loss, apart):
  """Moving head 1 leaves head 0's gradient as it is; with CE it must not."""
  logits, targets, prior, valid, _ = case()

  @jax.jit
  def gradient(z):
    def run(z):
      return total(loss, z, jnp.asarray(targets), prior, valid).sum()

    return jax.grad(run)(z)[0]

  moved = logits + np.array([0, 1, 0, 0], np.float32)[:, None, None]
  same = np.array_equal(gradient(logits), gradient(moved))
  assert same == apart


def test_one_head_equals_ce_over_its_classes_and_the_reference():
  rng = np.random.default_rng(2)
  logits = rng.normal(0, 2, (B, C + 1)).astype(np.float32)
  targets = rng.integers(0, C + 1, B).astype(np.int32)
  value = losses.dce("learned").value(
    logits, targets, np.zeros(C + 1, np.float32), np.ones(C, bool)
  )
  want = -jax.nn.log_softmax(logits)[np.arange(B), targets]
  np.testing.assert_array_equal(value, want)


@pytest.mark.parametrize("kind", REFERENCES)
def test_padded_classes_change_nothing(kind):
  logits, targets, prior, valid, _ = case()
  loss = losses.dce(kind)
  wide = np.insert(logits[0], C, 77.0, axis=1)  # a padded column before rest
  wide_targets = np.where(targets[0] == C, C + 1, targets[0])
  wide_valid = np.append(valid[0], False)
  value = loss.value(logits[0], targets[0], prior[0], valid[0])
  padded = loss.value(
    wide, wide_targets, np.zeros(C + 2, np.float32), wide_valid
  )
  # Sums over one more (zero) term may associate differently.
  np.testing.assert_allclose(value, padded, rtol=1e-6)
  scores = loss.scores(wide, wide_valid)
  assert (scores[:, C] == losses.MASKED).all()
  np.testing.assert_allclose(
    scores[:, :C], loss.scores(logits[0], valid[0]), rtol=1e-6
  )
  gradient = jax.grad(
    lambda z: loss.value(
      z, wide_targets, np.zeros(C + 2, np.float32), wide_valid
    ).sum()
  )(jnp.asarray(wide))
  assert (np.asarray(gradient)[:, C] == 0).all()


@pytest.mark.parametrize("kind", ("learned", "zero", "per_class"))
def test_consistency_minimiser_is_the_posterior(kind):
  """With all classes at their true rate, p_k = P(y = k): Bayes-optimal."""
  rng = np.random.default_rng(3)
  heads, c = 2, 2
  rate = rng.dirichlet(np.ones(heads * c)).reshape(heads, c)
  loss = losses.dce(kind)
  free = np.zeros(c + 1, np.float32), np.ones(c, bool)

  def expected(z, head):
    own = np.append(rate[head], 1 - rate[head].sum())
    return sum(
      own[k] * loss.value(z[None], np.array([k], np.int32), *free)[0]
      for k in range(c + 1)
    )

  for head in range(heads):
    z = jnp.zeros(c + 1)
    step = jax.jit(lambda z, head=head: z - jax.grad(expected)(z, head))
    for _ in range(2000):
      z = step(z)
    if kind == "per_class":
      p = jax.nn.sigmoid(z[:-1])
    else:
      p = jax.nn.softmax(z.at[-1].set(0) if kind == "zero" else z)[:-1]
    # 2,000 steps of gradient descent leave about 1e-4.
    np.testing.assert_allclose(p, rate[head], atol=2e-3)


def test_none_ignores_foreign_samples():
  logits, targets, prior, valid, _ = case()
  value = np.asarray(
    losses.dce("none").value(logits[0], targets[0], prior[0], valid[0])
  )
  assert (value[targets[0] == C] == 0).all()
  assert (value[targets[0] < C] > 0).all()


def priors(make, counts, owners, opened):
  """Of each class, and of its head's reference."""
  found = make(jnp.array(counts), jnp.array(owners), opened)
  return [np.asarray(x) for x in found]


def test_class_prior_by_hand():
  own, rest = priors(
    losses.class_prior, [60, 10, 20, 10, 0], [0, 1, 0, 1, 2], 2
  )
  np.testing.assert_allclose(np.exp(own[:4]), [0.6, 0.1, 0.2, 0.1], rtol=1e-6)
  np.testing.assert_allclose(np.exp(rest[:4]), [0.1, 0.4, 0.1, 0.4], rtol=1e-6)
  assert own[4] < losses.MASKED / 2


def test_odds_prior_by_hand():
  own, rest = priors(losses.odds_prior, [60, 20, 10, 10], [0, 0, 1, 1], 2)
  # log-odds of rate .6, less those of a quarter.
  assert own[0] == pytest.approx(np.log(0.6 / 0.4) - np.log(1 / 3), 1e-5)
  assert (rest == 0).all()
  own, _ = priors(losses.odds_prior, [25] * 4, [0, 0, 1, 1], 2)
  np.testing.assert_allclose(own, 0, atol=1e-6)


@pytest.mark.parametrize("make", [losses.class_prior, losses.odds_prior])
def test_prior_of_one_class_is_finite(make):
  for found in priors(make, [5, 0], [0, 1], 1):
    assert np.isfinite(found).all() and found.shape == (2,)


@pytest.mark.parametrize(
  "make", [losses.ce, losses.distributed_ce], ids=["ce", "distributed_ce"]
)
def test_prior_of_ce_is_added_to_its_logits(make):
  logits, targets, _, valid, labels = case()
  prior = np.random.default_rng(5).normal(size=(HEADS, C + 1))
  prior = prior.astype(np.float32)

  def ours(z):
    return total(make(), z, jnp.asarray(targets), prior, valid).sum()

  def want(z):
    return reference_ce(z + prior[:, None], labels).sum()

  z = jnp.asarray(logits)
  np.testing.assert_allclose(ours(z), want(z), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(ours)(z), jax.grad(want)(z), atol=1e-6)


@pytest.mark.parametrize("kind", ("learned", "zero", "per_class"))
def test_prior_leaves_balanced_scores_behind(kind):
  """Trained at skewed class rates, the corrected minimiser is balanced.

  Without features only the rates are there to learn, so after the correction
  nothing may be left: every class of every head gets the same score.
  """
  counts = np.array([[60, 20], [15, 5]])
  loss, c = losses.dce(kind), 2
  own, rest = priors(loss.prior, counts.ravel(), [0, 0, 1, 1], 2)
  prior = np.stack([*own.reshape(2, 2).T, rest[::2]], 1)
  rate = counts / counts.sum()
  valid = np.ones(c, bool)

  def expected(z, head, prior):
    own = np.append(rate[head], 1 - rate[head].sum())
    return sum(
      own[k]
      * loss.value(z[None], np.array([k], np.int32), prior[head], valid)[0]
      for k in range(c + 1)
    )

  def scores(prior):
    found = []
    for head in range(2):
      z = jnp.zeros(c + 1)
      step = jax.jit(
        lambda z, head=head: z - jax.grad(expected)(z, head, prior)
      )
      for _ in range(3000):
        z = step(z)
      found.append(np.asarray(loss.scores(z[None], valid))[0])
    return np.concatenate(found)

  # 3,000 steps of gradient descent leave about 1e-3 at the rarest class.
  assert np.ptp(scores(prior)) < 0.02
  assert np.ptp(scores(np.zeros_like(prior))) > 1


def test_unknown_reference_is_named():
  with pytest.raises(ValueError, match=r"loss\.reference='other'.*learned"):
    losses.dce("other")
