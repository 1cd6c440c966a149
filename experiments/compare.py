"""Runs a list of configurations and seeds into one table.

  python -m experiments.compare --suite=digits --seeds=5
  python -m experiments.compare --suite=fashion_5x2 --seeds=3 --data_folder=DIR

DIR holds the TFDS set of the suite's configuration, prepared.
Writes OUT.md, OUT.csv and figures after every run: OUT.png, and OUT_scan.png
where rows differ in a number that is scanned; OUT.html holds all of it. A run
that is done is not run again, so an interrupted comparison goes on where it
was.
"""

import datetime
import importlib.metadata
import json
import pathlib
import re
from typing import Any

from absl import flags

from experiments import (
  build,
  claims,
  cli,
  overview,
  page,
  protocol,
  suites,
  train,
)
from mhil import config as config_lib
from mhil import sharding, validation

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


def main() -> None:
  """Runs what is missing and writes the table."""
  rows = suites.SUITES[_SUITE.value]
  configs = [
    [configure(row, seed, _DATA.value) for seed in _seeds()] for row in rows
  ]
  with cli.checking():
    sharding.simulate(max(build.devices(c.mesh) for cs in configs for c in cs))
  out = pathlib.Path(_OUT.value or f"docs/results/{_SUITE.value}")
  firsts = {row.label: seeds[0] for row, seeds in zip(rows, configs)}
  done: page.Done = {}
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
      about = _about(next(iter(done.values()))[0])
      told = protocol.lines(firsts, done)
      page.write(out, _SUITE.value, about, done, told)
      page.draw(out, rows, done)
      overview.write(out, rows, done)
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
    claims.check_same(folder, config)
  there = begun and path.exists()
  if not there and train.train(config, folder, resume=begun) is None:
    raise cli.Stopped("stopped by a signal; the same command goes on")
  return json.loads(path.read_text())


def slug(row: suites.Row, seed: int) -> str:
  """The run's folder name."""
  return re.sub(r"[^a-z0-9]+", "-", f"{row.label}-{seed}".lower())


def _about(run: dict[str, Any]) -> list[str]:
  versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
  # Where the data lie on this machine is nobody's business.
  given = " --data_folder=DIR" if _DATA.value is not None else ""
  return [
    f"`python -m experiments.compare --suite={_SUITE.value} "
    f"--seeds={_SEEDS.value}{given}`, {datetime.date.today()}; mhil "
    f"{importlib.metadata.version('mhil')}, {versions}; "
    f"{len(run['devices'])} devices ({run['devices'][0]} ..).",
    "",
    "Test accuracy in %, mean and standard deviation over seeds; a seed moves "
    "the class order too. Seconds are of training, choosing exemplars and "
    "tests, without compilation, on a shared machine.",
    *(["", _NOTE.value] if _NOTE.value else []),
  ]


def _seeds() -> range:
  return range(_SEEDS.value)


if __name__ == "__main__":
  cli.run(main)
