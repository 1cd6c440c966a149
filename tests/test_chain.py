"""Stages of a branch: balanced cuts, shapes, costs, and the same function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import chain, networks

KEY = jax.random.key(0)
MLP = networks.mlp(4, 3, hidden=(8, 8), norm="batch")
RESNET = networks.resnet_cifar(8, 11, (4, 4, 8, 16))


def dearest(costs, cuts):
  bounds = itertools.pairwise([0, *cuts, len(costs)])
  return max(sum(costs[a:b]) for a, b in bounds)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_stages_are_as_equal_as_they_can_be(stages):
  widths = np.random.default_rng(stages).integers(2, 30, 6).tolist()
  branch = networks.mlp(4, 3, hidden=widths)
  cut = chain.chain(branch, (2, 2, 1), stages)
  every = itertools.combinations(range(1, 7), stages - 1)
  alone = chain.chain(branch, (2, 2, 1), 7).costs
  assert max(cut.costs) == min(dearest(alone, cuts) for cuts in every)


def test_shapes_and_costs_of_a_resnet():
  cut = chain.chain(RESNET, (8, 8, 3), cuts=(1, 3, 4))
  assert cut.stages == (
    ("stem",),
    ("stage1.block0", "stage2.block0"),
    ("stage3.block0",),
    ("readout",),
  )
  assert cut.shapes == ((8, 8, 3), (8, 8, 4), (4, 4, 8), (2, 2, 16))
  assert cut.costs[0] == 64 * 9 * 3 * 4
  assert cut.costs[-1] == 16 * 11
  params, stats = jax.eval_shape(RESNET.init, KEY)
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)

  def predict(params, stats, image):
    return RESNET.apply(params, stats, image, False)[0]

  whole = networks.multiply_adds(predict, params, stats, image)
  assert sum(cut.costs) == whole


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_chain_of_stages_is_the_branch(stages):
  cut = chain.chain(MLP, (2, 2, 1), stages)
  assert len(cut.stages) == stages
  x = jax.random.normal(KEY, (5, 2, 2, 1))

  @jax.jit
  def both(key, x):
    params, stats = MLP.init(key)
    want = MLP.apply(params, stats, x, True)
    new = {}
    for k in range(stages):
      x, own = cut.run(k, params, stats, x, True)
      new |= own
    return (x, new), want

  mine, want = both(KEY, x)
  jax.tree.map(np.testing.assert_array_equal, mine, want)


@pytest.mark.parametrize(
  "how, words",
  [
    (
      {"stages": 4},
      r"layer_parallel.stages=4 are more than the 3 pieces of mlp; use "
      r"layer_parallel.stages=3 or less",
    ),
    ({"cuts": (3,)}, r"layer_parallel.cuts=\(3,\) is no list of rising"),
    ({"cuts": (0,)}, r"use for instance layer_parallel.cuts=\(2,\)"),
    ({"cuts": (2, 1)}, "dense0, dense1, readout"),
    ({"cuts": (1, 1)}, "from 1 to 2"),
  ],
)
def test_cuts_outside_the_branch_are_refused(how, words):
  with pytest.raises(ValueError, match=words):
    chain.chain(MLP, (2, 2, 1), **how)
