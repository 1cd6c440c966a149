"""Runs `python -m experiments.train` as its user does, on a tiny stream."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np

from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
CLASSES, TASKS = 10, 5
STEPS = 75
# Seconds until a program is taken to hang, on a machine that is busy.
TIMEOUT = 300
TIMING = ("seconds_per_task", "waiting_share", "test_ms_per_image")


class Done(NamedTuple):
  """A program that has ended."""

  status: int
  out: str
  err: str


def save_arrays(folder, **changed):
  """The tiny set as `arrays:FOLDER`; `changed` replaces whole arrays."""
  folder.mkdir(parents=True, exist_ok=True)
  dataset = tiny.dataset(CLASSES)
  for split in "train", "test":
    for part in "images", "labels":
      name = f"{split}_{part}"
      array = changed.get(name, getattr(dataset, name))
      np.save(folder / f"{name}.npy", array)
  return f"arrays:{folder}"


def tiny_flags(data):
  """75 steps of about a millisecond, five heads, a save every five steps."""
  return [
    "--quiet",
    f"--config.data.name={data}",
    "--config.network.widths=8,",
    "--config.memory.size=20",
    "--config.train.epochs=3",
    "--config.train.batch=8",
    "--config.train.log_every=3",
    "--config.optimizer.learning_rate=0.01",
    "--config.checkpoint.every=5",
  ]


def environment(cache):
  """The user's, without the many devices and the cache that the tests have."""
  ours = "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"
  env = {k: v for k, v in os.environ.items() if k not in ours}
  return env | {"XDG_CACHE_HOME": str(cache), "COLUMNS": "80"}


def start(flags, cache, script=None):
  """Starts the program, or a script that patches it first."""
  entry = ["-m", "experiments.train"] if script is None else ["-c", script]
  return subprocess.Popen(
    [sys.executable, *entry, *flags],
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  """Waits for the program's end."""
  out, err = process.communicate(timeout=TIMEOUT)
  return Done(process.returncode, out, err)


def run(flags, cache, script=None):
  """Runs the program to its end."""
  return finish(start(flags, cache, script))


def forked(flags, folder, script=None, cache=None):
  """Runs the program to its end in a fork; see `fork`."""
  process = fork(flags, folder, script, cache)
  process.join(TIMEOUT)
  if process.is_alive():
    process.kill()
    raise TimeoutError(f"{flags} did not end")
  return ended(process, folder)


def fork(flags, folder, script=None, cache=None):
  """Starts the program in a fork that has imported its libraries already.

  The same code under the same name, ten times faster to start. What it prints
  goes to files in a folder.
  """
  folder.mkdir(parents=True, exist_ok=True)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(
    ["experiments.build", "experiments.cli", "experiments.workdir"]
  )
  files = folder / "out", folder / "err"
  env = environment(cache or folder / "cache")
  process = context.Process(target=_child, args=(flags, *files, env, script))
  process.start()
  return process


def ended(process, folder):
  """What a fork that has ended said."""
  said = ((folder / name).read_text() for name in ("out", "err"))
  return Done(process.exitcode, *said)


def _child(flags, out, err, env, script):
  with contextlib.ExitStack() as stack:
    for number, path in (1, out), (2, err):
      os.dup2(stack.enter_context(path.open("w")).fileno(), number)
  os.chdir(ROOT)
  os.environ.clear()
  os.environ.update(env)
  # Read when JAX was imported, from the environment of the tests.
  jax.config.update("jax_compilation_cache_dir", None)
  sys.argv = ["train", *flags]
  if script is not None:
    exec(script, {})
    return
  runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)


def saves(folder):
  """Steps of the finished saves."""
  found = (folder / "checkpoints").glob("*")
  return sorted(int(p.name) for p in found if p.name.isdigit())


def numbers(folder):
  """`metrics.json`, and the history behind the curves, without the clock."""
  found = json.loads((folder / "metrics.json").read_text())
  for name in TIMING:
    del found[name]
  saves = [int(p.name) for p in (folder / "checkpoints").glob("[0-9]*[0-9]")]
  path = folder / "checkpoints" / str(max(saves)) / "progress" / "metadata"
  progress = json.loads(path.read_text())["progress"]
  return found | {"history": progress["history"]}
