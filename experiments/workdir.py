"""A run's folder: claimed before training, filled after it."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorboardX

from experiments import cli
from mhil import config as config_lib
from mhil import metrics, plots, report, streams
from mhil.progress import Progress

MATRIX = "accuracy_matrix"
DATA = "data.sha256"


def enable_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless the user chose a place."""
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "mhil" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def claim(
  folder: pathlib.Path,
  config: config_lib.Config,
  resume: bool,
  fingerprint: str,
) -> None:
  """Makes the folder this run's own.

  Raises:
    UserError: if it cannot be written, or holds another run.
  """
  path = folder / "config.json"
  try:
    if path.exists():
      check_same(folder, config, path, resume)
      check_data(folder, fingerprint)
    elif resume:
      raise cli.UserError(
        f"--resume: --workdir={folder} holds no run; start one without --resume"
      )
    elif (folder / "checkpoints").exists():
      raise cli.UserError(
        f"--workdir={folder} holds checkpoints, but no config.json that says "
        "of what; name another folder"
      )
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / DATA, fingerprint + "\n")
    _replace(path, config_lib.to_json(config))
  except OSError as error:
    raise cli.UserError(
      f"--workdir={folder} cannot be written ({error.strerror}); name a "
      "folder that you may write"
    ) from None


def check_same(
  folder: pathlib.Path,
  config: config_lib.Config,
  path: pathlib.Path,
  resume: bool = True,
) -> None:
  """Raises `UserError` unless a folder's run has this configuration."""
  if not resume:
    raise cli.UserError(
      f"--workdir={folder} holds a run already; add --resume to go on with "
      "it, or name another folder"
    )
  try:
    old = config_lib.flatten(json.loads(path.read_text()))
  except (ValueError, AttributeError):
    raise cli.UserError(
      f"--resume: {path} is damaged; restore it, or name another folder"
    ) from None
  new = config_lib.flatten(json.loads(config_lib.to_json(config)))
  # A field that is younger than the run had its default.
  usual = json.loads(config_lib.to_json(config_lib.Config()))
  old = config_lib.flatten(usual) | old
  # A mesh may change: heads are dealt anew. What is between stages may not.
  for field in sorted(new.keys() | old.keys()):
    if field in ("mesh.data", "mesh.head", "mesh.subnet"):
      continue
    if old.get(field) != new.get(field):
      raise cli.UserError(
        f"--workdir={folder} holds a run with {field}={old.get(field)!r}, not "
        f"{new.get(field)!r}; use {cli.override(field, old.get(field))} or "
        "another folder"
      )


def _replace(path: pathlib.Path, text: str) -> None:
  # A reader, or a run after a kill, sees all of the text or none of it.
  draft = path.with_name(f".{path.name}.draft")
  draft.write_text(text)
  draft.rename(path)


def check_data(
  folder: pathlib.Path, fingerprint: str, flag: str = "workdir"
) -> None:
  """Raises `UserError` if the data are not those that the run began with."""
  if (began := data_hash(folder, flag)) != fingerprint:
    raise cli.UserError(
      f"--{flag}={folder} began with data {began[:12]}, not "
      f"{fingerprint[:12]}; bring them back, or name another folder"
    )


def data_hash(folder: pathlib.Path, flag: str = "workdir") -> str:
  """The hash of the data that a folder's run began with.

  Raises:
    UserError: if the folder has lost it.
  """
  path = folder / DATA
  if not path.exists():
    raise cli.UserError(
      f"--{flag}={folder} has lost {DATA}; restore it, or name another folder"
    )
  return path.read_text().strip()


class Events:
  """TensorBoard events of a run."""

  def __init__(self, folder: pathlib.Path):
    self._writer = tensorboardX.SummaryWriter(str(folder))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._writer.close()

  def write(self, step: int, row: dict[str, float]) -> None:
    """Adds one number for each name at a step."""
    for name, value in row.items():
      self._writer.add_scalar(name, value, step)


