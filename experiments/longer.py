"""A folder's run that goes on with more classes than it began with.

`stream.json` holds what of a run's stream and data must stay: the classes of
each task, the hash of the samples, and how pixels are prepared. Until the
longer run has saved something, it also holds all of this, and the
configuration, of the shorter one, which may then go on as if nothing had been.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import build, build_layers, cli
from mhil import config as config_lib
from mhil import data, growing

STREAM = "stream.json"
PIXELS = "scale", "mean", "std", "pad", "flip"
# Fields that may differ in a run that goes on with more classes.
FIELDS = (
  "data.name",
  "data.folder",
  *(f"stream.{name}" for name in config_lib.Stream.__dataclass_fields__),
)
# The sums behind a mean may be taken in another order elsewhere.
ROUNDING = 1e-6


def told(
  parts: build.Parts,
  fingerprint: str,
  began: dict[str, Any] | None = None,
  before: dict[str, Any] | None = None,
) -> str:
  """The text of `stream.json`.

  Args:
    parts: of the run.
    fingerprint: of its data.
    began: what the file said; None if there was none.
    before: of the shorter run; see `before`.
  """
  text = {"tasks": parts.stream.tasks, "data_sha256": fingerprint}
  # The first ones stay, or roundings might add up.
  of = {name: began[name] for name in PIXELS} if began else {}
  text |= pixels(parts.dataset) | of
  return json.dumps(text | ({"before": before} if before else {})) + "\n"


def before(
  folder: pathlib.Path, began: dict[str, Any] | None, parts: build.Parts
) -> dict[str, Any] | None:
  """What is kept of a run that is to be longer; None if it is not.

  Args:
    folder: the work directory.
    began: of `read`.
    parts: of the run that goes on.
  """
  if not began or classes(began["tasks"]) == parts.dataset.classes:
    return None
  text = (folder / "config.json").read_text()
  return {"config": text} | began | {"saved": _newest(folder)}


def pixels(dataset: data.Dataset) -> dict[str, Any]:
  """How a data set's pixels become inputs."""
  return {name: getattr(dataset, name) for name in PIXELS}


def read(folder: pathlib.Path, flag: str = "resume") -> dict[str, Any] | None:
  """What `stream.json` says; None if it is not there.

  Of a longer run that has saved nothing yet it is what the shorter one was,
  with its `config`.

  Raises:
    UserError: if it is damaged; names this flag.
  """
  path = folder / STREAM
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    shorter = found.pop("before", None)
    if shorter and _newest(folder) <= int(shorter["saved"]):
      found = shorter
    found["tasks"] = tuple(tuple(map(int, task)) for task in found["tasks"])
    assert classes(found["tasks"]) and isinstance(found["data_sha256"], str)
    for name in PIXELS:
      np.asarray(found[name], float)
    return found
  except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
    raise cli.UserError(
      f"--{flag}: {path} is damaged; restore it, or name another folder"
    ) from None


def _newest(folder: pathlib.Path) -> int:
  """Step of the newest save, damaged or not; -1 without one."""
  names = [path.name for path in (folder / "checkpoints").glob("*")]
  return max([int(name) for name in names if name.isdigit()], default=-1)


def classes(tasks: Sequence[Sequence[int]]) -> int:
  """How many classes these tasks have."""
  return sum(map(len, tasks))


def check(
  folder: pathlib.Path,
  began: dict[str, Any],
  config: config_lib.Config,
  parts: build.Parts,
  begins: Callable[[int], str | None],
) -> None:
  """Raises UserError unless a folder's run can go on with more classes.

  Args:
    folder: the work directory.
    began: what its `stream.json` says.
    config, parts: of the longer run.
    begins: see `begins`.
  """
  known = classes(began["tasks"])
  if begins(known) != began["data_sha256"]:
    raise cli.UserError(
      f"data.name={config.data.name} does not begin with the data of {known} "
      f"classes that --workdir={folder} began with "
      f"({began['data_sha256'][:12]}); put their samples first, unchanged and "
      "in both splits, and those of new classes behind them"
    )
  check_plain(folder, began, config, parts)
  with cli.checking():
    growing.check_partition(parts.partition)
  if config.objective.name == "layer_parallel":
    for name in build_layers.by_sample(config.layer_parallel):
      raise cli.UserError(
        f"layer_parallel.{name}=sample keeps a row for each sample that "
        f"--workdir={folder} began with, and none for new ones; train the "
        f"longer stream anew, or with layer_parallel.{name}=network"
      )


def check_plain(
  folder: pathlib.Path,
  began: dict[str, Any],
  config: config_lib.Config,
  parts: build.Parts,
) -> None:
  """The same of a stream that need not be longer, without its data."""
  check_pixels(folder, began, config, parts.dataset)
  with cli.checking():
    growing.check(began["tasks"], parts.stream)


def begins(dataset: data.Dataset, known: int) -> str | None:
  """Hash of the samples of the first classes; None if they do not come first.

  Args:
    dataset: of all classes.
    known: how many are the first.
  """
  first = beginning(dataset, known)
  return first and data.fingerprint(first)


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
  flag: str = "workdir",
) -> None:
  """Raises UserError if pixels become other inputs than heads have learnt on.

  Args:
    folder: the work directory.
    began: what its `stream.json` says.
    config, dataset: of the run that is to go on.
    flag: that named the folder.
  """
  now = pixels(dataset)
  for name, value in now.items():
    old = began[name]
    alike = np.shape(value) == np.shape(old)
    if not alike or not np.allclose(value, old, rtol=ROUNDING, atol=0):
      fix = "name a set whose pixels are prepared alike"
      if config.data.name.startswith("arrays:"):
        kept = {name: began[name] for name in now}
        fix = f"save {json.dumps(kept)} as meta.json beside its arrays"
      raise cli.UserError(
        f"data.name={config.data.name} has {name}={_short(value)}, and the "
        f"heads in --{flag}={folder} learnt with {_short(old)}; {fix}"
      )


def _first(array: Any, count: int) -> Any:
  """The first rows; of a streamed set, undecoded."""
  select = getattr(array, "select", None)
  return array[:count] if select is None else select(slice(count))


def _short(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return "(" + ", ".join(f"{x:.8g}" for x in value) + ")"
  return f"{value}"
