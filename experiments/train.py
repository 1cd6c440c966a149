"""Trains a multi-head network over a stream of tasks.

  python -m experiments.train                        digits, D-CE, 5 heads
  python -m experiments.train --config=configs/NAME.py --config.FIELD=VALUE
  python -m experiments.train --workdir=DIR --resume

The work directory receives config.json, metrics.json, report.html,
accuracy_matrix.csv, accuracy_matrix.png, curves.png, TensorBoard events and
checkpoints/.
"""

import datetime
import pathlib
import shlex
import signal
import sys
from typing import Any

from absl import flags

from experiments import build, cli, pace, workdir
from mhil import checkpoint, data, prepare, trainer
from mhil import config as config_lib


def define_flags() -> None:
  """Defines the flags; only for the program, as others import `train`."""
  flags.DEFINE_string(
    "workdir", None, "Where results go; default runs/<config>-<time>."
  )
  flags.DEFINE_bool(
    "resume", False, "Go on from the newest checkpoint in --workdir."
  )
  flags.DEFINE_bool("quiet", False, "No progress bar.")


def main() -> None:
  """Reads the flags and runs one experiment."""
  given = flags.FLAGS
  if given.resume and not given.workdir:
    raise cli.UserError("--resume needs to know the run; add --workdir=DIR")
  folder = pathlib.Path(given.workdir or _default_workdir())
  numbers = train(
    given.config, folder, resume=given.resume, bar=not given.quiet
  )
  if numbers is None:
    print(f"resume with: {_resume_command(folder)}")
    return
  print(workdir.table(numbers))
  print(f"results in {folder}")


def train(
  config: config_lib.Config,
  folder: pathlib.Path,
  *,
  resume: bool = False,
  bar: bool = False,
) -> dict[str, Any] | None:
  """Trains, tests, saves and draws; the numbers of `metrics.json`.

  Args:
    config: what to run; validated before anything else.
    folder: the work directory.
    resume: go on with the run that the folder holds.
    bar: show a progress bar.

  Returns:
    None if a signal stopped the run; it is saved and can be resumed.
  """
  # 1. Everything that can be wrong is found before training.
  workdir.enable_compilation_cache()
  with cli.checking():
    parts = build.parts(config)
  fingerprint = data.fingerprint(parts.dataset)
  workdir.claim(folder, config, resume, fingerprint)
  print(workdir.memory(parts.transform.facts, config.memory.size))
  if "stage_multiply_adds" in parts.objective.facts:
    print(workdir.stages(parts.objective.facts, config.mesh.stage))
  with (
    checkpoint.Checkpoints(
      folder / "checkpoints",
      every=config.checkpoint.every,
      keep=config.checkpoint.keep,
    ) as checkpoints,
    workdir.Events(folder) as events,
    StopSignal() as stop,
    cli.checking(),
  ):
    # 2. Train and test, task after task.
    run = prepare.build(*parts[:6], config.seed, *parts[6:])
    result = trainer.fit(
      run,
      checkpoints=checkpoints,
      resume=resume,
      stop=stop,
      log=events.write,
      bar=bar,
    )
  if not result.finished:
    print(f"stopped by a signal; saved at step {result.progress.step}")
    return None

  # 3. Numbers, figures, the report.
  numbers = result.metrics | {
    "order_seed": config.stream.order_seed,
    "class_order": list(parts.stream.order),
    "task_sizes": list(parts.stream.sizes),
    "data_sha256": fingerprint,
  }
  if speed := pace.measured(run, build.end_to_end(config, parts)):
    numbers["speed"] = speed
    print(pace.line(speed))
  workdir.write(folder, numbers, result.progress, config)
  return numbers


class StopSignal:
  """True once SIGTERM or SIGINT came; the loop then saves and ends.

  A second one is not held back, since the first may wait for a long step.
  """

  def __init__(self) -> None:
    self.came = False
    self._before: dict[int, Any] = {}

  def __call__(self) -> bool:
    """Whether a signal came."""
    return self.came

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._take)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _take(self, *_):
    self.came = True
    self.__exit__()


def _default_workdir() -> str:
  # To the microsecond: jobs of a script start in the same second.
  now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
  return f"runs/{cli.config_file().stem}-{now}"


def _resume_command(folder: pathlib.Path) -> str:
  words = ["python -m experiments.train", shlex.join(sys.argv[1:])]
  if not flags.FLAGS.workdir:
    words.append(shlex.quote(f"--workdir={folder}"))
  if not flags.FLAGS.resume:
    words.append("--resume")
  return " ".join(filter(None, words))


if __name__ == "__main__":
  define_flags()
  cli.run(main, config=True)
