"""What one run of a configuration is expected to give, on a CPU, with seed 0.

  python -m experiments.expected                  trains all rows, in minutes
  python -m experiments.expected --only=digits

A row was measured once, by the command that it stands for; a run of today has
to come within the tolerance. Rows of several seeds, beside their controls, are
in docs/results.
"""

import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import build, cli, measure, train
from mhil import config as config_lib
from mhil import sharding

TOLERANCE = 1.5  # Points: another machine rounds, and so trains, otherwise.


class Row(NamedTuple):
  """One configuration and what it gave.

  Attributes:
    config: name of a file in `configs/`.
    about: the paper's idea, in a few words.
    files: where it is written down.
    average, last: accuracy in %: average incremental, and at the end.
  """

  config: str
  about: str
  files: tuple[str, ...]
  average: float
  last: float


# fmt: off
ROWS = (
  Row("digits", "D-CE", ("losses", "heads"), 97.5, 95.3),
  Row("rehearsal_digits", "rehearsal buffer", ("rehearsal",), 96.7, 94.4),
  Row("local_digits", "greedy modules, context", ("local",), 98.3, 98.3),
  Row("local_stream", "the same in D-CE heads", ("local",), 97.9, 95.8),
  Row("layer_parallel_digits", "layer-parallel stages",
      ("layer_parallel",), 97.8, 97.8),
  Row("layer_parallel_digits_5x2", "the same in D-CE heads",
      ("layer_parallel",), 95.3, 91.7),
  Row("subnets_digits", "independent subnets", ("subnets",), 96.4, 96.4),
  Row("subnets_stream", "the same in D-CE heads", ("subnets",), 96.9, 95.3),
  Row("everything", "D-CE, buffer and modules",
      ("losses", "rehearsal", "local"), 97.1, 94.4),
)
# fmt: on


def main() -> None:
  """Trains the rows and prints what came of them."""
  wanted = flags.FLAGS.only
  if unknown := set(wanted) - {row.config for row in ROWS}:
    raise cli.UserError(
      f"--only={','.join(sorted(unknown))} is no row; use one of "
      + ", ".join(row.config for row in ROWS)
    )
  rows = [row for row in ROWS if not wanted or row.config in wanted]
  configs = [cli.load_config(cli.CONFIGS / f"{r.config}.py") for r in rows]
  # Before jax starts, for all rows: the number of devices stays.
  sharding.simulate(max(build.devices(config.mesh) for config in configs))
  body, wrong = [], []
  with tempfile.TemporaryDirectory() as folder:
    for row, config in zip(rows, configs):
      found = measured(config, pathlib.Path(folder) / row.config)
      body.append([row.config, *map(str, (row.average, row.last)), *found])
      wrong += [] if near(row, found) else [row.config]
  head = ["config", "average", "last", "average now", "last now"]
  print("\n".join(measure.grid(head, body)))
  if wrong:
    raise cli.UserError(
      f"{', '.join(wrong)}: more than {TOLERANCE} points away; report it with "
      "the table, or measure the row again"
    )


def measured(
  config: config_lib.Config, folder: pathlib.Path
) -> tuple[str, str]:
  """Average incremental and last accuracy in %, of a run of today."""
  numbers: dict[str, Any] | None = train.train(config, folder)
  if numbers is None:
    raise cli.Stopped("stopped by a signal; nothing is kept")
  names = "average_incremental_accuracy", "last_accuracy"
  average, last = (f"{100 * numbers[name]:.1f}" for name in names)
  return average, last


def near(row: Row, found: Sequence[str]) -> bool:
  """Whether a run came within the tolerance."""
  pairs = zip((row.average, row.last), map(float, found))
  return all(abs(wanted - now) <= TOLERANCE for wanted, now in pairs)


def lines() -> list[str]:
  """The rows as a Markdown table, as the README has it."""
  body = [
    [
      row.about,
      ", ".join(f"[mhil/{name}.py](mhil/{name}.py)" for name in row.files),
      f"[configs/{row.config}.py](configs/{row.config}.py)",
      f"{row.average:.1f}",
      f"{row.last:.1f}",
    ]
    for row in ROWS
  ]
  head = ["what", "file", "config", "average incremental, %", "last, %"]
  return measure.grid(head, body)


if __name__ == "__main__":
  flags.DEFINE_list("only", [], "Names of rows; all if it is not given.")
  cli.run(main)
