"""What `tests.fuzz` draws from: values that make sense, and some that do not.

Names of data sets stand for folders that `tests.fuzz` makes.
"""

from mhil import config as config_lib
from mhil import limits

# Ten classes in each: 2x2 grey, 8x8 colour with crops and flips, vectors.
SETS = "small", "picture", "flat"

BASE = {
  "data.name": "small",
  "network.widths": (8,),
  "memory.size": 20,
  "memory.draws": 4,
  "memory.candidates": 4,
  "train.epochs": 2,
  "train.batch": 8,
  "train.log_every": 2,
}
RESNET = {
  "data.name": "picture",
  "network.name": "resnet",
  "network.blocks": (1, 2),
  "network.widths": (4, 4, 8),
  "network.norm": "batch",
}
RESNET_OF_MANY = {**RESNET, "network.blocks": (2, 3)}
CONVNET = {
  "data.name": "picture",
  "network.name": "convnet",
  "network.widths": (4, 8),
}
LOCAL = {
  "objective.name": "local",
  "local.cuts": (0,),
  "local.classifier": "0c1f",
  "network.widths": (8, 8),
}
MAPS = {**LOCAL, **CONVNET, "local.classifier": "1c1f"}
LAYERS = {
  "objective.name": "layer_parallel",
  "layer_parallel.stages": 2,
  "layer_parallel.sweeps": 1,
  "layer_parallel.cost": 0.9,
  "network.widths": (16, 8),
}
KEPT = {
  "layer_parallel.method": "lagrangian",
  "layer_parallel.states": "sample",
  "layer_parallel.multipliers": "sample",
}
# Each is meant to train.
WAYS = (
  {},
  {"network.widths": (16, 8), "network.norm": "batch"},
  {"network.output_norm": True, "optimizer.name": "sgd"},
  {"network.reads": 4, "mesh.data": 2},
  {"data.name": "flat", "data.streamed": True},
  {"stream.sizes": (3, 4, 3), "mesh.data": 2, "mesh.head": 2},
  {"loss.name": "ce", "mesh.head": 2},
  {"loss.name": "distributed_ce", "mesh.head": 5},
  {"network.fixed": True, "loss.name": "ce", "mesh.data": 2},
  {"train.train_heads": "new", "checkpoint.every": 1},
  {"train.train_heads": "readout", "train.balanced_epochs": 1},
  {"train.from_scratch": True, "memory.size": -1},
  {"memory.selection": "herding", "memory.policy": "per_class"},
  {"memory.policy": "reservoir", "memory.place": "host"},
  {"memory.scope": "local", "mesh.data": 2},
  {"optimizer.schedule": "steps", "optimizer.milestones": (1,)},
  {"heads": (0, 2)},
  CONVNET,
  {**CONVNET, "network.norm": "group", "data.augment": False},
  RESNET,
  {**RESNET, "network.norm": "group", "network.dtype": "bfloat16"},
  LOCAL,
  {**LOCAL, "mesh.stage": 2},
  {**MAPS, "local.mode": "R1", "local.restore_first": 1.0},
  {**LOCAL, "local.loss": "contrast", "memory.size": 0},
  MAPS,
  {**LOCAL, "local.cuts": (), "local.modules": 2, "local.lists": "measured"},
  LAYERS,
  {**LAYERS, "mesh.stage": 2},
  {**LAYERS, **CONVNET, "layer_parallel.depth": 1},
  {**LAYERS, **KEPT, "mesh.stage": 2},
  {**LAYERS, **KEPT, "mesh.head": 2},
  {"mesh.subnet": 2, "network.widths": (8, 8), "subnets.local_steps": 1},
  {"mesh.subnet": 2, "subnets.method": "local_sgd", "subnets.local_steps": 2},
  {"mesh.subnet": 2, "subnets.method": "data_parallel", "mesh.head": 2},
  {"mesh.subnet": 2, "subnets.statistics": "collected", "mesh.data": 2},
  {"mesh.subnet": 2, "subnets.local_steps": 1, **RESNET_OF_MANY},
)

