"""Trains a multi-head network over a stream of tasks.

  python -m experiments.train                        digits, D-CE, 5 heads
  python -m experiments.train --config=configs/NAME.py --config.FIELD=VALUE
  python -m experiments.train --workdir=DIR --resume
  python -m experiments.train --heads=0,2 --workdir=DIR
  python -m experiments.train --coordinator=HOST:PORT --num_processes=N \\
    --process_id=I --workdir=DIR

With --heads it trains two heads of the stream, knowing nothing of the others;
see `experiments.assemble`. The last is one of N processes that share a mesh;
see `experiments.launch`.
The work directory receives config.json, metrics.json, report.html,
accuracy_matrix.csv, accuracy_matrix.png, curves.png, TensorBoard events and
checkpoints/. SIGTERM and Ctrl-C save and end with status 75.
"""

import contextlib
import datetime
import pathlib
import re
import shlex
import signal
import sys
from typing import Any

from absl import flags

from experiments import build, claims, cli, joining, pace, workdir
from mhil import checkpoint, data, prepare, processes, trainer
from mhil import config as config_lib


def define_flags() -> None:
  """Defines the flags; only for the program, as others import `train`."""
  flags.DEFINE_string(
    "workdir", None, "Where results go; default runs/<config>-<time>."
  )
  flags.DEFINE_bool(
    "resume", False, "Go on from the newest checkpoint in --workdir."
  )
  flags.DEFINE_list(
    "heads", None, "Train only these heads of the stream, such as 0,2."
  )
  flags.DEFINE_bool("quiet", False, "No progress bar.")
  joining.define_flags()


def main() -> None:
  """Reads the flags and runs one experiment."""
  given = flags.FLAGS
  if given.resume and not given.workdir:
    raise cli.UserError("--resume needs to know the run; add --workdir=DIR")
  if given.heads is not None:
    choose(given.config, given.heads)
  folder = pathlib.Path(given.workdir or _default_workdir())
  with joining.joined() as together:
    numbers = train(
      given.config,
      folder,
      resume=given.resume,
      bar=not given.quiet,
      together=together,
    )
    if together.first and numbers is not None:
      tell(numbers, folder)
  if numbers is None:
    how = f"resume with: {_resume_command(folder)}"
    raise cli.Stopped(how if together.first else "")


def tell(numbers: dict[str, Any], folder: pathlib.Path) -> None:
  """Prints what came out of a run."""
  print(workdir.table(numbers))
  if heads := flags.FLAGS.config.heads:
    print(
      f"heads {heads} alone: every other head's classes count as "
      "wrong; put all heads together by experiments.assemble"
    )
  print(f"results in {folder}")


def choose(config: config_lib.Config, heads: list[str]) -> None:
  """Leaves these heads of a configuration, on no more devices than heads.

  Raises:
    UserError: for what is no number.
  """
  if not heads or not all(head.strip().isdecimal() for head in heads):
    raise cli.UserError(
      f"--heads={','.join(heads)} is no list of numbers; use for instance "
      "--heads=0,2"
    )
  config.heads = tuple(sorted(int(head) for head in heads))
  config.mesh.head = min(config.mesh.head, len(config.heads))


def train(
  config: config_lib.Config,
  folder: pathlib.Path,
  *,
  resume: bool = False,
  bar: bool = False,
  together: processes.Together = processes.ALONE,
) -> dict[str, Any] | None:
  """Trains, tests, saves and draws; the numbers of `metrics.json`.

  Args:
    config: what to run; validated before anything else.
    folder: the work directory.
    resume: go on with the run that the folder holds.
    bar: show a progress bar.
    together: the processes that share the mesh; the first one writes.

  Returns:
    None if a signal stopped the run; it is saved and can be resumed.
  """
  # 1. Everything that can be wrong is found before training.
  workdir.enable_compilation_cache()
  with cli.checking():
    parts = build.parts(config, together.count)
    fingerprint = data.fingerprint(parts.dataset)
    joining.agree(together, config, parts, fingerprint, resume)
  with contextlib.ExitStack() as stack:
    if together.first:
      stack.enter_context(
        claims.claimed(folder, config, resume, fingerprint, parts)
      )
      announce(parts, config)
    together.wait("claimed")
    joining.check_shared(together, folder, config)
    stack.enter_context(claims.room(folder))
    return _train(config, parts, folder, fingerprint, resume, bar, together)


def _train(
  config: config_lib.Config,
  parts: build.Parts,
  folder: pathlib.Path,
  fingerprint: str,
  resume: bool,
  bar: bool,
  together: processes.Together,
) -> dict[str, Any] | None:
  with (
    cli.checking(),
    checkpoint.Checkpoints(
      folder / "checkpoints",
      every=config.checkpoint.every,
      keep=config.checkpoint.keep,
    ) as checkpoints,
    workdir.Events(folder, together.first) as events,
    StopSignal() if together.count == 1 else joining.Preempted() as stop,
  ):
    # 2. Train and test, task after task.
    run = prepare.build(*parts[:6], config.seed, *parts[6:], config.heads)
    result = trainer.fit(
      run,
      checkpoints=checkpoints,
      resume=resume,
      stop=stop,
      log=events.write,
      scored=workdir.scores(folder) if config.heads else None,
      bar=bar and together.first,
    )
  if not result.finished:
    if together.first:
      print(f"stopped by a signal; saved at step {result.progress.step}")
    return None

  # 3. Numbers, figures, the report.
  numbers = result.metrics | workdir.origin(config, parts.stream, fingerprint)
  # Each would take as many steps as its own clock allows.
  speed = together.count == 1 and pace.measured(
    run, build.end_to_end(config, parts)
  )
  if speed:
    numbers["speed"] = speed
    print(pace.line(speed))
  if together.first:
    workdir.write(folder, numbers, result.progress, config)
  return numbers


def announce(parts: build.Parts, config: config_lib.Config) -> None:
  """Prints what the memory holds, and what a model says of stages."""
  print(workdir.memory(parts.transform.facts, config.memory.size))
  if "stage_multiply_adds" in parts.objective.facts:
    print(workdir.stages(parts.objective.facts, config.mesh.stage))


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
  # Where the processes were is of no use to those to come.
  given = shlex.join(sys.argv[1:])
  flag = r"(^|\s)--?(coordinator|num_processes|process_id)[= ]\S+"
  words = ["python -m experiments.train", re.sub(flag, "", given).strip()]
  if not flags.FLAGS.workdir:
    words.append(shlex.quote(f"--workdir={folder}"))
  if not flags.FLAGS.resume:
    words.append("--resume")
  return " ".join(filter(None, words))


if __name__ == "__main__":
  define_flags()
  cli.run(main, config=True)
