"""Measures what steps cost, suite by suite.

  python -m experiments.benchmark --suite=heads --out=docs/results/heads.json

Prints a Markdown table for each part of the suite. `--out` also writes all
numbers as JSON, and the tables beside it as Markdown.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import (
  bench_growth,
  bench_heads,
  bench_layers,
  bench_memory,
  bench_pipeline,
  bench_rehearsal,
  bench_resnet,
  bench_scale,
  bench_serving,
  bench_stages,
  bench_subnets,
  cli,
  measure,
  workdir,
)
from mhil import facts, sharding

SUITES = {
  "growth": bench_growth.SUITE,
  "heads": bench_heads.SUITE,
  "layers": bench_layers.SUITE,
  "memory": bench_memory.SUITE,
  "pipeline": bench_pipeline.SUITE,
  "rehearsal": bench_rehearsal.SUITE,
  "resnet": bench_resnet.SUITE,
  "scale": bench_scale.SUITE,
  "serving": bench_serving.SUITE,
  "stages": bench_stages.SUITE,
  "subnets": bench_subnets.SUITE,
}


def define_flags() -> None:
  """Defines the flags; only for the program, as other programs have some."""
  flags.DEFINE_enum("suite", "heads", sorted(SUITES), "What to measure.")
  flags.DEFINE_string("out", None, "FILE.json; FILE.md is written beside it.")
  flags.DEFINE_string(
    "folder", None, "TFDS folder with cifar100, which adds rows to `pipeline`."
  )
  flags.DEFINE_float(
    "peak", None, "For `resnet`: the device's 10^12 operations a second."
  )


def main() -> None:
  """Measures the suite, prints its tables, writes them if asked."""
  name, out = flags.FLAGS.suite, flags.FLAGS.out
  path = writable(out) if out else None
  suite = SUITES[name]
  if suite in (bench_layers.SUITE, bench_stages.SUITE):
    bench_stages.one_core()
  workdir.enable_compilation_cache()
  with cli.checking():
    sharding.simulate(suite.devices)
  tables, origin = [], about(name, flags.FLAGS.folder)
  print("\n".join(heading(origin)), flush=True)
  for part in suite.parts:
    with cli.checking():
      tables.append(part())
    print("\n" + measure.markdown(tables[-1]), flush=True)
  if path:
    write(path, origin, tables)


def writable(out: str) -> pathlib.Path:
  """The file to write, found to be possible before minutes of measuring.

  Raises:
    UserError: for another ending, or a folder that takes no file.
  """
  path = pathlib.Path(out)
  if path.suffix != ".json":
    raise cli.UserError(f"--out={out} must end in .json; use {path.stem}.json")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise cli.UserError(f"--out={out}: {error}; use another folder") from None
  if not os.access(path.parent, os.W_OK) or path.is_dir():
    raise cli.UserError(f"--out={out} cannot be written; use another file")
  return path


def about(suite: str, folder: str | None = None) -> dict[str, Any]:
  """Where, when and by which command the numbers were made."""
  devices = jax.devices()
  more = " --folder=DIR" if folder else ""
  return {
    "suite": suite,
    "command": f"python -m experiments.benchmark --suite={suite}{more}",
    "date": str(datetime.date.today()),
    "versions": {
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in facts.PACKAGES},
    },
    "device": {
      "platform": devices[0].platform,
      "kind": devices[0].device_kind,
      "count": len(devices),
      "machine": platform.machine(),
      "cores": measure.cores(),
    },
  }


def heading(about: dict[str, Any]) -> list[str]:
  """The first lines of the Markdown page."""
  device = about["device"]
  versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
  return [
    f"# Benchmark `{about['suite']}`",
    "",
    f"`{about['command']}`, {about['date']}; {versions}; {device['count']} "
    f"devices ({device['platform']}, {device['kind']}) on {device['cores']} "
    f"cores ({device['machine']}).",
  ]


def write(
  path: pathlib.Path, about: dict[str, Any], tables: list[measure.Table]
) -> None:
  """Writes `path` as JSON and the same as Markdown beside it."""
  whole = about | {"tables": [_plain(table) for table in tables]}
  path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
  pages = ["\n".join(heading(about)), *map(measure.markdown, tables)]
  text = "\n\n".join(pages) + "\n"
  path.with_suffix(".md").write_text(text, encoding="utf-8")


def _plain(table: measure.Table) -> dict[str, Any]:
  # Quartiles tell as much as hundreds of single times.
  rows = [dict(row) for row in table.rows]
  for row in rows:
    if walls := row.pop("walls", None):
      row["ms_quartiles"] = np.percentile(walls, [25, 75]).round(3).tolist()
  return table._asdict() | {"rows": rows}


if __name__ == "__main__":
  define_flags()
  cli.run(main)
