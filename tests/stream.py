"""A stream of very many tasks as its user runs it, watched from within."""

import json
import os
import pathlib
import sys
import time

import numpy as np

from experiments import cli, train
from mhil import checkpoint
from tests import tiny

TASKS = 200
TRAINED, TESTED = 8, 2  # images of a class
FIELDS = {
  "stream.increment": 1,
  "network.widths": (8,),
  "train.train_heads": "new",
  "memory.size": 400,
  "train.epochs": 4,
  "train.batch": 8,
  "train.log_every": 4,
  "checkpoint.keep": 3,
}
# In place of the program: the same, and a line after each save.
WATCHED = "from tests import stream; stream.main({folder!r}, {log!r})"


def save_arrays(folder: pathlib.Path, tasks: int = TASKS) -> str:
  """A class a task, a few images each, as `arrays:FOLDER`."""
  dataset = tiny.dataset(tasks, TRAINED)
  folder.mkdir(parents=True, exist_ok=True)
  for split, most in ("train", TRAINED), ("test", TESTED):
    images = getattr(dataset, f"{split}_images")
    labels = getattr(dataset, f"{split}_labels")
    each = len(labels) // tasks
    rows = np.arange(len(labels)) % each < most
    np.save(folder / f"{split}_labels.npy", labels[rows])
    np.save(folder / f"{split}_images.npy", images[rows])
  return f"arrays:{folder}"


def flags(data: str, folder: pathlib.Path) -> list[str]:
  """Of the program."""
  fields = (FIELDS | {"data.name": data}).items()
  return ["--quiet", f"--workdir={folder}"] + [
    cli.override(field, value).replace("'", "") for field, value in fields
  ]


def watched(folder: pathlib.Path, log: pathlib.Path) -> str:
  """The program's script."""
  return WATCHED.format(folder=str(folder), log=str(log))


def main(folder: str, log: str) -> None:
  """The program `experiments.train`, which writes what it takes."""
  real = checkpoint.Checkpoints.save
  since = time.process_time()

  def save(self, step, state, progress):
    nonlocal since
    # Of the processors, not of a clock: what else the machine does counts less.
    row = {
      "task": len(progress["tallies"]) - 1,
      "seconds": time.process_time() - since,
    }
    real(self, step, state, progress)
    with open(log, "a") as file:
      print(json.dumps(row | in_use(pathlib.Path(folder))), file=file)
    since = time.process_time()

  checkpoint.Checkpoints.save = save
  sys.argv[0] = "train"
  train.define_flags()
  cli.run(train.main, config=True)


def in_use(folder: pathlib.Path) -> dict[str, int]:
  """Bytes and pieces of memory of this process, and files in a folder."""
  resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return {
    "resident": resident * os.sysconf("SC_PAGE_SIZE"),
    "maps": pathlib.Path("/proc/self/maps").read_bytes().count(b"\n"),
    "files": sum(1 for _ in folder.rglob("*")),
  }


def rows(log: pathlib.Path) -> list[dict]:
  """What was seen after each task."""
  return [json.loads(line) for line in log.read_text().splitlines()]
