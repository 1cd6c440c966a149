"""Lines of a comparison, and overrides that many of them share."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
  """One line of a table.

  Attributes:
    label: what the line says it is.
    config: name of a file in `configs/`.
    overrides: `{"group.field": value}`.
    at: where the row lies in a figure, `{name of a number: its value}`; rows
      that share a number are a curve.
    curve: the name of that curve.
    bound: `upper`, `lower` or another name: drawn as a line that goes with
      every curve; distances from the last of the first two are tabled.
  """

  label: str
  config: str
  overrides: Mapping[str, Any] = {}
  at: Mapping[str, float] = {}
  curve: str = ""
  bound: str = ""


CE = {"loss.name": "ce"}
OFF = {"loss.correction": "off"}
MOMENTUM = {"optimizer.momentum": 0.9, "optimizer.learning_rate": 0.02}
SCRATCH = CE | {"memory.size": -1, "train.from_scratch": True}
RATE_0 = {"optimizer.learning_rate": 0.0}
