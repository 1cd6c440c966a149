"""The typed configuration of an experiment.

A file in `configs/` returns a `Config` from `get_config()`; `--config.FIELD=`
overrides a field. Library functions take plain arguments, never a config.
"""

import dataclasses
import functools
import json
from typing import Any


@dataclasses.dataclass(kw_only=True, slots=True)
class Mesh:
  """Devices along each axis; see the architecture in the README."""

  data: int = 1
  head: int = 1
  stage: int = 1
  subnet: int = 1


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
  """`digits`, `arrays:FOLDER` or `tfds:NAME`, prepared in `folder`.

  `image` and `label` name the features of a TFDS set; `limit` keeps so many
  images of each class in each split, 0 all; with `whole_test` only in training.
  `streamed`: images are read as they are needed, for sets larger than a device.
  `augment` crops and flips training images as the set's own defaults say.
  """

  name: str = "digits"
  folder: str = ""
  image: str = "image"
  label: str = "label"
  limit: int = 0
  whole_test: bool = False
  streamed: bool = False
  augment: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class Stream:
  """Tasks: `base` classes, then `increment` at a time, or given `sizes`.

  `base` 0 stands for `increment`. `order` is a class order; empty draws one
  from `order_seed`, which -1 leaves as it is.
  """

  base: int = 0
  increment: int = 2
  sizes: tuple[int, ...] = ()
  order: tuple[int, ...] = ()
  order_seed: int = 0


@dataclasses.dataclass(kw_only=True, slots=True)
class Network:
  """The branch of one head.

  `mlp` (`widths`: hidden units), `convnet` (`widths`: features), `resnet14`,
  `resnet20`, `resnet32`, `resnet110`, `resnet18`, `resnet18_imagenet` (their
  own widths), `resnet` (`widths` of stem and sections, `blocks` of each).
  It computes in `dtype`; parameters stay float32. `output_norm` normalises an
  mlp's logits by batch. `reads`, unless 0: a frozen classifier reads only so
  many features. `fixed`: one head for all tasks, to compare with.
  """

  name: str = "mlp"
  widths: tuple[int, ...] = (64,)
  norm: str = "none"
  dtype: str = "float32"
  blocks: tuple[int, ...] = ()
  output_norm: bool = False
  reads: int = 0
  fixed: bool = False


@dataclasses.dataclass(kw_only=True, slots=True)
class Subnets:
  """How a branch trains in `mesh.subnet` parts, each on its own samples.

  `method`: `ist`, independent subnets, or its baselines `local_sgd` and
  `data_parallel`. A round is `local_steps` long; with `renew` the next one has
  other subnets. The optimiser's `state` is `reset` or `deal`t. `dealt` blocks
  of a resnet: `longest` section or `all`; `scale` divides their residuals by
  the number of subnets in tests. `statistics` of tests, of whole branches too:
  `running`, `batch` or `collected` on the whole branch.
  """

  method: str = "ist"
  local_steps: int = 20
  renew: bool = True
  state: str = "reset"
  statistics: str = "running"
  dealt: str = "longest"
  scale: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class Objective:
  """How a branch learns: `end_to_end`, `local` or `layer_parallel`."""

  name: str = "end_to_end"


@dataclasses.dataclass(kw_only=True, slots=True)
class Local:
  """Gradient-isolated modules, for `objective.name=local`; `modules.Method`.

  So many `modules` by the `published` list, by the one `balanced` for memory or
  by memory as it is `measured`, or `cuts`: numbers of the pieces, from 0, after
  which a module ends. On `mesh.stage` devices they work side by side. `mode`,
  `classifier` and `loss` as the paper names them; weights of its two losses at
  the first and the last cut; `isolated` false is the end-to-end control.
  """

  modules: int = 1
  lists: str = "published"
  cuts: tuple[int, ...] = ()
  mode: str = "R0"
  classifier: str = "1c2f"
  loss: str = "softmax"
  restore_first: float = 0.0
  restore_last: float = 0.0
  task_first: float = 1.0
  task_last: float = 1.0
  isolated: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class LayerParallel:
  """Stages that learn at once, for `objective.name=layer_parallel`.

  So many `stages` of about equal cost, or `cuts`: the numbers of the pieces,
  from 1, at which a stage begins. `method` is `penalty` or `lagrangian`;
  `states` come from a `network` or are kept by `sample`, and so are the
  `multipliers`. `beta`, `eta`, `sweeps`, `corrections`, `serial_every` and
  `correction` (`full`, or as controls `no_credit` and `off`): see
  `coupling.Method`. Auxiliary networks of `depth` hidden layers cost this share
  of the branch's multiply-adds, and their gradients are multiplied by `rate`.
  """

  stages: int = 1
  cuts: tuple[int, ...] = ()
  method: str = "penalty"
  states: str = "network"
  multipliers: str = "network"
  beta: float = 1.0
  eta: float = 1.0
  sweeps: int = 0
  corrections: int = 1
  correction: str = "full"
  serial_every: int = 0
  cost: float = 0.1
  depth: int = 2
  rate: float = 1.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Loss:
  """`dce`, `distributed_ce` or `ce`.

  `correction` is `on`, `off` or `auto`: on unless old heads are frozen
  (`train.train_heads=new`), where it hurts.
  """

  name: str = "dce"
  reference: str = "learned"
  correction: str = "auto"
  smoothing: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Memory:
  """The rehearsal buffer; every number is that of the whole mesh.

  `size` samples; 0 none, and -1 trains on all samples seen, again and again.
  `policy`: `balanced` over the classes seen, `per_class` (fixed) or
  `reservoir`; `selection`: `stream`, what passes, or `herding`. A step draws
  `draws` rows and offers its samples, `candidates` of which replace a row of a
  full class. `scope`: `global`, or `local` to each device along `data`.
  `place`: rows lie on the `device`, or in the memory of the `host`.
  """

  size: int = 100
  policy: str = "balanced"
  selection: str = "stream"
  draws: int = 8
  candidates: int = 8
  scope: str = "global"
  place: str = "device"


