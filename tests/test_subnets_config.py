"""Configurations of subnets: what is built, and what is refused in one line."""

import pytest

from experiments import build, cli, compare, suites
from mhil import config as config_lib
from mhil import partitions, sharding, validation

DIGITS = cli.CONFIGS / "subnets_digits.py"


def digits(**changed):
  config = cli.load_config(DIGITS)
  for field, value in changed.items():
    config_lib.assign(config, field.replace("__", "."), value)
  return config


REFUSED = {
  "widths that do not divide": (
    {"network__widths": (128, 30)},
    "network.widths=(128, 30)",
  ),
  "nothing to cut": (
    {"network__name": "convnet", "network__output_norm": False},
    "network.name=convnet has nothing to cut",
  ),
  "more subnets than blocks": (
    {
      "network__name": "resnet",
      "network__output_norm": False,
      "network__widths": (4, 4, 4, 4),
      "network__blocks": (1, 4, 1),
    },
    "mesh.subnet=4 is more than the 3 blocks",
  ),
  "no local step": (
    {"subnets__local_steps": 0},
    "subnets.local_steps=0",
  ),
  "a batch that does not divide": (
    {"train__batch": 30},
    "train.batch=30",
  ),
  "draws that do not divide": (
    {"memory__size": 20, "memory__draws": 6, "memory__selection": "stream"},
    "memory.draws=6",
  ),
  "blocks without their network": (
    {"network__blocks": (1, 2)},
    "network.blocks=(1, 2)",
  ),
  "a resnet without blocks": (
    {"network__name": "resnet", "network__output_norm": False},
    "network.blocks=()",
  ),
  "an empty section": (
    {
      "network__name": "resnet",
      "network__output_norm": False,
      "network__widths": (4, 4, 4),
      "network__blocks": (0, 2),
    },
    "network.blocks=(0, 2)",
  ),
  "widths that are not the sections'": (
    {
      "network__name": "resnet",
      "network__output_norm": False,
      "network__widths": (4, 4),
      "network__blocks": (1, 2),
    },
    "network.widths=(4, 4)",
  ),
  "logits of another network": (
    {"network__name": "convnet"},
    "network.output_norm=true",
  ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_named_in_one_line(what):
  changed, words = REFUSED[what]
  with pytest.raises(ValueError) as raised:
    build.parts(digits(**changed))
  message = str(raised.value)
  assert words in message and "use" in message and "\n" not in message


def test_a_stage_is_still_refused():
  with pytest.raises(ValueError, match=r"mesh\.stage=2"):
    validation.validate(digits(mesh__stage=2))


def test_subnets_have_their_share_of_each_layer():
  parts = build.parts(digits())
  assert parts.partition.units == {"dense0": 128, "dense1": 128}
  assert parts.partition.parts == 4 and parts.partition.every == 20
  assert parts.objective.collect is not None
  assert sharding.AXES[-1] == "subnet" and parts.mesh.shape["subnet"] == 4


def test_baselines_are_whole_copies():
  local = build.parts(digits(subnets__method="local_sgd"))
  assert local.partition.units == {} and local.partition.every == 20
  joint = build.parts(digits(subnets__method="data_parallel"))
  assert joint.partition.every == 0


def test_without_the_axis_nothing_is_cut():
  assert build.parts(digits(mesh__subnet=1)).partition is partitions.NONE


def test_a_resnet_is_cut_between_its_blocks():
  parts = build.parts(
    digits(
      mesh__subnet=2,
      network__name="resnet",
      network__output_norm=False,
      network__widths=(4, 4, 4, 4),
      network__blocks=(1, 3, 1),
    )
  )
  assert parts.partition.units == {"stage2": 2}


@pytest.mark.parametrize(
  "suite", [name for name in suites.SUITES if name.startswith("subnets")]
)
def test_a_suite_names_every_method_it_compares(suite):
  configs = [compare.configure(row, 0) for row in suites.SUITES[suite]]
  assert len({config_lib.to_json(config) for config in configs}) == len(configs)
