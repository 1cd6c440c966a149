"""A stream of very many tasks as its user runs it, watched from within."""

import json
import pathlib

import numpy as np

from tests import tiny

TASKS = 200
TRAINED, TESTED = 8, 2  # images of a class

# A line after each task: bytes in use, seconds, files. What a task took is
# measured from one save's end to the next one's begin, so that a save is not
# part of it, and in the process itself, so that nobody need look in time.
WATCHED = """
import json, os, pathlib, sys, time
from experiments import cli, train
from mhil import checkpoint

clock, page = time.perf_counter, os.sysconf("SC_PAGE_SIZE")
real, last = checkpoint.Checkpoints.save, [clock()]

def save(self, step, state, progress):
  begun, tasks = clock(), len(progress["tallies"])
  real(self, step, state, progress)
  resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  row = {{
    "task": tasks - 1,
    "step": step,
    "resident": resident * page,
    "seconds": begun - last[0],
    "saving": clock() - begun,
    "trained": progress["seconds"][-1],
    "files": sum(1 for _ in pathlib.Path({folder!r}).rglob("*")),
    "maps": sum(1 for _ in open("/proc/self/maps")),
  }}
  with open({log!r}, "a") as file:
    print(json.dumps(row), file=file)
  last[0] = clock()

checkpoint.Checkpoints.save = save
sys.argv[0] = "train"
train.define_flags()
cli.run(train.main, config=True)
"""


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
  return [
    "--quiet",
    f"--workdir={folder}",
    f"--config.data.name={data}",
    "--config.stream.increment=1",
    "--config.network.widths=8,",
    "--config.train.train_heads=new",
    "--config.memory.size=400",
    "--config.train.epochs=4",
    "--config.train.batch=8",
    "--config.train.log_every=4",
    "--config.checkpoint.keep=3",
  ]


def watched(folder: pathlib.Path, log: pathlib.Path) -> str:
  """The program's script."""
  return WATCHED.format(folder=str(folder), log=str(log))


def rows(log: pathlib.Path) -> list[dict]:
  """What was seen after each task."""
  return [json.loads(line) for line in log.read_text().splitlines()]
