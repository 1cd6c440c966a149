"""Every field that cannot be meant is named, with its value and the fix."""

import dataclasses
import json

import pytest

from mhil import config as config_lib
from mhil import limits, modules, validation


def changed(field, value):
  config = config_lib.Config()
  config_lib.assign(config, field, value)
  return config


def refused(field, value):
  with pytest.raises(ValueError) as raised:
    validation.validate(changed(field, value))
  message = str(raised.value)
  assert field in message and "use" in message and "\n" not in message
  return message


FIELDS = config_lib.flatten(config_lib.to_dict(config_lib.Config()))


def test_defaults_are_valid():
  validation.validate(config_lib.Config())


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_refuses_every_other_type(field):
  kind = type(FIELDS[field])
  samples = [True, 1, 0.5, "text", (1,), [1], None, {"a": 1}]
  for value in samples:
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
      message = refused(field, value)
      assert limits.KINDS[kind] in message


@pytest.mark.parametrize("value", [(1.5,), ("a",), (True,), ((1,),)])
def test_a_tuple_holds_whole_numbers_only(value):
  assert repr(value) in refused("network.widths", value)


@pytest.mark.parametrize("field", limits.CHOICES)
def test_a_choice_lists_what_is_known(field):
  message = refused(field, "nonsense")
  assert all(known in message for known in limits.CHOICES[field])


@pytest.mark.parametrize("field", limits.RANGE)
def test_a_number_stays_in_its_range(field):
  least, most = limits.RANGE[field]
  kind = type(FIELDS[field])
  assert f"use {least}" in refused(field, kind(least - 1))
  if most < limits.INF:
    assert str(most) in refused(field, kind(most + 1))
  if kind is float:
    refused(field, float("nan"))
    refused(field, float("inf"))
    refused(field, float("-inf"))
  elif most == limits.INF:
    assert "to 2147483647" in refused(field, 2**31)
  if kind is float:
    # Neither a float32 nor, where a file writes it out, a float64.
    for huge in 1e39, 10**400:
      assert f"use {least} to " in refused(field, huge)


@pytest.mark.parametrize("field", limits.RANGE)
def test_the_ends_of_a_range_are_allowed(field):
  config = changed("train.batch", 8)
  if field.startswith("local."):  # Read by local learning only.
    config.objective.name = "local"
  for end in limits.RANGE[field]:
    if end < limits.INF:
      config_lib.assign(config, field, type(FIELDS[field])(end))
      validation.validate(config)


def test_every_number_has_a_range():
  numbers = {f for f, v in FIELDS.items() if type(v) in (int, float)}
  assert numbers == limits.RANGE.keys()


@pytest.mark.parametrize("field", ["network.widths", "stream.order", "heads"])
def test_a_tuple_holds_what_a_device_can_count(field):
  assert "below 2**31" in refused(field, (1, 2**31))


def test_a_resnet_of_a_million_blocks_is_refused_before_it_is_built():
  changes = {"name": "resnet", "norm": "batch", "widths": (4, 4)}
  config = config_lib.Config()
  for name, value in changes.items():
    config_lib.assign(config, f"network.{name}", value)
  config.network.blocks = (1000,)
  validation.validate(config)
  config.network.blocks = (10**6,)
  with pytest.raises(ValueError, match=r"blocks=\(1000000,\) .* than 1000"):
    validation.validate(config)


@pytest.mark.parametrize("widths", [(), (0,), (8, -1)])
def test_a_network_has_positive_widths(widths):
  assert "(64,)" in refused("network.widths", widths)


@pytest.mark.parametrize("group", ["mesh", "train"])
@pytest.mark.parametrize("value", [3, None, config_lib.Data()])
def test_a_group_of_another_kind_is_refused(group, value):
  config = config_lib.Config()
  setattr(config, group, value)
  with pytest.raises(ValueError, match=rf"{group}\.\w+=None is not"):
    validation.validate(config)


def test_text_holds_every_field_and_depends_on_values_only():
  config = changed("network.widths", (3, 4))
  held = config_lib.flatten(json.loads(config_lib.to_json(config)))
  assert held.keys() == FIELDS.keys() and held["network.widths"] == [3, 4]
  again = changed("network.widths", (3, 4))
  assert config_lib.to_json(config) == config_lib.to_json(again)


def test_configurations_share_nothing():
  config_lib.Config().mesh.head = 7
  assert config_lib.Config().mesh.head == FIELDS["mesh.head"]


def test_a_mistyped_field_cannot_be_set():
  with pytest.raises(AttributeError):
    config_lib.Config().train.epoch = 3  # type: ignore[attr-defined]
  with pytest.raises(TypeError, match="epoch"):
    config_lib.Train(epoch=3)  # type: ignore[call-arg]
  with pytest.raises(ValueError, match=r"train\.epoch=3 is not a field"):
    changed("train.epoch", 3)


