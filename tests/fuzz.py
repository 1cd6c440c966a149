"""Random configurations: each trains two steps, or is refused in one line.

  python -m tests.fuzz --seed=0 --count=1000
  python -m tests.fuzz --seed=0 --first=371 --count=1     number 371 alone

Ends with status 1 if there were findings: an exception that nobody foresaw, a
refusal of many lines, of no field, without a fix or in the middle of training,
training that does not stop when it is told to, a warning, anything said beside
the results, a program that hangs or dies. A loss that diverges is told in one
line and is none.
"""

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments import cli, train
from mhil import config as config_lib
from mhil import sharding, trainer
from tests import fuzz_values, tiny

STEPS = 2
DEVICES = 8
# Seconds that a configuration may take; two steps of the dearest take 40.
LIMIT = 120.0
# Compiled programs pile up in a process, and so does what a crash takes along.
CHUNK = 50
# Bytes that a process may map, so that a huge network fails here and not the
# whole machine.
ROOM = 24 << 30
# Most of the time is compilation, which need not be thorough for two steps. At
# level 0 XLA gives wrong gradients of a convnet, and NaN in its second step.
QUICK = "--xla_backend_optimization_level=1"
ORDINARY = re.compile(r"trained|refused|diverged")
# A field that is not the end of another.
NAMED = re.compile(
  rf"(?<![\w.])({'|'.join(map(re.escape, fuzz_values.defaults()))})="
)
FIX = re.compile(r"; \w")
Fields = dict[str, Any]


class Outcome(NamedTuple):
  """What came of a configuration: `trained`, `refused`, `diverged`, or else.

  Anything else is a finding.
  """

  number: int
  kind: str
  text: str = ""

  @property
  def finding(self) -> bool:
    """Whether the program did what it should not."""
    return not ORDINARY.fullmatch(self.kind)


def draw(seed: int, number: int) -> Fields:
  """The fields of a configuration that differ from the defaults."""
  rng = random.Random(f"{seed} {number}")
  defaults = fuzz_values.defaults()
  fields = dict(fuzz_values.BASE) | rng.choice(fuzz_values.WAYS)
  for field in rng.sample(sorted(defaults), rng.choice((0, 0, 1, 2, 3, 5))):
    fields[field] = rng.choice(fuzz_values.sensible(field, defaults[field]))
  for field in rng.sample(sorted(defaults), rng.choice((0, 0, 1, 1, 1, 2))):
    fields[field] = rng.choice(fuzz_values.senseless(defaults[field]))
  return fields


def configured(fields: Fields, sets: pathlib.Path) -> config_lib.Config:
  """The configuration, its data set one of those in a folder."""
  config = config_lib.Config()
  for field, value in fields.items():
    if field == "data.name" and value in fuzz_values.SETS:
      value = f"arrays:{sets / value}"
    config_lib.assign(config, field, value)
  return config


def save_sets(folder: pathlib.Path) -> None:
  """Writes the sets that `fuzz_values.SETS` names."""
  shapes = {"small": (2, 2, 1), "picture": (8, 8, 3), "flat": (6, 1, 1)}
  for name, shape in shapes.items():
    dataset = tiny.dataset(10, shape=shape)
    (folder / name).mkdir(parents=True)
    for split in "train", "test":
      images = getattr(dataset, f"{split}_images")
      if name == "flat":
        images = images.reshape(len(images), -1).astype(np.float32)
      np.save(folder / name / f"{split}_images.npy", images)
      labels = getattr(dataset, f"{split}_labels")
      np.save(folder / name / f"{split}_labels.npy", labels)
  meta = '{"pad": 2, "flip": true}'
  (folder / "picture" / "meta.json").write_text(meta)


class Stopped:
  """In place of `train.StopSignal`: a signal comes in the second step."""

  def __init__(self) -> None:
    self.asked = 0

  def __call__(self) -> bool:
    self.asked += 1
    return self.asked >= STEPS

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


def outcome(config: config_lib.Config, folder: pathlib.Path) -> tuple[str, str]:
  """Kind and text of what `experiments.train` makes of a configuration."""
  began, stop, said = [], Stopped(), io.StringIO()
  fit, signal = trainer.fit, train.StopSignal

  def noted(*args, **kwargs):
    began.append(True)
    return fit(*args, **kwargs)

  trainer.fit, train.StopSignal = noted, lambda: stop
  try:
    with (
      warnings.catch_warnings(action="error"),
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(said),
    ):
      found = ended(train.train(config, folder), stop.asked)
  except cli.UserError as error:
    found = judged(str(error), bool(began))
  except trainer.Diverged as error:
    kind = "many lines" if "\n" in str(error) else "diverged"
    found = kind, str(error)
  except Warning as error:
    found = "warned", told(error)
  except Exception as error:
    found = "unforeseen", told(error)
  finally:
    trainer.fit, train.StopSignal = fit, signal
  if said.getvalue() and ORDINARY.fullmatch(found[0]):
    return "said more", said.getvalue()
  return found