# Values of numbers and tuples; truths and names have theirs in `sensible`.
NUMBERS = {
  "seed": (0, 7, 2**32 - 1),
  "heads": ((), (0,), (2,), (0, 1), (1, 4)),
  "mesh.data": (1, 2, 4),
  "mesh.head": (1, 2, 3, 5),
  "mesh.stage": (1, 2, 3),
  "mesh.subnet": (1, 2, 4),
  "data.limit": (0, 1, 4, 12),
  "stream.base": (0, 2, 4, 10),
  "stream.increment": (1, 2, 3, 5, 10),
  "stream.sizes": ((), (3, 4, 3), (10,), (1, 9), (2, 2, 2, 2, 2)),
  "stream.order": ((), tuple(range(10)), tuple(range(9, -1, -1))),
  "stream.order_seed": (-1, 0, 1993),
  "network.widths": ((4,), (16,), (8, 8), (16, 8), (4, 4, 8), (6, 10, 4, 4)),
  "network.blocks": ((), (1,), (1, 1), (2, 1), (1, 1, 1)),
  "network.reads": (0, 1, 2, 4),
  "subnets.local_steps": (1, 2, 20),
  "local.modules": (1, 2, 3, 4),
  "local.cuts": ((), (0,), (1,), (0, 1), (2,)),
  "local.restore_first": (0.0, 0.5, 1),
  "local.restore_last": (0.0, 0.5),
  "local.task_first": (0.0, 1.0, 2.0),
  "local.task_last": (0.0, 1.0, 0.5),
  "layer_parallel.stages": (1, 2, 3),
  "layer_parallel.cuts": ((), (1,), (1, 2), (2,)),
  "layer_parallel.beta": (0.0, 0.1, 10.0),
  "layer_parallel.eta": (0.0, 0.1, 1.0),
  "layer_parallel.sweeps": (0, 1, 2),
  "layer_parallel.corrections": (1, 2),
  "layer_parallel.serial_every": (0, 1, 3),
  "layer_parallel.cost": (0.01, 0.1, 0.5, 1.0),
  "layer_parallel.depth": (1, 2, 3),
  "layer_parallel.rate": (0.0, 0.1, 1.0),
  "loss.smoothing": (0.0, 0.1, 0.99),
  "memory.size": (-1, 0, 10, 20, 50, 100),
  "memory.draws": (1, 2, 4, 8, 12),
  "memory.candidates": (0, 2, 4, 8),
  "optimizer.learning_rate": (0.0, 1e-3, 0.1, 1.0),
  "optimizer.momentum": (0.0, 0.9, 1.0),
  "optimizer.weight_decay": (0.0, 5e-4, 0.1),
  "optimizer.clip": (0.0, 0.1, 1.0),
  "optimizer.milestones": ((), (1,), (1, 2)),
  "optimizer.factor": (0.0, 0.1, 1.0),
  "optimizer.percents": ((), (10,), (20, 4)),
  "optimizer.warm_up": (0, 1, 2),
  "train.epochs": (1, 2, 3),
  "train.batch": (1, 2, 4, 8, 16, 24),
  "train.balanced_epochs": (0, 1, 2),
  "train.balanced_rate": (0.0, 1e-4),
  "train.log_every": (1, 2, 50),
  "checkpoint.every": (0, 1, 2),
  "checkpoint.keep": (1, 3),
}
NAMES = {
  "layer_parallel.correction": ("full", "no_credit", "off"),
  "data.name": (*SETS, "digits"),
  "data.folder": ("", "nowhere"),
  "data.image": ("image", "photo"),
  "data.label": ("label", "fine label"),
}
# 18 to 110 layers compile for minutes on two cores.
SLOW = {f"resnet{depth}" for depth in (20, 32, 110, 18)} | {"resnet18_imagenet"}

LARGE = 2**31 - 1, 2**31, 2**63, 10**30
SENSELESS = {
  bool: (None, 1, "yes", 0.5),
  int: (-1, 0, -(2**31), 7, 100, 10**6, *LARGE, None, True, "3", 2.5),
  float: (
    *(-1.0, 0, 2, 1e-30, 1e30, 3e38, 1e308, 10**400),
    *(float("nan"), float("inf"), None, True, "fast"),
  ),
  str: (
    *("", " ", "nothing", "Adam", "two\nlines", "x" * 500, "a=b; use c"),
    *("arrays:", "arrays:nowhere", "arrays:\0", "arrays:" + "x" * 300),
    *("arrays:~nobody/x", "../..", None, 3),
  ),
  tuple: (
    *((0,), (-1,), (1,), (1, 1), (3, 2, 1), (100,), (1,) * 50, (10**6,)),
    *((2**40,), (10**30, 1), (1.5,), ("a",), (True,), [1, 2], "1,", None),
  ),
}


def defaults() -> dict:
  """Every field and its default."""
  return config_lib.flatten(config_lib.to_dict(config_lib.Config()))


def sensible(field: str, default) -> tuple:
  """Values that some configuration could have."""
  if isinstance(default, bool):
    return False, True
  if field in limits.CHOICES:
    return tuple(x for x in limits.CHOICES[field] if x not in SLOW)
  return (NUMBERS | NAMES)[field]


def senseless(default) -> tuple:
  """Values that hardly any could have, by the type of the default."""
  return SENSELESS[type(default)]
