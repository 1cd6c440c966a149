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
SOFT: dict[str, Any] = {"corrections": 1, "beta": 0.002, "eta": 50.0}
FASHION = [
  Row(
    "end to end",
    "layer_parallel_fashion",
    {"objective.name": "end_to_end", "layer_parallel.stages": 1},
  ),
  _FASHION("2 stages, 3 corrections", stages=2, corrections=3),
  *(
    _FASHION(
      f"{k} stages, {k - 1} sweeps, {k} corrections",
      stages=k,
      sweeps=k - 1,
      corrections=k,
    )
    for k in (3, 4)
  ),
  *(
    _FASHION(
      f"{k} stages, correction off (control)",
      stages=k,
      **SOFT,
      correction="off",
    )
    for k in (2, 3, 4)
  ),
  _FASHION(
    "4 stages, 1 sweep, 2 corrections", stages=4, sweeps=1, corrections=2
  ),
  *(
    _FASHION(f"{k} stages, 1 correction, soft", stages=k, **SOFT)
    for k in (4, 2)
  ),
]
