"""A run's folder: claimed before training, filled after it."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorboardX

from experiments import claims, cli
from mhil import config as config_lib
from mhil import metrics, plots, report, streams
from mhil.progress import Progress

MATRIX = "accuracy_matrix"


def enable_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless the user chose a place."""
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "mhil" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class Events:
  """TensorBoard events of a run; of several processes one writes them."""

  def __init__(self, folder: pathlib.Path, writes: bool = True):
    self._writer = tensorboardX.SummaryWriter(str(folder), write_to_disk=writes)

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
  claims.replace(
    folder / "report.html", report.of_run(numbers, fields, done.history)
  )
  # Last, so that its presence says that the run is complete.
  text = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
  claims.replace(folder / "metrics.json", text)


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
  config = config_lib.Config()
  try:
    fields = config_lib.flatten(json.loads(path.read_text()))
    for field, value in fields.items():
      value = tuple(value) if isinstance(value, list) else value
      config_lib.assign(config, field, value)
  except OSError:
    raise cli.UserError(
      f"--{flag}={folder} holds no run; name another folder"
    ) from None
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
