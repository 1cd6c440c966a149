"""Streams of very many tasks for hours, stopped and resumed on the way.

  python -m tests.soak --minutes=60 --out=FILE.json

One process builds a run once and trains it again and again, from saves of its
own where it was stopped; every stream must end with the parameters of the
first. The file holds what the process took over time. Status 1 says that the
parameters differed, or that memory grew.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from typing import Any

from experiments import build
from mhil import checkpoint, prepare, trainer
from mhil import config as config_lib
from mhil import run as run_lib
from tests import stream

# Times that a run is asked whether to stop, from one stop to the next.
BETWEEN = 100, 600
# Bytes that a save may leave behind. Of these 30,000 to 40,000 are lists that
# tensorstore 0.1.86 forgets whenever Orbax 0.12.8 asks it for its metrics
# (`experimental_collect_matching_metrics`); without saves nothing stays.
LEFT = 80_000


class After:
  """True once it was asked so many times."""

  def __init__(self, times: int) -> None:
    self.left = times

  def __call__(self) -> bool:
    self.left -= 1
    return self.left <= 0


def built(folder: pathlib.Path, tasks: int) -> run_lib.Run:
  """The run that is trained again and again."""
  config = config_lib.Config()
  fields = stream.FIELDS | {"data.name": stream.save_arrays(folder, tasks)}
  fields["memory.size"] = 2 * tasks
  for field, value in fields.items():
    config_lib.assign(config, field, value)
  parts = build.parts(config)
  return prepare.build(*parts[:6], config.seed, *parts[6:])


def trained(
  run: run_lib.Run, folder: pathlib.Path, rng: random.Random, seen: Any
) -> tuple[str, int]:
  """Hash of the parameters after a whole stream, and how often it stopped.

  Args:
    run: from `built`.
    folder: for its saves.
    rng: draws the stops.
    seen: called after each stop and at the end.
  """
  stops = 0
  while True:
    with checkpoint.Checkpoints(folder, keep=3) as saves:
      stop = After(rng.randint(*BETWEEN))
      done = trainer.fit(run, checkpoints=saves, resume=stops > 0, stop=stop)
    seen()
    if done.finished:
      return done.metrics["params_sha256"], stops
    stops += 1


def soak(
  minutes: float, folder: pathlib.Path, tasks: int = stream.TASKS, seed: int = 0
) -> dict[str, Any]:
  """Streams until the time is over, two at least; what came of them."""
  run, rng, begun = built(folder / "data", tasks), random.Random(seed), now()
  hashes: collections.Counter[str] = collections.Counter()
  rows: list[dict[str, Any]] = []
  stops = 0
  while hashes.total() < 2 or now() - begun < 60 * minutes:
    with tempfile.TemporaryDirectory(dir=folder) as saves:

      def seen(place=pathlib.Path(saves)):
        row = {"minutes": (now() - begun) / 60, "stream": hashes.total()}
        rows.append(row | stream.in_use(place))

      found, times = trained(run, pathlib.Path(saves), rng, seen)
    hashes[found] += 1
    stops += times
  return {
    "streams": hashes.total(),
    "stops": stops,
    "params_sha256": dict(hashes),
    "left_by_a_save": left(rows, tasks),
    "rows": rows,
  }


def left(rows: list[dict[str, Any]], tasks: int) -> float:
  """Bytes that a save left behind, from the first stream's end on."""
  ends = collections.defaultdict(list)
  for row in rows:
    ends[row["stream"]].append(row["resident"])
  saves = tasks * max(ends)
  return (ends[max(ends)][-1] - ends[0][-1]) / saves if saves else 0.0


def now() -> float:
  """Seconds."""
  return time.perf_counter()


def main() -> int:
  """Reads the flags, soaks, writes what was seen."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=60)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    found = soak(given.minutes, pathlib.Path(name), seed=os.getpid())
  given.out.write_text(json.dumps(found, indent=1) + "\n")
  alike = len(found["params_sha256"]) == 1
  print(
    f"{found['streams']} streams, {found['stops']} stops, parameters "
    f"{'alike' if alike else 'DIFFER'}, a save left "
    f"{found['left_by_a_save']:,.0f} bytes"
  )
  return 0 if alike and found["left_by_a_save"] < LEFT else 1


if __name__ == "__main__":
  sys.exit(main())
