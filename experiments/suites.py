"""The comparisons that have a name: rows of a config and its overrides."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
  """One line of a table.

  Attributes:
    label: what the line says it is.
    config: name of a file in `configs/`.
    overrides: `{"group.field": value}`.
  """

  label: str
  config: str
  overrides: Mapping[str, Any] = {}


CE = {"loss.name": "ce"}
OFF = {"loss.correction": "off"}


def _learned(config: str) -> Row:
  return Row("D-CE learned", config)


def _ce(config: str) -> Row:
  return Row("CE", config, CE)


def _none(config: str) -> Row:
  return Row("D-CE none (floor)", config, {"loss.reference": "none"})


def _fine_tuning(config: str) -> Row:
  return Row("fine-tuning (lower bound)", config, CE | OFF | {"memory.size": 0})


def _control(config: str) -> Row:
  return Row(
    "D-CE, learning rate 0 (control)", config, {"optimizer.learning_rate": 0.0}
  )


def _losses(config: str) -> list[Row]:
  return [
    _learned(config),
    Row("distributed CE", config, {"loss.name": "distributed_ce"}),
    _ce(config),
    _none(config),
    Row(
      "joint training (upper bound)",
      config,
      CE | {"memory.size": -1, "train.from_scratch": True},
    ),
    _fine_tuning(config),
  ]


SUITES: dict[str, list[Row]] = {
  "digits": [
    *_losses("digits"),
    Row("D-CE zero", "digits", {"loss.reference": "zero"}),
    Row("D-CE per_class", "digits", {"loss.reference": "per_class"}),
    Row("D-CE learned, correction off", "digits", OFF),
    Row("CE, correction off", "digits", CE | OFF),
    Row("D-CE, old heads readout", "digits", {"train.train_heads": "readout"}),
    Row(
      "CE, old heads readout", "digits", CE | {"train.train_heads": "readout"}
    ),
    Row("D-CE, old heads frozen", "digits", {"train.train_heads": "new"}),
    _control("digits"),
  ],
  "fashion_5x2": [*_losses("fashion_5x2"), _control("fashion_5x2")],
  "cifar10_5x2": [
    make("cifar10_5x2") for make in (_learned, _ce, _none, _fine_tuning)
  ],
}
