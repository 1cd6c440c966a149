"""Residual blocks that are dealt to subnets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import (
  blocks,
  cutting,
  losses,
  networks,
  objectives,
  optimizers,
  partitions,
  prepare,
  sharding,
  subnets,
)
from mhil import run as run_lib
from tests import tiny

WIDTHS = (4, 4, 6, 8)


@functools.cache
def resnet(*counts, norm="batch"):
  return networks.resnet_cifar(counts, 3, WIDTHS, norm, 1, axis=None)


def random_trees(branch):
  trees = jax.jit(branch.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  noisy = jax.tree.map(
    lambda x: x + 0.1 * rng.random(x.shape).astype(np.float32), trees
  )
  return dict(zip(("params", "stats"), noisy))


def run_net(branch, trees, x):
  trees = jax.tree.map(jnp.asarray, trees)
  run = jax.jit(lambda p, s: branch.apply(p, s, x, False)[0])
  return np.asarray(run(trees["params"], trees["stats"]))


def index_of(rng, cut):
  return {
    name: rng.permutation(units).reshape(cut.parts, -1).astype(np.int32)
    for name, units in cut.units.items()
  }


class TestCut:
  @pytest.mark.parametrize(
    "counts, n, dealt, want",
    [
      # Stride-free blocks of one shape: all of the first section, all but the
      # first of the others.
      ((1, 5, 1), 2, "longest", {"stage2": 4}),
      ((1, 5, 1), 4, "longest", {"stage2": 4}),
      ((3, 5, 2), 2, "all", {"stage1": 2, "stage2": 4}),
      ((3, 5, 2), 2, "longest", {"stage2": 4}),
      ((3, 3, 3), 3, "all", {"stage1": 3}),
      ((1, 6, 1), 2, "longest", {"stage2": 4}),
      # A strided block counts for the length: two of three are dealt there,
      # as many as of the first section's two.
      ((2, 3, 2), 2, "longest", {"stage2": 2}),
      ((4, 5, 1), 4, "longest", {"stage2": 4}),
      # As long as each other: the one with more blocks to deal, else the first.
      ((3, 3, 3), 3, "longest", {"stage1": 3}),
      ((3, 4, 4), 3, "longest", {"stage2": 3}),
    ],
  )
  def test_deals_as_many_as_divide(self, counts, n, dealt, want):
    assert blocks.sections(resnet(*counts), n, dealt).units == want

  def test_a_subnet_has_an_nth_of_the_dealt_blocks(self):
    branch = resnet(1, 5, 1)
    part = blocks.subnet(branch, blocks.sections(branch, 2))
    assert part.pieces == (
      "stem", "stage1.block0", "stage2.block0", "stage2.block1",
      "stage2.block2", "stage3.block0", "readout",
    )  # fmt: skip

  @pytest.mark.slow
  @pytest.mark.parametrize("counts, dealt", [((1, 5, 1), "longest"),
                                             ((3, 5, 2), "all")])  # fmt: skip
  def test_deal_and_collect_is_the_identity(self, counts, dealt):
    branch, n = resnet(*counts), 2
    cut = blocks.sections(branch, n, dealt)
    trees = random_trees(branch)
    flat, index = cut.flat(trees), index_of(np.random.default_rng(0), cut)
    parts = [
      cutting.take(cut, flat, {k: t[i] for k, t in index.items()})
      for i in range(n)
    ]
    stacked = {name: jnp.stack([p[name] for p in parts]) for name in flat}
    back = cut.grow(cutting.merge(cut, stacked, {}, index), trees)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(trees)):
      np.testing.assert_array_equal(x, y)
    assert cutting.left_behind(cut, flat) == {}

  @pytest.mark.slow
  def test_a_subnet_is_the_net_without_the_other_blocks(self):
    """Blocks whose residual is zero hand on what they get, after a ReLU."""
    branch = resnet(1, 5, 1)
    cut = blocks.sections(branch, 2)
    part = blocks.subnet(branch, cut)
    trees = random_trees(branch)
    index = index_of(np.random.default_rng(1), cut)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    like = jax.eval_shape(part.init, jax.random.key(0))
    like = dict(zip(("params", "stats"), like))
    for i in range(2):
      mine = {k: np.sort(t[i]) for k, t in index.items()}
      held = cut.grow(cutting.take(cut, cut.flat(trees), mine), like)
      masked = jax.tree.map(np.array, trees)
      for b in np.setdiff1d(np.arange(4), mine["stage2"]) + 1:
        for array in "scale", "bias":
          masked["params"][f"stage2.block{b}"]["norm2"][array][:] = 0
      got, want = (
        run_net(net, t, x) for net, t in ((part, held), (branch, masked))
      )
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def test_scaled_divides_the_residuals_of_dealt_blocks(self):
    branch = resnet(1, 5, 1)
    cut = blocks.sections(branch, 2)
    trees = random_trees(branch)
    by_hand = jax.tree.map(np.array, trees)
    for b in range(1, 5):
      for array in "scale", "bias":
        by_hand["params"][f"stage2.block{b}"]["norm2"][array] /= 2
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    half = blocks.scaled(branch, cut)
    got, want, plain = (
      run_net(net, t, x)
      for net, t in ((half, trees), (branch, by_hand), (branch, trees))
    )
    np.testing.assert_array_equal(got, want)
    assert not np.allclose(got, plain)


class TestBadInput:
  def refused(self, words, *arguments):
    with pytest.raises(ValueError) as raised:
      blocks.sections(*arguments)
    message = str(raised.value)
    assert words in message and "use" in message and "\n" not in message

  def test_more_subnets_than_blocks(self):
    self.refused("mesh.subnet=8 is more than the 4 blocks", resnet(1, 5, 1), 8)

  def test_nothing_to_cut(self):
    mlp = networks.mlp(4, 3, (8,))
    self.refused("nothing to cut", mlp, 2)
    # Not another mlp, which it is.
    with pytest.raises(ValueError, match=r"network\.name=resnet20"):
      blocks.sections(mlp, 2)

  def test_another_word_for_what_is_dealt(self):
    words = "subnets.dealt='some' is not known"
    self.refused(words, resnet(1, 5, 1), 2, "some")


@functools.cache
def build():
  """Half of four blocks on each of two devices; images of 4 x 4."""
  dataset, stream = tiny.dataset(shape=(4, 4, 1)), tiny.stream()
  mesh = sharding.make_mesh(subnet=2)
  whole = networks.resnet_cifar((1, 5, 1), 3, (2, 2, 3, 3), "batch", 1)
  cut = blocks.sections(whole, 2)
  part = objectives.end_to_end(blocks.subnet(whole, cut))
  partition = subnets.partition(cut, part, every=2, deal=True)
  recipe = tiny.RECIPE._replace(
    optimizer=optimizers.sgd(0.9), rate=optimizers.constant(1e-2)
  )
  objective = objectives.end_to_end(blocks.scaled(whole, cut))
  given = mesh, stream, dataset, objective, losses.dce(), recipe, 0
  return prepare.build(*given, None, partition)


def whole_of(run, state):
  bank = run.whole(state.bank)
  return jax.tree.map(np.array, (bank.params, bank.stats))


class TestOnTheMesh:
  @pytest.mark.slow
  def test_steps_are_silent_and_an_exchange_keeps_every_block(self):
    run = build()
    assert run.traffic == []
    state = tiny.steps(run, run_lib.start(run), 0, 2)
    before, seen = whole_of(run, state), set()
    for done in range(2, 12, 2):
      state = run.exchange(state, done)
      seen.add(np.asarray(state.bank.apart.index["stage2"]).tobytes())
    assert len(seen) > 1, "always the same subnets"
    after = whole_of(run, state)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
      # Shared layers are averaged, and means of two are exact.
      np.testing.assert_array_equal(x, y)

  @pytest.mark.slow
  def test_bytes_are_those_of_the_formula(self):
    run = build()
    bank = run_lib.start(run).bank.bank
    one = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[3:], x.dtype),
      partitions.trees(bank, True),
    )
    got = sharding.bytes_over(run.exchanged, "subnet")
    whole = networks.resnet_cifar((1, 5, 1), 3, (2, 2, 3, 3), "batch", 1)
    cut = blocks.sections(whole, 2)
    want = cutting.traffic(cut, jax.eval_shape(cut.flat, one))
    assert got == 3 * want > 0
    kinds = sorted({c.kind for c in run.exchanged})
    assert kinds == ["all-reduce", "all-to-all"]
