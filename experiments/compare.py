"""Runs a list of configurations and seeds into one table.

  python -m experiments.compare --suite=digits --seeds=5
  python -m experiments.compare --suite=fashion_5x2 --seeds=3 --data_folder=DIR

DIR holds the TFDS set of the suite's configuration, prepared.
Writes OUT.md, OUT.csv and figures after every run: OUT.png, and OUT_scan.png
where rows differ in a number that is scanned. A run that is done is not run
again, so an interrupted comparison goes on where it was.
"""

import csv
import datetime
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import build, cli, layers_table, suites, train, workdir
from mhil import comparison, sharding, validation
from mhil import config as config_lib

_SUITE = flags.DEFINE_enum(
  "suite", "digits", sorted(suites.SUITES), "Which rows to compare."
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of each row.", lower_bound=1)
_DATA = flags.DEFINE_string(
  "data_folder",
  None,
  "Where TFDS keeps its sets; its own default if not given.",
)
_OUT = flags.DEFINE_string(
  "out", None, "Table without its ending; default docs/results/SUITE."
)
_RUNS = flags.DEFINE_string(
  "runs", "runs/compare", "Folder of the single runs."
)
_NOTE = flags.DEFINE_string(
  "note", "", "A sentence for the page, such as which copy of the data it was."
)

COLUMNS = {
  "average_incremental_accuracy": "average incremental",
  "last_accuracy": "last",
  "top5_accuracy": "top 5",
  "task_id_accuracy": "task id",
  "within_task_accuracy": "within task",
  "forgetting": "forgetting",
}


def main() -> None:
  """Runs what is missing and writes the table."""
  rows = suites.SUITES[_SUITE.value]
  configs = [
    [configure(row, seed, _DATA.value) for seed in _seeds()] for row in rows
  ]
  with cli.checking():
    sharding.simulate(max(build.devices(c.mesh) for cs in configs for c in cs))
  out = pathlib.Path(_OUT.value or f"docs/results/{_SUITE.value}")
  done: dict[str, list[dict[str, Any]]] = {}
  # Seed by seed, so that the table is whole early.
  for i, seed in enumerate(_seeds()):
    for row, seeds in zip(rows, configs):
      folder = pathlib.Path(_RUNS.value) / _SUITE.value / slug(row, seed)
      numbers = finish(seeds[i], folder)
      done.setdefault(row.label, []).append(numbers)
      print(
        f"{row.label:<32} seed {seed}  "
        f"{numbers['average_incremental_accuracy']:.3f}  "
        f"{numbers['last_accuracy']:.3f}",
        flush=True,
      )
      write(out, done)
      draw(out, rows, done)
  print(out.with_suffix(".md").read_text())


def configure(
  row: suites.Row, seed: int, folder: str | None = None
) -> config_lib.Config:
  """The row's configuration; the seed moves the class order too.

  Args:
    row: of a suite.
    seed: of the run and of its class order.
    folder: where the row's TFDS set is prepared; None leaves the row's own.

  Raises:
    UserError: for a folder that is missing, or that the row does not read.
  """
  config = cli.load_config(cli.CONFIGS / f"{row.config}.py")
  moved = {"seed": seed, "stream.order_seed": seed}
  for field, value in (dict(row.overrides) | moved).items():
    config_lib.assign(config, field, value)
  if folder is not None:
    _check_folder(config.data.name, folder)
    config.data.folder = folder
  with cli.checking():
    validation.validate(config)
  return config


def _check_folder(name: str, folder: str) -> None:
  if not name.startswith("tfds:"):
    raise cli.UserError(
      f"--data_folder={folder} is not read for data.name={name}; use it with "
      "a suite of a tfds: set, or leave it out"
    )
  if not pathlib.Path(folder).expanduser().is_dir():
    raise cli.UserError(
      f"--data_folder={folder} is not a folder; name the one that holds the "
      f"prepared set {name.removeprefix('tfds:')}"
    )


def finish(config: config_lib.Config, folder: pathlib.Path) -> dict[str, Any]:
  """The numbers of a run, which is started or resumed if need be."""
  path = folder / "metrics.json"
  begun = (folder / "config.json").exists()
  if begun:
    workdir.check_same(folder, config, folder / "config.json")
  there = begun and path.exists()
  if not there and train.train(config, folder, resume=begun) is None:
    raise cli.UserError("stopped by a signal; the same command goes on")
  return json.loads(path.read_text())


def slug(row: suites.Row, seed: int) -> str:
  """The run's folder name."""
  return re.sub(r"[^a-z0-9]+", "-", f"{row.label}-{seed}".lower())


def write(out: pathlib.Path, done: dict[str, list[dict[str, Any]]]) -> None:
  """Writes mean and standard deviation over seeds as Markdown and CSV."""
  out.parent.mkdir(parents=True, exist_ok=True)
  head = [
    "row",
    "seeds",
    *COLUMNS.values(),
    "s a run",
    "bytes over head a step",
  ]
  body = [_cells(label, runs) for label, runs in done.items()]
  lines = [
    f"# Comparison `{_SUITE.value}`",
    "",
    *_about(next(iter(done.values()))[0]),
    "",
    "| " + " | ".join(head) + " |",
    "|" + " --- |" * len(head),
    *("| " + " | ".join(cells) + " |" for cells in body),
    *(_costs(done) if _SUITE.value in suites.COSTS else []),
    *(layers_table.lines(done) if _SUITE.value in suites.LAYERS else []),
  ]
  out.with_suffix(".md").write_text("\n".join(lines) + "\n")
  with out.with_suffix(".csv").open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "seed", *COLUMNS])
    for label, runs in done.items():
      for run in runs:
        writer.writerow([label, run["seed"], *(run[c] for c in COLUMNS)])