def test_validation_changes_nothing():
  config = config_lib.Config()
  validation.validate(config)
  assert dataclasses.asdict(config) == dataclasses.asdict(config_lib.Config())


# -- local learning ----------------------------------------------------------


def test_choices_are_those_of_the_library():
  for field, known in modules.CHOICES.items():
    assert limits.CHOICES[f"local.{field}"] == known


def local(**changes):
  """A valid configuration with local learning, changed."""
  config = changed("objective.name", "local")
  config_lib.assign(config, "local.modules", 4)
  for field, value in changes.items():
    config_lib.assign(config, field.replace("__", "."), value)
  return config


def test_local_learning_is_valid():
  validation.validate(local())
  validation.validate(local(loss__name="ce", local__loss="contrast"))
  validation.validate(local(loss__name="ce", local__isolated=False))
  validation.validate(local(loss__name="ce", local__modules=1))
  validation.validate(local(local__modules=1, local__cuts=(2, 3)))


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"objective__name": "end_to_end"}, "local.modules=4 .* cut nothing"),
    (
      {
        "objective__name": "end_to_end",
        "local__modules": 1,
        "local__cuts": (1,),
      },
      r"local.cuts=\(1,\) cut nothing",
    ),
    ({"local__cuts": (1,)}, "both say where to cut; use local.modules=1"),
    (
      {
        "local__cuts": (1,),
        "local__modules": 1,
        "local__lists": "measured",
      },
      r"local.lists=measured is not read with local.cuts=\(1,\); use",
    ),
    (
      {"loss__name": "ce"},
      "loss.name=ce couples the heads.* use loss.name=dce",
    ),
  ],
)
def test_local_learning_that_cannot_be_meant(changes, words):
  with pytest.raises(ValueError, match=words):
    validation.validate(local(**changes))


UNREAD = {
  "lists": "balanced",
  "mode": "E",
  "classifier": "0c1f",
  "loss": "contrast",
  "restore_first": 1.0,
  "restore_last": 1.0,
  "task_first": 0.5,
  "task_last": 0.5,
  "isolated": False,
}


@pytest.mark.parametrize("objective", ["end_to_end", "layer_parallel"])
@pytest.mark.parametrize("field", UNREAD)
def test_what_local_learning_alone_reads_is_refused_elsewhere(field, objective):
  config = changed(f"local.{field}", UNREAD[field])
  config.objective.name = objective
  words = rf"local\.{field}={UNREAD[field]} is not read .*use objective\.name"
  with pytest.raises(ValueError, match=words):
    validation.validate(config)
  config.objective.name = "local"
  validation.validate(config)


def test_every_field_of_local_learning_is_refused_elsewhere():
  fields = {field.name for field in dataclasses.fields(config_lib.Local)}
  assert fields == set(UNREAD) | {"modules", "cuts"}


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      {"objective__name": "end_to_end", "local__modules": 1},
      "mesh.stage=2 would do the same work .* use mesh.stage=1",
    ),
    (
      {"optimizer__clip": 1.0},
      "optimizer.clip=1.0 asks for the norm .* use optimizer.clip=0",
    ),
  ],
)
def test_stages_that_cannot_be_meant(changes, words):
  validation.validate(local(mesh__stage=2))
  with pytest.raises(ValueError, match=words):
    validation.validate(local(mesh__stage=2, **changes))


def test_normalised_logits_are_of_whole_branches():
  config = changed("network.output_norm", True)
  validation.validate(config)
  config.objective.name, config.local.cuts = "local", (0,)
  with pytest.raises(
    ValueError, match=r"network\.output_norm=true .*end_to_end"
  ):
    validation.validate(config)


@pytest.mark.parametrize(
  "field, value, fix",
  [
    ("loss.name", "dce", "ce"),
    ("loss.name", "distributed_ce", "ce"),
    ("objective.name", "local", "end_to_end"),
    ("objective.name", "layer_parallel", "end_to_end"),
    ("train.train_heads", "new", "all"),
    ("train.train_heads", "readout", "all"),
    ("mesh.head", 5, 1),
  ],
)
def test_a_fixed_network_has_no_other_heads(field, value, fix):
  config = config_lib.Config()
  config.network.fixed, config.loss.name = True, "ce"
  validation.validate(config)
  config_lib.assign(config, field, value)
  with pytest.raises(ValueError) as raised:
    validation.validate(config)
  assert str(raised.value) == (
    f"{field}={value} is not for the one head of network.fixed=true; use "
    f"{field}={fix} or network.fixed=false"
  )


def test_a_fixed_network_is_not_trained_by_head():
  config = config_lib.Config(heads=(0, 2))
  validation.validate(config)
  config.network.fixed, config.loss.name = True, "ce"
  with pytest.raises(ValueError, match=r"^heads=0,2 is not for the .* leave"):
    validation.validate(config)
