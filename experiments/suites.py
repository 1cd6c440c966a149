"""The comparisons that have a name: rows of a config and its overrides."""

import functools
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
    bound: drawn as a line that goes with every curve.
  """

  label: str
  config: str
  overrides: Mapping[str, Any] = {}
  at: Mapping[str, float] = {}
  curve: str = ""
  bound: bool = False


CE = {"loss.name": "ce"}
OFF = {"loss.correction": "off"}
SCRATCH = CE | {"memory.size": -1, "train.from_scratch": True}
RATE_0 = {"optimizer.learning_rate": 0.0}


def _learned(config: str) -> Row:
  return Row("D-CE learned", config)


def _ce(config: str) -> Row:
  return Row("CE", config, CE)


def _none(config: str) -> Row:
  return Row("D-CE none (floor)", config, {"loss.reference": "none"})


def _fine_tuning(config: str) -> Row:
  return Row("fine-tuning (lower bound)", config, CE | OFF | {"memory.size": 0})


def _control(config: str) -> Row:
  return Row("D-CE, learning rate 0 (control)", config, RATE_0)


def _losses(config: str) -> list[Row]:
  return [
    _learned(config),
    Row("distributed CE", config, {"loss.name": "distributed_ce"}),
    _ce(config),
    _none(config),
    Row("joint training (upper bound)", config, SCRATCH),
    _fine_tuning(config),
  ]


# Pieces of ResNet-14 after which a module ends, by the number of modules.
CUTS = {2: (3,), 4: (1, 3, 5), 7: (0, 1, 2, 3, 4, 5)}


def _local(mode: str, k: int) -> Row:
  # In two modules R1E is E: a cut's second encoder would see the image again.
  return Row(
    f"{mode}, {k} modules",
    "local_fashion",
    {"local.mode": mode, "local.cuts": CUTS[k]},
  )


LOCAL = [
  Row("end to end", "local_fashion", {"local.cuts": (), "local.mode": "R0"}),
  *(
    _local(mode, k)
    for k in (7, 4, 2)
    for mode in ("R0", "R1E", "E")
    if (mode, k) != ("R1E", 2)
  ),
  Row(
    "end to end with the encoders of E, 7",
    "local_fashion",
    {"local.isolated": False},
  ),
  Row(
    "E, 7 modules, learning rate 0 (control)",
    "local_fashion",
    {"optimizer.learning_rate": 0.0},
  ),
]


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
# Suites of layer-parallel training: a second table says what it costs, and
# what its guesses are worth.
LAYERS = (
  "layer_parallel_readout",
  "layer_parallel_ladder",
  "layer_parallel_fashion",
)
# Suites whose rows are other networks: a second table says what they cost.
COSTS = ("local_fashion",)


def _rehearsal(config: str, rows: int) -> list[Row]:
  """Sizes of the buffer, rows drawn, both scopes; bounds and a control.

  Args:
    config: with the largest buffer and the fewest rows drawn.
    rows: of the training set.
  """
  share, drawn = "rows held, % of the training set", "rows drawn for a step, r"
  two = {"mesh.data": 2, "memory.draws": 14}
  rest = CE | OFF | {"memory.size": 0}
  return [
    Row("from scratch (upper bound)", config, SCRATCH, bound=True),
    *(
      Row(
        f"{p} %, r = 7",
        config,
        {"memory.size": p * rows // 100},
        {share: p} | ({drawn: 7} if p == 30 else {}),
        "rehearsal",
      )
      for p in (30, 20, 10, 5)
    ),
    *(
      Row(
        f"30 %, r = {r}", config, {"memory.draws": r}, {drawn: r}, "rehearsal"
      )
      for r in (14, 28, 56)
    ),
    Row("30 %, r = 14, two workers, global draws", config, two),
    Row(
      "30 %, r = 14, two workers, local draws",
      config,
      two | {"memory.scope": "local"},
    ),
    Row("D-CE without a buffer", config, {"memory.size": 0}, bound=True),
    Row("incremental (lower bound)", config, rest, bound=True),
    Row("30 %, r = 7, learning rate 0 (control)", config, RATE_0),
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
  "local_fashion": LOCAL,
  "layer_parallel_fashion": FASHION,
  "layer_parallel_readout": READOUT,
  "layer_parallel_ladder": LADDER,
  "rehearsal_fashion_4": _rehearsal("rehearsal_fashion_4", 12_000),
  "cifar10_5x2": [
    make("cifar10_5x2") for make in (_learned, _ce, _none, _fine_tuning)
  ],
}