def ended(numbers: dict[str, Any] | None, asked: int) -> tuple[str, str]:
  """Kind and text of training that came to an end.

  Args:
    numbers: of a run that is complete; None if it was stopped.
    asked: how often it asked whether to stop.
  """
  if numbers is None and asked == STEPS:
    return "trained", ""
  # It does not ask after the last step, nor after a balanced pass of one.
  short = numbers and sum(numbers["steps_per_task"]) <= STEPS + 1
  if short and 0 < asked <= STEPS:
    return "trained", ""
  return "not stopped", f"asked {asked} times; complete: {numbers is not None}"


def judged(message: str, began: bool) -> tuple[str, str]:
  """Kind and text of a refusal."""
  if "\n" in message:
    return "many lines", message
  if began:
    return "refused too late", message
  if not NAMED.search(message):
    return "no field named", message
  return ("refused" if FIX.search(message) else "no fix"), message


def told(error: Exception) -> str:
  """An exception in short: what, and where, of our own files if it can be."""
  frames = traceback.extract_tb(error.__traceback__)
  ours = [f for f in frames if pathlib.Path(f.filename).parent in cli.OURS]
  last = (ours or frames)[-1]
  where = f"{pathlib.Path(last.filename).name}:{last.lineno}"
  return f"{type(error).__name__} in {where}: {str(error)[:400]}"


def run(
  seed: int, numbers: range, limit: float = LIMIT, target: Any = outcome
) -> Iterator[Outcome]:
  """Yields what comes of each configuration, tried in other processes."""
  context = multiprocessing.get_context("spawn")
  todo = list(numbers)
  while todo:
    here, there = context.Pipe()
    args = there, seed, todo[:CHUNK], target
    child = context.Process(target=work, args=args, daemon=True)
    child.start()
    there.close()
    try:
      yield from _listen(here, todo, limit)
      child.join(10)  # It tidies up, unless it hangs.
    finally:
      child.kill()
      child.join()


def _listen(pipe: Any, todo: list[int], limit: float) -> Iterator[Outcome]:
  """Takes what a child has to say; leaves in `todo` what it did not get to."""
  try:
    pipe.recv()  # It has imported what it needs.
    for _ in todo[:CHUNK]:
      # By the second: a process that someone else has stopped does not hang.
      if not any(pipe.poll(1) for _ in range(int(limit))):
        yield Outcome(todo.pop(0), "hangs", f"over {limit:.0f} s")
        return
      found = pipe.recv()
      todo.pop(0)
      yield Outcome(*found)
  except EOFError:
    yield Outcome(todo.pop(0), "died", "the process was killed or crashed")


def work(pipe: Any, seed: int, numbers: list[int], target: Any) -> None:
  """What a child does."""
  os.environ.setdefault("XLA_FLAGS", QUICK)
  resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
  sharding.simulate(DEVICES)
  # So many there are: a program starts with as many as its mesh asks for.
  sharding.simulate = lambda devices: None
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    save_sets(folder / "sets")
    pipe.send("ready")
    for number in numbers:
      config = configured(draw(seed, number), folder / "sets")
      pipe.send((number, *target(config, folder / f"run{number}")))


def main() -> int:
  """Reads the flags, tries all, prints what came of it."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--first", type=int, default=0)
  parser.add_argument("--count", type=int, default=1000)
  given = parser.parse_args()
  numbers = range(given.first, given.first + given.count)
  kinds: collections.Counter[str] = collections.Counter()
  findings = 0
  for found in run(given.seed, numbers):
    kinds[found.kind] += 1
    findings += found.finding
    if found.finding:
      again = f"--seed={given.seed} --first={found.number} --count=1"
      fields = json.dumps(draw(given.seed, found.number), default=str)
      print(f"{found.kind}: {again}\n  {fields}\n  {found.text}", flush=True)
    if kinds.total() % CHUNK == 0 or found.number == numbers[-1]:
      counts = (f"{count} {kind}" for kind, count in kinds.most_common())
      print(f"to {found.number}: {', '.join(counts)}", flush=True)
  return 1 if findings else 0


if __name__ == "__main__":
  sys.exit(main())
