"""Layer-parallel training: what pins it down, reductions, bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import (
  auxnet,
  chain,
  coupling,
  guessing,
  layer_parallel,
  networks,
  objectives,
)

B, D, CLASSES = 5, 6, 4
RESIDUAL = ("r0", "r1", "r2", "readout")
KEY = jax.random.key(0)


def residual():
  """Three tanh residual layers and a readout, smooth, in float64."""
  rng = np.random.default_rng(0)

  def layer(*shape, size):
    return jnp.asarray(size * rng.normal(size=shape))

  params = {
    name: {"w": layer(D, D, size=D**-0.5), "b": layer(D, size=0.1)}
    for name in RESIDUAL[:-1]
  }
  params["readout"] = {"w": layer(D, CLASSES, size=0.4)}
  stats = {name: {} for name in RESIDUAL}

  def piece(name, params, stats, x, train):
    if name == "readout":
      return x @ params["w"], stats
    return x + jnp.tanh(x @ params["w"] + params["b"]), stats

  def apply(params, stats, x, train):
    for name in RESIDUAL:
      x, _ = piece(name, params[name], {}, x, train)
    return x, stats

  init = lambda key: (params, stats)  # noqa: E731
  mlp = networks.mlp(D, CLASSES)
  branch = mlp._replace(
    pieces=RESIDUAL, init=init, piece=piece, apply=apply, features=None
  )
  x = layer(B, D, size=1.0)
  labels = np.arange(B) % CLASSES
  return branch, params, stats, x, labels


class Case:
  """A small chain of stages, and what back-propagation says of it."""

  def __init__(self, cuts=(1, 2)):
    branch, self.params, self.stats, x, labels = residual()
    self.chain = chain.chain(branch, (D,), cuts=cuts)
    self.batch = objectives.Batch(x, labels, labels, jnp.full(B, 1 / B))
    self.bp = jax.grad(self.loss)(self.params)

  def criterion(self, logits):
    logp = jax.nn.log_softmax(logits)
    return -logp[jnp.arange(B), self.batch.columns]

  def loss(self, params):
    x = self.batch.images
    logits, _ = self.chain.branch.apply(params, self.stats, x, True)
    return jnp.sum(self.batch.weight * self.criterion(logits))

  def consistent(self):
    """The states of a forward pass, and no multipliers."""
    x, states = self.batch.images, []
    for k in range(len(self.chain.stages) - 1):
      x, _ = self.chain.run(k, self.params, self.stats, x, True)
      states.append(x)
    return guessing.Guess(states, [None] * len(states))

  def guessed(self):
    """Random states."""
    true, rng = self.consistent(), np.random.default_rng(2)
    states = [jnp.asarray(rng.normal(size=x.shape)) for x in true.states]
    return true._replace(states=states)

  def step(self, method, guess):
    """A step from a guess: gradients, and the mended guess."""
    return layer_parallel.parallel(
      self.chain,
      self.params,
      self.stats,
      self.batch,
      self.criterion,
      method,
      guess,
    )

  @functools.cached_property
  def corrected(self):
    """Mends many times over, until no correction is left to make."""

    def run(beta, states, multipliers):
      method = coupling.Method(beta=beta, eta=0.08 / beta)

      def one(_, states):
        return self.step(method, guessing.Guess(states, multipliers))[1].states

      return jax.lax.fori_loop(0, 1500, one, states)

    return jax.jit(run)

  def solved(self, beta, multipliers=(None, None)):
    """The states that minimise the coupled loss, weights held."""
    states = self.consistent().states
    found = self.corrected(beta, states, list(multipliers))
    return guessing.Guess(found, list(multipliers))

  def error(self, grads):
    """Relative distance from back-propagation's gradient, all stages."""
    apart, size = 0.0, 0.0
    for name in RESIDUAL:
      for leaf, want in zip(
        jax.tree.leaves(grads[name]), jax.tree.leaves(self.bp[name])
      ):
        apart += float(jnp.sum((leaf - want) ** 2))
        size += float(jnp.sum(want**2))
    return (apart / size) ** 0.5


def largest(tree):
  return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def case():
  with jax.enable_x64(True):
    yield Case()


# Rounding of float64, on numbers of about one.
EXACT = 1e-13


