"""What a table has to say of its rows, so that they can be compared fairly."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import measure
from mhil import config as config_lib

_WIDE = "mlp", "convnet", "resnet"


def lines(
  configs: Mapping[str, config_lib.Config],
  done: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
  """Protocol and order in words, then what each row is, as Markdown.

  Args:
    configs: of each row's first seed.
    done: metrics of each row's runs; of the first one is told.
  """
  head = ["row", "loss", "backbone of a head", "augmentation"]
  head += ["exemplars", "their bytes", "parameters", "their bytes"]
  head += ["MiB of a device in a step", "ms a test image"]
  body = [
    [
      label,
      *_how(configs[label]),
      _augmentation(runs[0]),
      *_cost(runs[0]),
    ]
    for label, runs in done.items()
  ]
  return [
    "",
    "What was compared. Class-incremental: no test image says which task it "
    "is of. Every task brings a head with it, so a network grows, unless it "
    "is fixed, one head for all; parameters are those after the last task, of "
    "all heads, and the two columns of bytes are to be added where memory is "
    "compared. A step's memory is "
    "arguments and temporary buffers of the compiled program. Milliseconds "
    "are of all heads' tests after the last task over their images, in "
    "batches, on the row's own mesh. A cell is empty where the run is older "
    "than its measurement.",
    "",
    *_orders(configs, done),
    "",
    *measure.grid(head, body),
  ]


def _orders(configs, done) -> list[str]:
  """How the classes arrive; once where it is the same for every row."""
  told: dict[str, list[str]] = {}
  for label in done:
    told.setdefault(_order(configs[label]), []).append(label)
  if len(told) == 1:
    return [f"{next(iter(told)).capitalize()}."]
  return [f"- {order}: {', '.join(those)}." for order, those in told.items()]


def _order(config: config_lib.Config) -> str:
  stream = config.stream
  if stream.sizes:
    tasks = f"tasks of {', '.join(map(str, stream.sizes))} classes"
  elif stream.base:
    tasks = f"{stream.base} classes, then {stream.increment} a task"
  else:
    tasks = f"{stream.increment} classes a task"
  if stream.order:
    return f"{tasks}, in a given order"
  if stream.order_seed < 0:
    return f"{tasks}, in the order of their numbers"
  return f"{tasks}, in an order drawn from the seed"


def _how(config: config_lib.Config) -> list[str]:
  network, objective = config.network, config.objective.name
  widths = "-".join(map(str, network.widths)) if network.name in _WIDE else ""
  norm = "" if network.norm == "none" else f", {network.norm} norm"
  apart = (
    "" if objective == "end_to_end" else f", {objective.replace('_', ' ')}"
  )
  fixed = ", fixed" if network.fixed else ""
  blocks = "-".join(map(str, network.blocks))
  blocks = f" of {blocks} blocks" if network.name == "resnet" else ""
  return [
    _loss(config),
    f"{network.name} {widths}".strip() + blocks + norm + apart + fixed,
  ]


def _loss(config: config_lib.Config) -> str:
  loss, name = config.loss, config.loss.name.replace("_", " ")
  reference = f", {loss.reference}" if name == "dce" else ""
  frozen = config.train.train_heads == "new"
  off = loss.correction == "off" or (loss.correction == "auto" and frozen)
  return name + reference + ", no correction" * off


def _augmentation(run: Mapping[str, Any]) -> str:
  if (found := run.get("augmentation")) is None:
    return ""  # As below.
  crops = [f"crops of {found['pad']} pixels"] if found["pad"] else []
  flips = ["flips"] if found["flip"] else []
  return ", ".join(crops + flips) or "none"


def _cost(run: Mapping[str, Any]) -> list[str]:
  used, total = run["step_bytes_per_device"], run["parameters"]["total"]
  tested = run.get("test_ms_per_image")
  return [
    f"{run['memory']['samples']:,}",
    f"{run['memory']['bytes']:,}",
    f"{total:,}",
    f"{4 * total:,}",  # Parameters are float32, whatever computes.
    f"{(used['temporary'] + used['arguments']) / 2**20:.1f}",
    # Runs that are older than the measurement.
    "" if tested is None else f"{tested:.3f}",
  ]
