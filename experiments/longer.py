"""A folder's run that goes on with more classes than it began with.

`stream.json` holds what of a run's stream and data must stay: the classes of
each task, the hash of the samples, and how pixels are prepared.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import build, cli
from mhil import config as config_lib
from mhil import data, growing

STREAM = "stream.json"
# Fields that may differ in a run that goes on with more classes.
FIELDS = (
  "data.name",
  "data.folder",
  *(f"stream.{name}" for name in config_lib.Stream.__dataclass_fields__),
)
# The sums behind a mean may be taken in another order elsewhere.
ROUNDING = 1e-6


def told(parts: build.Parts, fingerprint: str) -> str:
  """The text of `stream.json`."""
  text = {"tasks": parts.stream.tasks, "data_sha256": fingerprint}
  return json.dumps(text | pixels(parts.dataset)) + "\n"


def pixels(dataset: data.Dataset) -> dict[str, Any]:
  """How a data set's pixels become inputs."""
  names = "scale", "mean", "std", "pad", "flip"
  return {name: getattr(dataset, name) for name in names}


def read(folder: pathlib.Path) -> dict[str, Any] | None:
  """What `stream.json` says; None if it is not there.

  Raises:
    UserError: if it is damaged.
  """
  path = folder / STREAM
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    found["tasks"] = tuple(map(tuple, found["tasks"]))
    return found
  except (ValueError, LookupError, TypeError):
    raise cli.UserError(
      f"--resume: {path} is damaged; restore it, or name another folder"
    ) from None


def classes(tasks: Sequence[Sequence[int]]) -> int:
  """How many classes these tasks have."""
  return sum(map(len, tasks))


def check(
  folder: pathlib.Path,
  began: dict[str, Any],
  config: config_lib.Config,
  parts: build.Parts,
) -> None:
  """Raises UserError unless a folder's run can go on with more classes.

  Args:
    folder: the work directory.
    began: what its `stream.json` says.
    config, parts: of the longer run.
  """
  known, dataset = classes(began["tasks"]), parts.dataset
  first = beginning(dataset, known)
  if first is None or data.fingerprint(first) != began["data_sha256"]:
    raise cli.UserError(
      f"data.name={config.data.name} does not begin with the data of {known} "
      f"classes that --workdir={folder} began with "
      f"({began['data_sha256'][:12]}); put their samples first, unchanged and "
      "in both splits, and those of new classes behind them"
    )
  check_pixels(folder, began, config, dataset)
  with cli.checking():
    growing.check(began["tasks"], parts.stream)
    growing.check_partition(parts.partition)
  o = config.layer_parallel
  if config.objective.name == "layer_parallel":
    for name in "states", "multipliers":
      if getattr(o, name) == "sample":
        raise cli.UserError(
          f"layer_parallel.{name}=sample keeps a row for each sample that "
          f"--workdir={folder} began with, and none for new ones; train the "
          f"longer stream anew, or with layer_parallel.{name}=network"
        )


def beginning(dataset: data.Dataset, known: int) -> data.Dataset | None:
  """The part of a data set with its first classes.

  Args:
    dataset: of all classes.
    known: how many classes make the part.

  Returns:
    None if their samples do not come before all others.
  """
  counts = {}
  for split in "train", "test":
    old = getattr(dataset, f"{split}_labels") < known
    counts[split] = count = int(old.sum())
    if not old[:count].all():
      return None
  parts = {
    f"{split}_{kind}": _first(getattr(dataset, f"{split}_{kind}"), count)
    for split, count in counts.items()
    for kind in ("images", "labels")
  }
  return dataset._replace(classes=known, **parts)


def check_pixels(
  folder: pathlib.Path,
  began: dict[str, Any],
  config: config_lib.Config,
  dataset: data.Dataset,
) -> None:
  """Raises UserError if pixels become other inputs than heads have learnt on.

  Args:
    folder: the work directory.
    began: what its `stream.json` says.
    config, dataset: of the run that is to go on.
  """
  now = pixels(dataset)
  for name, value in now.items():
    if not np.allclose(value, began[name], rtol=ROUNDING, atol=0):
      kept = {name: began[name] for name in now}
      raise cli.UserError(
        f"data.name={config.data.name} has {name}={_short(value)}, and the "
        f"heads in --workdir={folder} learnt with {_short(began[name])}; save "
        f"{json.dumps(kept)} as meta.json beside its arrays"
      )


def _first(array: Any, count: int) -> Any:
  """The first rows; of a streamed set, undecoded."""
  select = getattr(array, "select", None)
  return array[:count] if select is None else select(slice(count))


def _short(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return "(" + ", ".join(f"{x:.4g}" for x in value) + ")"
  return f"{value}"