def write(
  folder: pathlib.Path,
  numbers: dict[str, Any],
  done: Progress,
  config: config_lib.Config,
) -> None:
  """Writes numbers, the accuracy matrix, the figures and the report."""
  table = np.array(
    [
      [np.nan if x is None else x for x in row]
      for row in numbers["accuracy_matrix"]
    ]
  )
  metrics.write_csv(table, folder / f"{MATRIX}.csv")
  plots.accuracy_matrix(table, folder / f"{MATRIX}.png", "Accuracy")
  history = np.array(
    [[np.nan if x is None else x for x in row] for row in done.history],
    np.float64,
  )
  plots.curves(
    {"step": history[:, 0], "loss": history[:, 1:]},
    numbers["steps_per_task"],
    {
      "class-incremental": numbers["accuracy_after_task"],
      "task_id": numbers["task_id_after_task"],
      "within_task": numbers["within_task_after_task"],
    },
    folder / "curves.png",
  )
  if any(numbers["probes"]):
    plots.guesses(numbers["probes"], folder / "guesses.png")
  fields = config_lib.flatten(config_lib.to_dict(config))
  _replace(folder / "report.html", report.of_run(numbers, fields, done.history))
  # Last, so that its presence says that the run is complete.
  text = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
  _replace(folder / "metrics.json", text)


def origin(
  config: config_lib.Config, stream: streams.Stream, fingerprint: str
) -> dict[str, Any]:
  """What `metrics.json` says of the data and their order."""
  return {
    "order_seed": config.stream.order_seed,
    "class_order": list(stream.order),
    "task_sizes": list(stream.sizes),
    "data_sha256": fingerprint,
  }


def scores(folder: pathlib.Path) -> Callable[[int, np.ndarray], None]:
  """Writes the scores of each task's test to `scores/TASK.npy`."""

  def keep(t: int, table: np.ndarray) -> None:
    path = folder / "scores" / f"{t}.npy"
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
      np.save(file, table, allow_pickle=False)
    draft.rename(path)

  return keep


def read_config(folder: pathlib.Path, flag: str) -> config_lib.Config:
  """The configuration that a folder's run was started with.

  Raises:
    UserError: names the flag that named the folder, if it holds no run.
  """
  path = folder / "config.json"
  if not path.is_file():
    raise cli.UserError(f"--{flag}={folder} holds no run; name another folder")
  config = config_lib.Config()
  try:
    fields = config_lib.flatten(json.loads(path.read_text()))
    for field, value in fields.items():
      value = tuple(value) if isinstance(value, list) else value
      config_lib.assign(config, field, value)
  except (ValueError, AttributeError):
    raise cli.UserError(
      f"--{flag}: {path} is damaged; restore it, or name another folder"
    ) from None
  return config


def memory(facts: dict[str, Any], size: int) -> str:
  """What the memory holds, in a line."""
  if size < 0:
    return "memory: every sample of the classes seen, from the data set"
  if not size:
    return "memory: none"
  return (
    f"memory: {facts['samples']:,} samples over the whole mesh, "
    f"{facts['bytes']:,} bytes, {facts['bytes_per_device']:,} bytes a device "
    f"({facts['kind']})"
  )


def stages(facts: dict[str, Any], devices: int) -> str:
  """Stages that learn at once, and what the model says of them, in a line."""
  shares = np.array(facts["stage_multiply_adds"])
  shares = 100 * shares / shares.sum()
  return (
    f"layer-parallel: {len(shares)} stages of "
    f"{', '.join(f'{share:.0f}' for share in shares)} % of the multiply-adds, "
    f"networks that guess {100 * facts['aux_share']:.1f} %; with a device a "
    f"stage a step is to end {facts['counted_speedup']:.2f} times as soon by "
    f"that count; here {devices} along mesh.stage"
  )


def table(numbers: dict[str, Any]) -> str:
  """The numbers that matter, as one table."""
  after = zip(
    numbers["accuracy_after_task"],
    numbers["task_id_after_task"],
    numbers["within_task_after_task"],
    numbers["seconds_per_task"],
  )
  lines = [
    "task  accuracy  task id  within task  seconds",
    *(
      f"{t:>4}  {a:>8.3f}  {i:>7.3f}  {w:>11.3f}  {s:>7.1f}"
      for t, (a, i, w, s) in enumerate(after)
    ),
    "",
    "average incremental accuracy "
    f"{numbers['average_incremental_accuracy']:.3f}"
    f"   last {numbers['last_accuracy']:.3f}"
    f"   forgetting {numbers['forgetting']:.3f}",
    f"{100 * numbers['waiting_share']:.1f} % of the training steps' time was "
    "spent waiting for data",
  ]
  return "\n".join(lines)