def test_consistent_states_teach_the_last_stage_alone(case):
  out, _ = case.step(coupling.Method(beta=3.0, eta=0.1), case.consistent())
  assert largest([out.grads["r0"], out.grads["r1"]]) == 0
  for name in "r2", "readout":
    apart = jax.tree.map(jnp.subtract, out.grads[name], case.bp[name])
    assert largest(apart) < EXACT
    assert largest(case.bp[name]) > 0.01


@pytest.mark.parametrize("beta, eta", [(3.0, 0.1), (0.5, 2.0)])
def test_a_correction_moves_credit_by_one_stage(case, beta, eta):
  method = coupling.Method(beta=beta, eta=eta, corrections=2)
  out, _ = case.step(method, case.consistent())
  want = jax.tree.map(lambda g: beta * eta * g, case.bp["r1"])
  assert largest(jax.tree.map(jnp.subtract, out.grads["r1"], want)) < EXACT
  assert largest(want) > 0.01
  assert largest(out.grads["r0"]) == 0


def test_so_many_corrections_as_stages_reach_the_first(case):
  method = coupling.Method(beta=1.0, eta=1.0, corrections=3)
  out, _ = case.step(method, case.consistent())
  assert largest(out.grads["r0"]) > 0.01


def test_error_of_the_solved_penalty_falls_with_beta(case):
  errors = []
  for beta in 1.0, 10.0, 100.0, 1000.0:
    out, _ = case.step(coupling.Method(beta=beta), case.solved(beta))
    errors.append(case.error(out.grads))
  # The expansion in 1 / beta holds where its next term is small.
  ratios = [a / b for a, b in itertools.pairwise(errors)]
  np.testing.assert_allclose(ratios[1:], 10, rtol=0.25)
  assert errors[0] > 0.3 and errors[-1] < 0.01


def test_multipliers_tend_to_minus_the_adjoint(case):
  method = coupling.Method(beta=30.0, eta=0.08 / 30)
  multipliers = [jnp.zeros((B, D))] * 2
  errors = []
  for _ in range(11):
    guess = case.solved(method.beta, multipliers)
    out, mended = case.step(method, guess)
    errors.append(case.error(out.grads))
    multipliers = mended.multipliers
  assert errors[-1] < 1e-6 < 1e-2 < errors[0]
  # kappa is kept in units of beta, and the adjoint is a sample's own.
  top = case.consistent().states[1]

  def loss(state):
    x, _ = case.chain.run(2, case.params, case.stats, state, True)
    return jnp.sum(case.criterion(x))

  kappa, adjoint = method.beta * multipliers[1], jax.grad(loss)(top)
  np.testing.assert_allclose(kappa, -adjoint, atol=1e-5)


# Fact 5: a stage takes its gradient when credit first reaches it.


@pytest.fixture(scope="module", params=[3, 4], ids=["3 stages", "4 stages"])
def deep(request):
  with jax.enable_x64(True):
    yield Case(range(1, request.param))


def rule_of(case, beta, eta, sweeps=0, more=0):
  count = len(case.chain.stages)
  return coupling.Method(
    beta=beta, eta=eta, sweeps=sweeps, corrections=count + more
  )


# What is left of an adjoint in a state of about one that moved by it over
# beta, and 1e-16 of rounding.
LEFT = 1e-9


def test_as_many_corrections_as_stages_are_back_propagation(deep):
  method = rule_of(deep, 1e4, 1e-4)
  out, mended = deep.step(method, deep.consistent())
  assert deep.error(out.grads) < LEFT
  # The control, as before the rule: every gradient in the last pass.
  guess, once = deep.consistent(), method._replace(corrections=1)
  for _ in deep.chain.stages[1:]:
    _, guess = deep.step(once, guess)
  out, _ = deep.step(once, guess)
  assert deep.error(out.grads) > 0.1
  # What networks learn is a step along the adjoint from the true state.
  top = deep.consistent().states[-1]
  moved = 1e4 * (top - mended.states[-1])
  assert 0.01 < largest(moved) < 10


@pytest.mark.parametrize("more", [0, 2])
def test_sweeps_make_any_guess_as_good(deep, more):
  last = len(deep.chain.stages) - 1
  # A correction more than stages is a sweep.
  method = rule_of(deep, 1e4, 1e-4, sweeps=last - more, more=more)
  out, _ = deep.step(method, deep.guessed())
  assert deep.error(out.grads) < LEFT
  # The control: the guess still stands at one interface.
  out, _ = deep.step(method._replace(sweeps=last - more - 1), deep.guessed())
  assert deep.error(out.grads) > 0.1


