"""The comparisons that have a name: rows of a config and its overrides."""

from typing import Any

from experiments import suites_layers, suites_local
from experiments.rows import CE, MOMENTUM, OFF, RATE_0, SCRATCH, Row


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


def _fixed(config: str, memory: int, widths: tuple[int, ...]) -> list[Row]:
  """A network that does not grow, with as many exemplars, then with as much
  memory as the one that does has in the end.

  Args:
    config: of the network that grows.
    memory: exemplars, where what is left of the memory goes there.
    widths: of the network, where it goes there.
  """
  one: dict[str, Any] = CE | {"network.fixed": True, "mesh.head": 1}
  lines: dict[str, dict[str, Any]] = {
    "equal exemplars": {},
    "equal memory by exemplars": {"memory.size": memory},
    "equal memory by width": {"network.widths": widths},
    "fine-tuning": OFF | {"memory.size": 0},
  }
  return [
    Row(f"CE, fixed network, {label}", config, one | more)
    for label, more in lines.items()
  ]


def _subnets(config: str, each: int, n: int) -> list[Row]:
  """Independent subnets beside their baselines; `each` samples a device."""
  spread: dict[str, Any] = {"mesh.subnet": n, "train.batch": each * n}
  methods: dict[str, dict[str, Any]] = {
    "IST": {},
    "IST, fixed subnets": {"subnets.renew": False},
    "local SGD": {"subnets.method": "local_sgd"},
    "data parallel": {"subnets.method": "data_parallel"},
  }
  norms: dict[str, dict[str, Any]] = {
    "": {},
    ", no norm": {"network.norm": "none", "network.output_norm": False},
  }
  return [
    Row(f"n={n} {name}{of}", config, spread | method | norm)
    for of, norm in norms.items()
    for name, method in methods.items()
  ]


def _two_layers(config: str) -> list[Row]:
  """The paper's net of one hidden layer: every weight is in some subnet."""
  one: dict[str, Any] = {"network.widths": (512,)}
  local = one | {"subnets.method": "local_sgd"}
  return [
    Row("n=4 IST, one hidden layer", config, one),
    Row("n=4 local SGD, one hidden layer", config, local),
  ]


def _dealt(config: str) -> list[Row]:
  """The steps that the residual form gained by, one after the other."""
  every = {"subnets.dealt": "all", "subnets.scale": False}
  return [
    Row("all sections", config, every),
    Row("longest section", config, every | {"subnets.dealt": "longest"}),
    Row("longest section, scaled", config),
    Row("local SGD", config, {"subnets.method": "local_sgd"}),
  ]


# Suites of layer-parallel training: a second table says what it costs, and
# what its guesses are worth.
LAYERS = (
  "layer_parallel_readout",
  "layer_parallel_ladder",
  "layer_parallel_fashion",
)
# Suites whose rows are other networks: a second table says what they cost.
COSTS = ("local_cifar10", "local_fashion")


def _rehearsal(config: str, rows: int) -> list[Row]:
  """Sizes of the buffer, rows drawn, both scopes; bounds and a control.

  Args:
    config: with the largest buffer and the fewest rows drawn.
    rows: of the training set.
  """
  share, drawn = "rows held, % of the training set", "rows drawn for a step, r"
  two = {"mesh.data": 2, "memory.draws": 14, "memory.candidates": 28}
  two |= {"train.batch": 112}
  again = {"memory.size": -1, "train.from_scratch": True}
  rest = CE | OFF | {"memory.size": 0}
  return [
    Row("from scratch, CE", config, CE | again),
    Row("from scratch (upper bound)", config, again, bound="upper"),
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
    Row("30 %, r = 7, two workers, global draws", config, two),
    Row(
      "30 %, r = 7, two workers, local draws",
      config,
      two | {"memory.scope": "local"},
    ),
    Row("D-CE without a buffer", config, {"memory.size": 0}, bound="no buffer"),
    Row("incremental, CE (lower bound)", config, rest, bound="lower"),
    Row("30 %, r = 7, learning rate 0 (control)", config, RATE_0),
  ]


def _everything(config: str) -> list[Row]:
  """All at once, a part taken away at a time, and what it must beat."""
  whole: dict[str, Any] = {"objective.name": "end_to_end", "mesh.stage": 1}
  whole |= {"local.cuts": (), "local.mode": "R0", "local.classifier": "1c2f"}
  none = {"memory.size": 0}
  return [
    Row("D-CE, rehearsal, local modules", config),
    Row("D-CE, rehearsal, whole branches", config, whole),
    Row("CE, rehearsal, whole branches", config, whole | CE),
    Row("D-CE, local modules, no rehearsal", config, none),
    Row("fine-tuning (lower bound)", config, whole | CE | OFF | none),
    Row("learning rate 0 (control)", config, RATE_0),
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
    *_fixed("digits", 1_156, (286,)),
    _control("digits"),
  ],
  "everything": _everything("everything"),
  "fashion_5x2": [
    *_losses("fashion_5x2"),
    *_fixed("fashion_5x2", 1_120, (18, 36, 71)),
    _control("fashion_5x2"),
  ],
  "subnets_digits": [
    *(row for n in (2, 4, 8) for row in _subnets("subnets_digits", 32, n)),
    Row("n=4 IST, momentum, reset", "subnets_digits", MOMENTUM),
    Row(
      "n=4 IST, momentum, dealt",
      "subnets_digits",
      MOMENTUM | {"subnets.state": "deal"},
    ),
    Row(
      "n=4 IST, learning rate 0 (control)",
      "subnets_digits",
      {"optimizer.learning_rate": 0.0},
    ),
  ],
  "subnets_wide": [
    *_subnets("subnets_wide", 32, 4)[:4],
    *_two_layers("subnets_wide"),
  ],
  "subnets_cifar10_resnet": _dealt("subnets_cifar10_resnet"),
  "subnets_stream": [
    Row("D-CE, heads as 2 subnets", "subnets_stream"),
    Row(
      "D-CE, whole heads, collected statistics",
      "subnets_stream",
      {"mesh.subnet": 1},
    ),
    Row(
      "D-CE, whole heads",
      "subnets_stream",
      {"mesh.subnet": 1, "subnets.statistics": "running"},
    ),
    Row(
      "D-CE, heads as 2 subnets, running statistics",
      "subnets_stream",
      {"subnets.statistics": "running"},
    ),
    Row(
      "D-CE, heads as 2 subnets, learning rate 0 (control)",
      "subnets_stream",
      {"optimizer.learning_rate": 0.0},
    ),
  ],
  "local_cifar10": suites_local.CIFAR10,
  "local_fashion": suites_local.FASHION,
  "layer_parallel_fashion": suites_layers.FASHION,
  "layer_parallel_readout": suites_layers.READOUT,
  "layer_parallel_ladder": suites_layers.LADDER,
  "rehearsal_fashion_4": _rehearsal("rehearsal_fashion_4", 12_000),
  "cifar10_5x2": [
    make("cifar10_5x2") for make in (_learned, _ce, _none, _fine_tuning)
  ],
}