def draw(
  out: pathlib.Path,
  rows: Sequence[suites.Row],
  done: dict[str, list[dict[str, Any]]],
) -> None:
  """Draws the table, and the curves through rows that scan a number."""

  def over_seeds(label):
    return [100 * run["average_incremental_accuracy"] for run in done[label]]

  measure = "average incremental accuracy, %"
  columns = {
    measure: {label: over_seeds(label) for label in done},
    "last accuracy, %": {
      label: [100 * run["last_accuracy"] for run in runs]
      for label, runs in done.items()
    },
    "seconds a run": {
      label: [sum(run["seconds_per_task"]) for run in runs]
      for label, runs in done.items()
    },
  }
  comparison.rows(columns, out.with_suffix(".png"))
  there = [row for row in rows if row.label in done]
  numbers = dict.fromkeys(number for row in there for number in row.at)
  if numbers:
    curves = {
      number: {
        curve: {
          row.at[number]: over_seeds(row.label)
          for row in there
          if number in row.at and row.curve == curve
        }
        for curve in dict.fromkeys(r.curve for r in there if number in r.at)
      }
      for number in numbers
    }
    bounds = {row.label: over_seeds(row.label) for row in there if row.bound}
    scan = out.with_name(f"{out.name}_scan.png")
    comparison.scans(curves, bounds, scan, measure)


def _cells(label: str, runs: list[dict[str, Any]]) -> list[str]:
  cells = [label, str(len(runs))]
  for name in COLUMNS:
    values = 100 * np.array([run[name] for run in runs])
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    cells.append(f"{values.mean():.1f}{deviation}")
  seconds = np.mean([sum(run["seconds_per_task"]) for run in runs])
  moved = sum(c["bytes"] for c in runs[0]["collectives"] if "head" in c["axes"])
  return [*cells, f"{seconds:.1f}", f"{moved:,}"]


def _costs(done: dict[str, list[dict[str, Any]]]) -> list[str]:
  """What a head costs, row by row: a table of its own."""
  lines = [
    "",
    "Of one head: numbers trained, and those that predict; multiply-adds of a "
    "prediction; temporary memory of the compiled step.",
    "",
    "| row | trained | predict | 10^6 multiply-adds | temporary MiB |",
    "|" + " --- |" * 5,
  ]
  for label, (run, *_) in done.items():
    used = run["inference"]
    cells = [
      label,
      f"{run['parameters']['per_head']:,}",
      f"{used['parameters']:,}",
      f"{used['multiply_adds'] / 1e6:.1f}",
      f"{run['step_bytes_per_device']['temporary'] / 2**20:.1f}",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _about(run: dict[str, Any]) -> list[str]:
  versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
  memory = run["memory"]
  # Where the data lie on this machine is nobody's business.
  given = " --data_folder=DIR" if _DATA.value is not None else ""
  return [
    f"`python -m experiments.compare --suite={_SUITE.value} "
    f"--seeds={_SEEDS.value}{given}`, {datetime.date.today()}; mhil "
    f"{importlib.metadata.version('mhil')}, {versions}; "
    f"{len(run['devices'])} devices ({run['devices'][0]} ..).",
    "",
    f"First row: {memory['samples']} samples kept in all, {memory['bytes']:,} "
    f"bytes ({memory['kind']}); {run['parameters']['total']:,} parameters. "
    "Test accuracy in %, mean and standard deviation over seeds; a seed moves "
    "the class order too. Seconds are of training, choosing exemplars and "
    "tests, without compilation, on a shared machine.",
    *(["", _NOTE.value] if _NOTE.value else []),
  ]


def _seeds() -> range:
  return range(_SEEDS.value)


if __name__ == "__main__":
  cli.run(main)
