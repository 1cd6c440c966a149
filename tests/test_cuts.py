"""Published cuts, and the shapes that modules hand on."""

import itertools

import numpy as np
import pytest

from mhil import cuts, networks
from tests.golden_fill import load

RESNETS = {depth: networks.resnet_cifar(depth, 10) for depth in (32, 110)}


@pytest.mark.parametrize(
  "file, k, balanced",
  [
    ("contsup_r32_k4_R0", 4, False),
    ("contsup_r32_k8_R2", 8, False),
    ("contsup_r32_k16_R1", 16, False),
    ("contsup_r32_k8bal_E", 8, True),
  ],
)
def test_lists_are_those_of_the_released_code(file, k, balanced):
  got = cuts.published("resnet32", k, balanced)
  want = [
    f"stage{stage}.block{block}" if stage else "stem"
    for stage, block in load(f"{file}_fill")["cuts"]
  ]
  assert [*got] == want


@pytest.mark.parametrize("depth", RESNETS)
@pytest.mark.parametrize("lists", [cuts.PUBLISHED, cuts.BALANCED])
def test_every_list_cuts_its_branch(depth, lists):
  branch = RESNETS[depth]
  for k in lists[branch.name]:
    where = cuts.published(branch.name, k, lists is cuts.BALANCED)
    modules = cuts.modules(branch, where)
    assert len(modules) == k and all(modules)
    chain = [name for module in modules for name in module]
    assert (*chain, "readout") == branch.pieces
    assert [module[-1] for module in modules[:-1]] == [*where]


def test_equal_depth_is_what_the_lists_are_for():
  for k in cuts.PUBLISHED["resnet110"]:
    modules = cuts.modules(RESNETS[110], k)
    sizes = np.array([len(module) for module in modules])
    # In pieces; the stem is one, and its module may have one more.
    assert np.ptp(sizes) <= 2


def test_one_module_has_no_cut():
  branch = networks.mlp(4, 2, (3, 3))
  assert cuts.published("mlp", 1) == ()
  assert cuts.modules(branch, 1) == (("dense0", "dense1"),)


@pytest.mark.parametrize(
  "name, k", [("resnet32", 3), ("mlp", 2), ("resnet32", 0)]
)
@pytest.mark.parametrize("balanced", [True, False])
def test_a_number_without_a_list_is_refused(name, k, balanced):
  kind = "balanced" if balanced else "published"
  with pytest.raises(
    ValueError, match=f"={k} has no {kind} list for {name}; use"
  ):
    cuts.published(name, k, balanced)


def test_interfaces_have_the_shapes_that_pieces_hand_on():
  branch = networks.resnet_cifar(32, 11)
  shapes = cuts.interfaces(branch, (32, 32, 3), cuts.modules(branch, 4))
  assert shapes == [
    (32, 32, 3),
    (32, 32, 16),
    (16, 16, 32),
    (8, 8, 64),
    (8, 8, 64),
    (11,),
  ]
  branch = networks.mlp(12, 5, (7, 6), "batch", axis="data")
  modules = cuts.modules(branch, ["dense0"])
  assert cuts.interfaces(branch, (2, 2, 3), modules) == [
    (2, 2, 3),
    (7,),
    (6,),
    (5,),
  ]


# -- cuts by measured memory -------------------------------------------------


@pytest.mark.parametrize(
  "costs, parts, begins",
  [
    ([5], 1, ()),
    ([1, 1, 1, 1], 2, (2,)),
    ([4, 1, 1, 1, 1], 2, (1,)),
    ([1, 1, 1, 1, 4], 2, (4,)),
    ([3, 3, 3], 3, (1, 2)),
    ([9, 1, 1, 9, 1], 3, (1, 3)),
  ],
)
def test_the_dearest_part_is_as_cheap_as_can_be(costs, parts, begins):
  assert cuts.balance(costs, parts) == begins


def test_balance_is_as_good_as_the_best_of_all():
  rng = np.random.default_rng(0)
  for _ in range(20):
    costs = rng.integers(1, 20, 7).tolist()

    def dearest(begins, costs=costs):
      return max(map(sum, np.split(costs, begins)))

    every = itertools.combinations(range(1, 7), 2)
    got = cuts.balance(costs, 3)
    assert dearest(list(got)) == min(dearest(list(b)) for b in every)


def test_measured_cuts_even_out_memory():
  """A branch whose first pieces hold most is cut early, unlike by depth."""
  branch = networks.convnet((16, 16, 3), 4, (8, 8, 8), axis="data")
  held = cuts.memory(branch, (16, 16, 3), 4)
  assert len(held) == 3 and held[0] > held[1] > held[2] > 0
  assert cuts.measured(branch, (16, 16, 3), 2, 4) == ("conv0",)
  assert cuts.measured(branch, (16, 16, 3), 1, 4) == ()
  assert cuts.measured(branch, (16, 16, 3), 3, 4) == ("conv0", "conv1")
  with pytest.raises(ValueError, match=r"local\.modules=4 is more than the 3"):
    cuts.measured(branch, (16, 16, 3), 4)


def test_one_module_compiles_nothing(monkeypatch):
  monkeypatch.setattr(cuts, "_temporary", None)
  branch = networks.mlp(8, 3, (8, 8), axis="data")
  assert cuts.measured(branch, (8,), 1) == ()
  with pytest.raises(TypeError):  # The control: two modules would.
    cuts.measured(branch, (8,), 2)


def test_equal_pieces_are_compiled_once(monkeypatch):
  compiled, real = [], cuts._temporary

  def spy(piece, given, mesh):
    compiled.append(piece)
    return real(piece, given, mesh)

  monkeypatch.setattr(cuts, "_temporary", spy)
  branch = networks.mlp(8, 3, (8, 8, 8, 8), axis="data")
  held = cuts.memory(branch, (8,), 4)
  assert len(held) == 4 and len(compiled) == 1
