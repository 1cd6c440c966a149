"""Kills and damage at random, and what they cost.

  python -m tests.chaos --kills=200 --out=FILE.json

The program trains the tiny stream and is killed (SIGKILL) at moments drawn at
random: in steps, saves, restores and tests, and while it compiles. After one
kill in three a file of the newest save is cut short, changed or deleted too.
Each time `--resume` goes on, and each stream must end with every number of a
stream that nobody disturbed. Status 1 says that one did not.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from typing import Any

import tqdm

from experiments import claims, cli, train
from tests import program

EVERY = 5  # Steps from save to save, as `program.tiny_flags` asks.
# In place of the program: the same, and its step in a file.
WATCHED = "from tests import chaos; chaos.main_told({told!r})"


def main_told(told: str) -> None:
  """The program `experiments.train`, which writes where it began and is."""
  file = os.open(told, os.O_RDWR | os.O_CREAT)

  class Meter(tqdm.tqdm):
    """Writes the first and the newest step, in one write each."""

    def __init__(self, *args, initial, **options):
      self.began = self.at = initial
      os.pwrite(file, b"%8d %8d" % (self.began, self.at), 0)
      super().__init__(*args, initial=initial, **options)

    def update(self, n=1):
      self.at += n
      os.pwrite(file, b"%8d %8d" % (self.began, self.at), 0)
      return super().update(n)

  tqdm.tqdm = Meter
  sys.argv[0] = "train"
  train.define_flags()
  cli.run(train.main, config=True)


def truncate(path: pathlib.Path) -> None:
  """Cuts a file in two."""
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path) -> None:
  """Changes one bit."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


HARM = truncate, flip, pathlib.Path.unlink


def damage(folder: pathlib.Path, rng: random.Random) -> bool:
  """Harms a file of the newest save; False if there is none."""
  steps = program.saves(folder)
  if not steps:
    return False
  newest = folder / "checkpoints" / str(steps[-1])
  files = sorted(
    p for p in newest.rglob("*") if p.is_file() and p.stat().st_size
  )
  rng.choice(HARM)(rng.choice(files))
  return True


class Chaos:
  """Streams that are disturbed, one after another.

  Args:
    place: a folder of its own.
    seed: draws moments and damage; how far a program is then differs.
    latest: steps up to which it kills; a run that has fewer is spared.
  """

  def __init__(
    self, place: pathlib.Path, seed: int, latest: int = program.STEPS + EVERY
  ) -> None:
    self.place, self.rng, self.latest = place, random.Random(seed), latest
    self.flags = program.tiny_flags(program.save_arrays(place / "data"))
    done = self._forked("whole", False)[0]
    assert done.status == 0, done
    self.wanted = program.numbers(place / "whole")
    self.kills = self.damaged = self.alike = self.streams = 0
    self.lost: dict[str, list[int]] = {"killed": [], "killed and damaged": []}

  def _forked(self, name, resume, moment=None):
    """How it ended, and where it began and came to; killed at a moment."""
    beside = self.place / f"{name}-told"
    told = beside / "steps"
    told.unlink(missing_ok=True)
    flags = [*self.flags, f"--workdir={self.place / name}"]
    flags += ["--resume"] * resume
    script = WATCHED.format(told=str(told))
    process = program.fork(flags, beside, script, self.place / "cache")
    if moment is not None:
      step, seconds = moment
      while process.is_alive() and read(told, (0, 0))[1] < step:
        time.sleep(0.001)
      process.join(seconds)
      process.kill()
    process.join(program.TIMEOUT)
    return program.ended(process, beside), read(told)

  def _moment(self) -> tuple[int, float]:
    """Steps to wait for, and then seconds."""
    if self.rng.random() < 0.3:  # While it starts, restores and compiles.
      return 0, self.rng.uniform(0, 3)
    return self.rng.randint(1, self.latest), self.rng.uniform(0, 0.15)

  def stream(self) -> None:
    """One run, disturbed until it is at its end."""
    name, resume, kind, reached = f"run{self.streams}", False, "", 0
    while True:
      done, steps = self._forked(name, resume, self._moment())
      if steps:
        if kind:
          self.lost[kind].append(reached - steps[0])
        kind, reached = "", steps[1]
      if done.status == 0:
        break
      assert done.status == -signal.SIGKILL, done
      self.kills += 1
      # Killed before there was a folder, it begins anew.
      resume = (self.place / name / claims.CONFIG).exists()
      kind = kind or "killed"
      if self.rng.random() < 1 / 3 and damage(self.place / name, self.rng):
        self.damaged += 1
        kind = "killed and damaged"
    self.streams += 1
    self.alike += program.numbers(self.place / name) == self.wanted

  def told(self) -> dict[str, Any]:
    """What it cost."""
    return {
      "kills": self.kills,
      "saves_damaged": self.damaged,
      "streams": self.streams,
      "streams_as_if_undisturbed": self.alike,
      "steps_from_save_to_save": EVERY,
      "steps_lost": {
        kind: {"most": max(x), "mean": sum(x) / len(x), "times": len(x)}
        for kind, x in self.lost.items()
        if x
      },
    }


def read(told: pathlib.Path, before: Any = None) -> Any:
  """First and newest step of a program; `before` it began."""
  words = told.read_bytes().split() if told.exists() else []
  return (int(words[0]), int(words[1])) if words else before


def main() -> int:
  """Reads the flags, disturbs, writes what it cost."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    chaos = Chaos(pathlib.Path(name), given.seed)
    while chaos.kills < given.kills:
      chaos.stream()
      print(json.dumps(chaos.told()), flush=True)
  given.out.write_text(json.dumps(chaos.told(), indent=1) + "\n")
  return 0 if chaos.alike == chaos.streams else 1


if __name__ == "__main__":
  sys.exit(main())