def test_small_steps_scale_credit_by_the_way_that_it_came(deep):
  out, _ = deep.step(rule_of(deep, 3.0, 0.1), deep.consistent())
  for k, names in enumerate(deep.chain.stages):
    scale = 0.3 ** (len(deep.chain.stages) - 1 - k)
    for name in names:
      want = jax.tree.map(lambda g, s=scale: s * g, deep.bp[name])
      assert largest(jax.tree.map(jnp.subtract, out.grads[name], want)) < EXACT


def test_true_states_after_a_sweep_for_each_interface(deep):
  off = coupling.Method(correction="off", sweeps=len(deep.chain.stages) - 1)
  _, found = deep.step(off, deep.guessed())
  for state, want in zip(found.states, deep.consistent().states, strict=True):
    assert largest(state - want) < EXACT
  _, found = deep.step(off._replace(sweeps=off.sweeps - 1), deep.guessed())
  apart = [
    largest(a - b) for a, b in zip(found.states, deep.consistent().states)
  ]
  assert max(apart[:-1]) < EXACT and apart[-1] > 0.1


# Reductions, on a branch with batch norm and a padded sample.


@functools.cache
def dense(stages=3, norm="batch"):
  branch = networks.mlp(4, 3, hidden=(8, 8), norm=norm)
  return chain.chain(branch, (2, 2, 1), stages)


def batch_of(b=6):
  rng = np.random.default_rng(1)
  images = jnp.asarray(rng.normal(size=(b, 2, 2, 1)), jnp.float32)
  weight = jnp.full(b, 1 / (b - 1), jnp.float32).at[-1].set(0)
  number = jnp.asarray([3, 0, 7, 5, 1, 2], jnp.int32)
  zeros = jnp.zeros(b, jnp.int32)
  return objectives.Batch(images, zeros, zeros, weight, number)


def criterion(logits):
  return -jax.nn.log_softmax(logits)[:, 1]


def guesser_of(stages, multipliers="none", cost=0.5, **how):
  second = multipliers == "network"
  aux = auxnet.auxnet(stages, cost=cost, multipliers=second)
  return guessing.by_network(aux, stages, multipliers=multipliers, **how)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_one_stage_is_end_to_end_bit_for_bit():
  stages = dense(1)
  one = layer_parallel.layer_parallel(
    stages, guesser_of(stages), coupling.Method(corrections=2)
  )
  whole = objectives.end_to_end(stages.branch)
  params, stats, side = one.init(KEY)
  equal((params, stats), whole.init(KEY)[:2])
  given = params, stats, side, batch_of()
  mine = jax.jit(lambda *a: one.step(*a, criterion, KEY))(*given)
  want = jax.jit(lambda *a: whole.step(*a, criterion, KEY))(*given)
  equal(mine[:3], want[:3])
  # So its logits may be compared across heads; those of guesses may not.
  logits = [o.trained(params, stats, batch_of().images) for o in (one, whole)]
  equal(*logits)
  cut = dense(2)
  two = layer_parallel.layer_parallel(cut, guesser_of(cut), coupling.Method())
  with pytest.raises(ValueError, match=r"use loss\.name=dce"):
    two.trained(params, stats, batch_of().images)


def test_perfect_guesses_and_full_steps_are_back_propagation():
  """Where beta eta is one, at the interface below the last stage."""
  stages = dense(2)
  method = coupling.Method(beta=4.0, eta=0.25, corrections=2)
  whole = objectives.end_to_end(stages.branch)

  @jax.jit
  def both(key, batch):
    params, stats = stages.branch.init(key)
    true, _ = stages.run(0, params, stats, batch.images, True)
    given = stages, params, stats, batch, criterion, method
    out, _ = layer_parallel.parallel(*given, guessing.Guess([true], [None]))
    return out, whole.step(params, stats, {}, batch, criterion, key).grads

  # A padded sample has no weight to carry what batch norm makes of it.
  batch = batch_of()
  out, want = both(KEY, batch._replace(weight=jnp.full(6, 1 / 6)))
  for name in stages.stages[0]:
    jax.tree.map(
      # A state less itself moved by p / beta: some bits of p are lost.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      out.grads[name],
      want[name],
    )
  assert largest(want[stages.stages[0][0]]) > 1e-3