@dataclasses.dataclass(kw_only=True, slots=True)
class Optimizer:
  """`adam` or `sgd`; the rate is `constant`, `cosine` or `steps`, each task.

  `epoch_cosine` is a cosine that moves once an epoch. `steps` multiplies by
  `factor` at `milestones`, or leaves so many `percents` of the rate from each
  on; milestones and `warm_up` are epochs. `decay_norm`: weight decay acts on
  normalisation and biases too. `clip` bounds the norm of one head's gradient,
  or of one subnet's where `mesh.subnet` cuts it, unless 0.
  """

  name: str = "adam"
  learning_rate: float = 1e-3
  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 0.0
  decay_norm: bool = True
  clip: float = 0.0
  schedule: str = "constant"
  milestones: tuple[int, ...] = ()
  factor: float = 0.1
  percents: tuple[int, ...] = ()
  warm_up: int = 0


@dataclasses.dataclass(kw_only=True, slots=True)
class Train:
  """`train_heads` is `all`, `readout` or `new`; see `heads.update`.

  A step has `batch` new samples and what the memory draws. After each task but
  the first, `balanced_epochs` at `balanced_rate` see the memory's samples only.
  """

  epochs: int = 30
  batch: int = 24
  balanced_epochs: int = 0
  balanced_rate: float = 1e-4
  train_heads: str = "all"
  from_scratch: bool = False
  log_every: int = 50


@dataclasses.dataclass(kw_only=True, slots=True)
class Checkpoint:
  """Saved after each task, and every N steps unless 0; `keep` stay."""

  every: int = 0
  keep: int = 3


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
  """An experiment; unless empty, only `heads` are trained, as if alone.

  `seed` moves initialisation, exemplars, shuffling and augmentation,
  `stream.order_seed` the class order.
  """

  seed: int = 0
  heads: tuple[int, ...] = ()
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  data: Data = dataclasses.field(default_factory=Data)
  stream: Stream = dataclasses.field(default_factory=Stream)
  network: Network = dataclasses.field(default_factory=Network)
  subnets: Subnets = dataclasses.field(default_factory=Subnets)
  objective: Objective = dataclasses.field(default_factory=Objective)
  local: Local = dataclasses.field(default_factory=Local)
  layer_parallel: LayerParallel = dataclasses.field(
    default_factory=LayerParallel
  )
  loss: Loss = dataclasses.field(default_factory=Loss)
  memory: Memory = dataclasses.field(default_factory=Memory)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  train: Train = dataclasses.field(default_factory=Train)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)


def to_dict(config: Config) -> dict[str, Any]:
  """The configuration as nested dicts."""
  return dataclasses.asdict(config)


def to_json(config: Config) -> str:
  """The configuration as text, the same for equal configurations."""
  return json.dumps(to_dict(config), indent=2) + "\n"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{"mesh.head": 5, ..}` from nested dicts."""
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def assign(config: Config, field: str, value: Any) -> None:
  """Sets `group.field`, or a field without a group."""
  *groups, name = field.split(".")
  holder: Any = functools.reduce(getattr, groups, config)
  if not hasattr(holder, name):
    raise ValueError(f"{field}={value!r} is not a field of the configuration")
  setattr(holder, name, value)
