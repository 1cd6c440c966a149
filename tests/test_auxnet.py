"""Auxiliary networks: cost, shapes, second heads, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import auxnet, chain, networks

KEY = jax.random.key(0)
RESNET = chain.chain(
  networks.resnet_cifar(8, 11, (8, 8, 16, 32)), (16, 16, 3), cuts=(1, 3, 4)
)
MLP = chain.chain(networks.mlp(64, 11, (64, 64)), (8, 8, 1), 3)


@pytest.mark.parametrize("cut", [RESNET, MLP], ids=["resnet", "mlp"])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_states_have_their_interfaces_shape(cut, second, depth):
  aux = auxnet.auxnet(cut, 0.3, depth, multipliers=second)
  params = jax.eval_shape(aux.init, KEY)
  images = jax.ShapeDtypeStruct((5, *cut.shapes[0]), jnp.float32)
  assert (
    list(params)
    == list(aux.names)
    == [f"aux{k}" for k in range(1, len(cut.stages))]
  )
  for name, shape in zip(aux.names, cut.shapes[1:]):

    def run(params, images, name=name):
      return aux.run(name, params[name], images)

    state, multiplier = jax.eval_shape(run, params, images)
    assert state.shape == (5, *shape)
    assert (multiplier is not None) == second
    if second:
      assert multiplier.shape == state.shape


@pytest.mark.parametrize("cut", [RESNET, MLP], ids=["resnet", "mlp"])
@pytest.mark.parametrize("cost", [0.1, 0.4])
def test_the_widest_within_the_cost(cut, cost):
  aux = auxnet.auxnet(cut, cost)
  room = cost * sum(cut.costs) / len(aux.costs)
  params = jax.eval_shape(aux.init, KEY)
  image = jax.ShapeDtypeStruct((1, *cut.shapes[0]), jnp.float32)
  for name, said, width in zip(aux.names, aux.costs, aux.widths):

    def run(params, image, name=name):
      return aux.run(name, params[name], image)[0]

    assert networks.multiply_adds(run, params, image) == said <= room
    # One unit more would cost at least a share of what all cost.
    assert said * (width + 1) / width > 0.8 * room


def test_a_multiplier_starts_at_zero_and_a_state_does_not():
  aux = auxnet.auxnet(MLP, 0.3, multipliers=True)
  images = jax.random.normal(KEY, (3, 8, 8, 1))

  @jax.jit
  def run(key, images):
    return aux.run("aux1", aux.init(key)["aux1"], images)

  state, multiplier = run(KEY, images)
  assert np.all(np.asarray(multiplier) == 0)
  assert np.abs(state).max() > 0.1


def test_one_stage_has_no_network():
  aux = auxnet.auxnet(chain.chain(MLP.branch, (8, 8, 1), 1))
  assert aux.names == () and aux.init(KEY) == {}


@pytest.mark.slow
@pytest.mark.parametrize("image", [(28, 28, 1), (28, 20, 1), (14, 30, 3)])
@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (1, 2, 3)])
def test_interfaces_that_do_not_divide_the_image(image, cuts):
  branch = networks.convnet(image, 11, (4, 4, 8))
  cut = chain.chain(branch, image, cuts=cuts)
  aux = auxnet.auxnet(cut, 0.9)
  images = jnp.ones((2, *image))

  @jax.jit
  def run(key, images):
    params = aux.init(key)
    return [aux.run(name, params[name], images)[0] for name in aux.names]

  found = run(KEY, images)
  assert [x.shape[1:] for x in found] == list(cut.shapes[1:])


@pytest.mark.parametrize("cost", [0.001, 0.0])
def test_a_cost_for_no_unit_is_refused(cost):
  words = rf"layer_parallel.cost={cost} leaves \d+ multiply-adds to each.*; use"
  with pytest.raises(ValueError, match=words) as caught:
    auxnet.auxnet(MLP, cost)
  enough = float(str(caught.value).rsplit("=", 1)[1])
  assert min(auxnet.auxnet(MLP, enough).widths) >= 1
