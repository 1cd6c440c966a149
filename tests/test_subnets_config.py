"""Configurations of subnets: what is built, and what is refused in one line."""

import functools

import jax
import numpy as np
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
  "features that a subnet does not have": (
    {"network__reads": 8},
    "network.reads=8 names features of the whole network",
  ),
  "groups of units that are dealt apart": (
    {"network__norm": "group"},
    "network.norm=group normalises over units",
  ),
  "statistics of another objective": (
    {"objective__name": "local", "network__output_norm": False},
    "subnets.statistics=collected is not offered for objective.name=local",
  ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_named_in_one_line(what):
  changed, words = REFUSED[what]
  with pytest.raises(ValueError) as raised:
    build.parts(digits(**changed))
  message = str(raised.value)
  assert words in message and "use" in message and "\n" not in message


@pytest.mark.parametrize(
  "changed",
  [
    {"network__reads": 8},
    {"network__norm": "group"},
  ],
)
def test_copies_are_whole_networks(changed):
  """What no subnet can have, a copy has."""
  validation.validate(digits(subnets__method="local_sgd", **changed))
  validation.validate(digits(mesh__subnet=1, **changed))


def test_groups_of_a_resnet_stay_together():
  changed = {"widths": (4, 4, 4, 4), "blocks": (1, 3, 1), "norm": "group"}
  changed |= {"name": "resnet", "output_norm": False}
  named = {f"network__{name}": value for name, value in changed.items()}
  parts = build.parts(digits(mesh__subnet=2, **named))
  assert parts.partition.units == {"stage2": 2}


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


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("statistics", ["running", "collected"])
def test_statistics_do_not_go_by_the_number_of_subnets(n, statistics):
  """Else a comparison of subnets with whole heads would be of both."""
  config = digits(mesh__subnet=n, subnets__statistics=statistics)
  collect = build.parts(config).objective.collect
  assert (collect is not None) == (statistics == "collected")


def test_a_whole_branch_can_be_tested_by_its_batch():
  config = digits(mesh__subnet=1, subnets__statistics="batch")
  parts = build.parts(config)
  params, stats, _ = parts.objective.init(jax.random.key(0))
  images = parts.dataset.test_images[:4] / 16.0

  @functools.partial(jax.vmap, axis_name="data")  # of one device
  def predict(images):
    return parts.objective.predict(params, stats, images)

  together, alone = predict(images[None]), predict(images[None, :2])
  assert not np.allclose(together[:, :2], alone, atol=0.01)


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
def test_no_two_rows_of_a_suite_are_the_same_run(suite):
  configs = [compare.configure(row, 0) for row in suites.SUITES[suite]]
  assert len({config_lib.to_json(config) for config in configs}) == len(configs)


def test_the_stream_is_compared_with_whole_heads_tested_alike():
  rows = {row.label: row for row in suites.SUITES["subnets_stream"]}
  first, whole = (
    compare.configure(rows[label], 0)
    for label in (
      "D-CE, heads as 2 subnets", "D-CE, whole heads, collected statistics"
    )
  )  # fmt: skip
  assert (first.mesh.subnet, whole.mesh.subnet) == (2, 1)
  whole.mesh.subnet = 2
  assert config_lib.to_json(first) == config_lib.to_json(whole)


def test_the_wide_suite_has_the_paper_s_two_layers_and_three():
  configs = [compare.configure(r, 0) for r in suites.SUITES["subnets_wide"]]
  found = {(c.network.widths, c.subnets.method) for c in configs}
  for widths in (512, 512), (512,):
    assert {(widths, "ist"), (widths, "local_sgd")} <= found