def test_a_serial_step_is_back_propagation():
  stages = dense(3)
  often = coupling.Method(serial_every=2)
  mixed = layer_parallel.layer_parallel(stages, guesser_of(stages), often)
  whole = objectives.end_to_end(stages.branch)
  params, stats, side = mixed.init(KEY)
  given = params, stats, batch_of()
  want = jax.jit(lambda p, s, b: whole.step(p, s, {}, b, criterion, KEY))(
    *given
  )
  step = jax.jit(
    lambda side: mixed.step(*given[:2], side, given[2], criterion, KEY)
  )
  first = step(side)
  second = step(first.side)
  assert [int(out.side["step"]) for out in (first, second)] == [1, 2]
  for name in stages.branch.pieces:
    jax.tree.map(
      # The same products, fused differently.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      second.grads[name],
      want.grads[name],
    )
  name = stages.branch.pieces[0]
  apart = jax.tree.map(jnp.subtract, first.grads[name], want.grads[name])
  assert largest(apart) > 1e-3


def serial_guess(case, correction="full"):
  """What a step of back-propagation leaves of random guesses."""
  method = coupling.Method(beta=30.0, eta=1 / 30, correction=correction)
  guess = case.guessed()
  blank = [jnp.full_like(state, 0.1) for state in guess.states]
  return layer_parallel._serial(
    case.chain,
    case.params,
    case.stats,
    case.batch,
    case.criterion,
    method,
    guess._replace(multipliers=blank),
  )


def test_a_serial_step_sets_multipliers_to_minus_the_adjoint(case):
  out, mended = serial_guess(case)
  assert case.error(out.grads) < LEFT
  # With them, the true states hold still and teach every stage.
  true = guessing.Guess(case.consistent().states, mended.multipliers)
  out, _ = case.step(coupling.Method(beta=30.0, eta=1 / 30), true)
  assert case.error(out.grads) < LEFT
  for k, state in enumerate(mended.states):
    # Corrected by the multiplier that was guessed: eta (p + beta 0.1).
    moved = true.states[k] - state
    want = 0.1 - mended.multipliers[k]
    assert largest(moved - want) < EXACT


def test_the_control_gets_no_credit_by_multipliers(case):
  _, mended = serial_guess(case, "off")
  for k, state in enumerate(mended.states):
    assert largest(state - case.consistent().states[k]) < EXACT
    assert largest(mended.multipliers[k] - 0.1) == 0


def test_a_padded_sample_moves_nothing():
  stages = dense(3, "none")
  method = layer_parallel.layer_parallel(
    stages, guesser_of(stages), coupling.Method(corrections=2)
  )
  params, stats, side = method.init(KEY)
  batch = batch_of()
  other = batch._replace(images=batch.images.at[-1].add(9.0))
  step = jax.jit(lambda b: method.step(params, stats, side, b, criterion, KEY))
  equal(step(batch).grads, step(other).grads)


def test_corrections_and_their_controls():
  state, below, adjoint = (jnp.full((2, 3), x) for x in (1.0, 3.0, 5.0))
  method = coupling.Method(beta=2.0, eta=0.1)

  def mended(correction):
    how = method._replace(correction=correction)
    return float(coupling.correct(state, below, adjoint, None, how)[0, 0])

  assert mended("off") == 1.0
  assert mended("no_credit") == pytest.approx(1 - 0.1 * 2 * (1 - 3))
  assert mended("full") == pytest.approx(1 - 0.1 * (2 * (1 - 3) + 5))


def test_guesses_that_are_not_mended_or_of_rate_0_learn_nothing():
  stages, method = dense(3), coupling.Method()

  def largest_of(method, **how):
    made = layer_parallel.layer_parallel(
      stages, guesser_of(stages, **how), method
    )
    params, stats, side = made.init(KEY)
    step = jax.jit(lambda b: made.step(params, stats, side, b, criterion, KEY))
    out = step(batch_of())
    assert largest(out.grads["dense0"]) > 0
    return largest([out.grads["aux1"], out.grads["aux2"]])

  # A guess less itself, in one program or another.
  assert largest_of(method._replace(correction="off")) < 1e-6
  assert largest_of(method, rate=0.0) == 0
  assert largest_of(method) > 1e-3


