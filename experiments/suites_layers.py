"""Comparisons of layer-parallel training."""

import functools
from typing import Any

from experiments.rows import Row


def _layers(label: str, config: str, **fields: Any) -> Row:
  """Layer-parallel training with some of its own fields."""
  return Row(
    label, config, {f"layer_parallel.{k}": v for k, v in fields.items()}
  )


_READOUT = functools.partial(_layers, config="layer_parallel_readout")
LAGRANGIAN: dict[str, Any] = {"method": "lagrangian"}
# A correction that stands on what the stage below made; see the method page.
FRESH: dict[str, Any] = {"beta": 2.0, "eta": 0.5}
READOUT = [
  Row(
    "end to end",
    "layer_parallel_readout",
    {"objective.name": "end_to_end", "layer_parallel.cuts": ()},
  ),
  _READOUT("penalty"),
  _READOUT("augmented Lagrangian, multipliers by network", **LAGRANGIAN),
  _READOUT(
    "augmented Lagrangian, multipliers by sample",
    **LAGRANGIAN,
    multipliers="sample",
  ),
  _READOUT("hybrid: every 4th step serial", serial_every=4),
  _READOUT(
    "hybrid, correction off (control)", serial_every=4, correction="off"
  ),
  _READOUT("correction off (control)", correction="off"),
  _READOUT("no credit (control)", correction="no_credit"),
  _READOUT("penalty, beta 2, eta 1/2, 4 corrections", **FRESH, corrections=4),
]
# Steps between the penalty and four corrections, and what was no step.
LADDER = [
  _READOUT("states by sample, no network", states="sample"),
  _READOUT("penalty, networks of 30 %", cost=0.3),
  _READOUT("penalty, networks of 100 %", cost=1.0),
  Row(
    "penalty, three times the steps",
    "layer_parallel_readout",
    {"train.epochs": 90},
  ),
  _READOUT("penalty, beta 2, eta 1/2", **FRESH),
  *(
    _READOUT(
      f"penalty, beta 2, eta 1/2, {n} corrections", **FRESH, corrections=n
    )
    for n in (2, 3)
  ),
]
_FASHION = functools.partial(_layers, config="layer_parallel_fashion")
OFF: dict[str, Any] = {"correction": "off"}


def _pair(label: str, **fields: Any) -> list[Row]:
  """A row, and the same with the correction off."""
  control = f"{label}, correction off (control)"
  return [_FASHION(label, **fields), _FASHION(control, **fields, **OFF)]


def _steps(k: int, sweeps: int, corrections: int) -> dict[str, Any]:
  return {"stages": k, "sweeps": sweeps, "corrections": corrections}


# One correction of a guess that is to stay one, beta eta = 1/10.
SOFT: dict[str, Any] = {"beta": 0.002, "eta": 50.0}
_EACH = [
  _pair(f"{k} stages as serial as back-propagation", **_steps(k, k - 1, k))
  for k in (2, 3, 4)
]
FASHION = [
  Row(
    "end to end",
    "layer_parallel_fashion",
    {"objective.name": "end_to_end", "layer_parallel.stages": 1},
  ),
  *(full for full, _ in _EACH),
  *(off for _, off in _EACH),
  _FASHION(
    "3 stages as serial, networks not trained",
    **_steps(3, 2, 3),
    rate=0.0,
  ),
  _FASHION("4 stages, 3 sweeps, 2 corrections", **_steps(4, 3, 2)),
  *_pair("4 stages, 1 correction, soft", **_steps(4, 0, 1), **SOFT),
  *_pair("2 stages, 1 correction, soft", **_steps(2, 0, 1), **SOFT),
  # With the correction off this one ends in NaN, so it has no control.
  _FASHION(
    "4 stages, 1 correction, soft, every 2nd step serial",
    **_steps(4, 0, 1),
    **SOFT,
    serial_every=2,
  ),
]