@pytest.mark.parametrize(
  "field, value",
  [("beta", 0.0), ("beta", -1.0), ("eta", 0.0), ("eta", float("nan"))],
)
def test_numbers_that_are_not_positive_are_refused(field, value):
  method = coupling.Method()._replace(**{field: value})
  words = f"layer_parallel.{field}={value} is not positive; use"
  with pytest.raises(ValueError, match=words):
    layer_parallel.layer_parallel(dense(2), guesser_of(dense(2)), method)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"corrections": 0}, "layer_parallel.corrections=0 is less than one; use"),
    ({"correction": "none"}, "layer_parallel.correction='none' is not known"),
  ],
)
def test_other_methods_are_refused(change, words):
  method = coupling.Method()._replace(**change)
  with pytest.raises(ValueError, match=words):
    coupling.check(method)


@pytest.mark.parametrize(
  "corrections, stages, want",
  [
    (1, 3, (0, [0, 0, 0])),
    (2, 4, (0, [1, 1, 1, 0])),
    (3, 3, (0, [2, 1, 0])),
    (5, 3, (2, [2, 1, 0])),
    (2, 1, (1, [0])),
  ],
)
def test_schedule(corrections, stages, want):
  method = coupling.Method(corrections=corrections)
  assert coupling.schedule(method, stages) == want
  more = method._replace(sweeps=3)
  assert coupling.schedule(more, stages) == (want[0] + 3, want[1])


def test_timetable():
  assert coupling.timetable(coupling.Method(), 1) == [{0: "run"}]
  assert coupling.timetable(coupling.Method(sweeps=1, corrections=2), 3) == [
    {1: "guess", 2: "guess"},
    {0: "sweep", 1: "sweep"},
    {0: "look", 1: "look", 2: "run"},
    {1: "mend", 2: "mend"},
    {0: "run", 1: "run", 2: "learn"},
    {1: "mend"},
    {1: "learn"},
  ]


def test_counted_speedup():
  count, method = layer_parallel.counted_speedup, coupling.Method()
  assert count([1, 1, 1, 1], [0, 0, 0]) == 4
  # A guess, the longer stage's pass, and learning from what was mended.
  assert count([2, 3], [1]) == pytest.approx(15 / (1 + 9 + 3))
  # Two passes, three units each: the last stage needs them in the first, the
  # first in the second. No better than back-propagation.
  two = method._replace(corrections=2)
  assert count([1, 1], [0], two) == 1
  # Of stage 1 the first pass, without the weights' gradient, is hidden.
  assert count([1, 1, 1], [0, 0], two) == pytest.approx(9 / 6)
  assert count([1, 4, 1], [0, 0], two) == pytest.approx(18 / (8 + 12))
  # Its own state's chain: three stages, before all begin.
  assert count([1, 1, 1, 1], []) == pytest.approx(12 / (3 + 3))


def test_counted_speedup_with_sweeps_and_serial_steps():
  count = layer_parallel.counted_speedup
  swept = coupling.Method(sweeps=2)
  assert count([1, 2, 9], [0, 0], swept) == pytest.approx(36 / (2 * 2 + 27))
  # A correction too many is one more sweep.
  more = coupling.Method(sweeps=2, corrections=4)
  assert count([1, 1, 1], [0, 0], more) == pytest.approx(9 / (3 + 9))
  # Every other step all of the work, 6, then what the network costs, 4.
  mixed = coupling.Method(serial_every=2)
  assert count([1, 1], [1], mixed) == pytest.approx(6 / ((10 + 7) / 2))
  assert count([1, 1], [0], mixed._replace(serial_every=1)) == 1


def test_the_rule_is_as_serial_as_back_propagation():
  """In K equal stages: K - 1 sweeps of 1 unit, K passes of 3; or 3 K units."""
  for k in 2, 3, 4, 8:
    method = coupling.Method(sweeps=k - 1, corrections=k)
    found = layer_parallel.counted_speedup([1] * k, [0] * (k - 1), method)
    assert found == pytest.approx(3 * k / (4 * k - 1)) and found < 1
