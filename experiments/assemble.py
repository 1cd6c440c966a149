"""Puts heads that were trained apart together into one network.

  python -m experiments.train --heads=0,1 --workdir=runs/a
  python -m experiments.train --heads=2,3,4 --workdir=runs/b
  python -m experiments.assemble --parts=runs/a,runs/b --workdir=runs/whole

The first two need no link, and may run on other machines at other times. The
third checks that they had one configuration, one set of data and one class
order, and that every head is there once. Its work directory is that of one
program that trained all heads, bit for bit where the machines are of one kind:
the same hash of the parameters, the same accuracy matrix, figures, report, and
a checkpoint. What layer-parallel training measures of its guesses is left out.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import build, claims, cli, workdir
from mhil import alone, checkpoint, data, facts, prepare, programs, progress
from mhil import config as config_lib
from mhil import run as run_lib
from mhil import sources as sources_lib
from mhil.losses import MASKED

# Fields in which parts may differ; what lay in a folder is known by its hash.
FREE = {"heads", "mesh.head", "data.folder"}
FREE |= {"checkpoint.every", "checkpoint.keep"}
# Of the step that was run, and not of the one that is built here.
OF_STEP = "compiles", "collectives", "step_bytes_per_device"


class Part(NamedTuple):
  """What one process left."""

  folder: pathlib.Path
  config: config_lib.Config
  fingerprint: str
  numbers: dict[str, Any]


def define_flags() -> None:
  """Defines the flags; only for the program."""
  flags.DEFINE_list("parts", None, "Work directories of the processes.")
  flags.DEFINE_string("workdir", None, "Where the whole network goes.")
  flags.DEFINE_string(
    "data_folder", None, "Where the data set is here; else as the first part's."
  )


def main() -> None:
  """Reads the flags and assembles."""
  given = flags.FLAGS
  if not given.parts or not given.workdir:
    raise cli.UserError(
      "--parts and --workdir are needed: --parts=DIR,DIR --workdir=DIR"
    )
  numbers = assemble(
    [pathlib.Path(part) for part in given.parts],
    pathlib.Path(given.workdir),
    given.data_folder,
  )
  print(workdir.table(numbers))
  print(f"results in {given.workdir}")


def assemble(
  folders: Sequence[pathlib.Path],
  out: pathlib.Path,
  data_folder: str | None = None,
) -> dict[str, Any]:
  """The numbers of `metrics.json` of the whole network, which lies in `out`.

  Args:
    folders: of the parts.
    out: the work directory.
    data_folder: where the data set is; None as in the first part.

  Raises:
    UserError: for parts that are not of one network, or not all of it.
  """
  # 1. Everything that can be wrong is found before anything is built.
  workdir.enable_compilation_cache()
  found = [read(folder) for folder in folders]
  check_alike(found)
  check_once(found)
  config = whole(found)
  config.data.folder = data_folder or config.data.folder
  again = begun(out, folders, config)
  with cli.checking():
    parts = build.parts(config)
  check_all(found, len(parts.stream.tasks))
  fingerprint = data.fingerprint(parts.dataset)
  claims.check_data(found[0].folder, fingerprint, "parts")

  # 2. Heads side by side; scores side by side; the tests that follow.
  with cli.checking():
    run = prepare.build(*parts[:6], config.seed, *parts[6:])
  saved = [restore(run, part) for part in found]
  tell_versions(found)
  heads = [part.config.heads for part in found]
  state = join(run, [state for state, _ in saved], heads)
  done = merge([done for _, done in saved])
  tallies = tuple(
    alone.tally(run, table(run, found, t)) for t in range(len(done.seconds))
  )
  done = done._replace(tallies=tallies, probes=({},) * len(tallies))

  # 3. What one program would have left; nothing, if a part was unsound.
  with claims.claimed(out, config, again, fingerprint, parts):
    with cli.checking(), checkpoint.Checkpoints(out / "checkpoints") as saves:
      saves.save(done.step, state, progress.to_json(done))
    numbers = progress.measured(done) | facts.of_run(run, state)
    numbers |= workdir.origin(config, parts.stream, fingerprint)
    numbers |= {name: found[0].numbers[name] for name in OF_STEP}
    workdir.write(out, numbers, done, config)
  return numbers


def read(folder: pathlib.Path) -> Part:
  """A part's configuration and the hash of its data.

  Raises:
    UserError: if its run is not of some heads alone, or not finished.
  """
  config = workdir.read_config(folder, "parts")
  config.heads = tuple(sorted(config.heads))
  if not config.heads:
    raise cli.UserError(
      f"--parts={folder} trained all heads; name runs that began with --heads"
    )
  if not (folder / "metrics.json").is_file():
    raise cli.UserError(
      f"--parts={folder} is not finished; go on with it by python -m "
      f"experiments.train --workdir={folder} --resume and its other flags"
    )
  numbers = json.loads((folder / "metrics.json").read_text())
  return Part(folder, config, claims.data_hash(folder, "parts"), numbers)


def begun(
  out: pathlib.Path,
  folders: Sequence[pathlib.Path],
  config: config_lib.Config,
) -> bool:
  """Whether an assembly that was stopped lies there, to be made again.

  Raises:
    UserError: if something else lies there.
  """
  if out.resolve() in {folder.resolve() for folder in folders}:
    raise cli.UserError(f"--workdir={out} is one of --parts; name another")
  if (out / "metrics.json").exists():
    raise cli.UserError(f"--workdir={out} holds a run already; name another")
  if there := (out / claims.CONFIG).exists():
    claims.check_same(out, config)
  return there


def check_alike(parts: Sequence[Part]) -> None:
  """Raises UserError unless the parts are of one run."""
  first, *rest = parts
  wanted = config_lib.flatten(config_lib.to_dict(first.config))
  for part in rest:
    if part.fingerprint != first.fingerprint:
      raise cli.UserError(
        f"--parts={part.folder} learnt from data {part.fingerprint[:12]}, "
        f"{first.folder} from {first.fingerprint[:12]}; train one of them again"
      )
    fields = config_lib.flatten(config_lib.to_dict(part.config))
    for name, value in fields.items():
      if name not in FREE and value != wanted[name]:
        raise cli.UserError(
          f"--parts={part.folder} has {name}={value!r}, {first.folder} "
          f"{wanted[name]!r}; train one of them again"
        )


def tell_versions(parts: Sequence[Part]) -> None:
  """Says so where parts were trained by other versions: bits may differ."""
  first, *rest = ({"versions": {}} | part.numbers for part in parts)
  for part, numbers in zip(parts[1:], rest):
    for name, version in numbers["versions"].items():
      other = first["versions"].get(name)
      if version != other:
        print(
          f"note: {part.folder} was trained with {name} {version}, "
          f"{parts[0].folder} with {other}; one program might end otherwise"
        )


def check_once(parts: Sequence[Part]) -> None:
  """Raises UserError if a head is there twice."""
  there: dict[int, pathlib.Path] = {}
  for part in parts:
    for head in part.config.heads:
      if head in there:
        raise cli.UserError(
          f"--parts: head {head} is in {there[head]} and in {part.folder}; "
          "name one of them"
        )
      there[head] = part.folder


def check_all(parts: Sequence[Part], count: int) -> None:
  """Raises UserError if one of `count` heads is missing."""
  there = {head for part in parts for head in part.config.heads}
  if missing := sorted(set(range(count)) - there):
    told = ",".join(map(str, missing))
    raise cli.UserError(
      f"--parts: heads={told} are missing; train them by --heads={told}, and "
      "name that run too"
    )


def whole(parts: Sequence[Part]) -> config_lib.Config:
  """The configuration of all heads together, on one device: none is trained."""
  config = workdir.read_config(parts[0].folder, "parts")
  config.heads = ()
  config.mesh.head = 1
  return config


def restore(run: run_lib.Run, part: Part) -> tuple[Any, progress.Progress]:
  """A part's last state, its heads in one row after the other."""
  folder = part.folder / "checkpoints"
  with cli.checking(), checkpoint.Checkpoints(folder, writes=False) as saves:
    saved = saves.restore(run_lib.shapes(run_lib.start(run)))
  if saved is None:
    raise cli.UserError(
      f"--parts={part.folder} has no sound checkpoint; train it again"
    )
  state, done = saved[0], progress.from_json(saved[1])
  if done.step != run.phases[-1].steps.stop:
    raise cli.UserError(
      f"--parts={part.folder} has lost its last checkpoint; go on with it by "
      "--resume"
    )
  return state, done


def join(
  run: run_lib.Run, states: Sequence[programs.State], heads: Sequence[Any]
) -> programs.State:
  """The state of all heads; what each remembers must be the same."""
  first, *rest = (jax.tree.leaves(state.memory) for state in states)
  for held in rest:
    if not all(map(np.array_equal, first, held)):
      raise cli.UserError(
        "--parts: they do not remember the same samples; train one again"
      )
  fresh = run_lib.start(run)
  bank = alone.join(fresh.bank, [state.bank for state in states], heads)
  return programs.State(states[0].step, bank, states[0].memory)


def table(run: run_lib.Run, parts: Sequence[Part], t: int) -> np.ndarray:
  """Scores `[n, heads, c]` of all heads after task `t`."""
  stream, labels = run.stream, run.dataset.test_labels
  n = int(np.isin(labels, stream.seen(t)).sum())
  scores = np.full((n, len(stream.tasks), stream.head_width), MASKED, "f4")
  for part in parts:
    path, wanted = part.folder / "scores" / f"{t}.npy", len(part.config.heads)
    try:
      found = sources_lib.read_array(path)
    except ValueError:
      raise cli.UserError(
        f"{path} is missing or damaged; train {part.folder} again"
      ) from None
    if found.shape != (n, wanted, stream.head_width):
      raise cli.UserError(f"{path} is of another run; train it again")
    scores[:, list(part.config.heads)] = found
  return scores


def merge(done: Sequence[progress.Progress]) -> progress.Progress:
  """Losses of all heads; times of processes that ran side by side."""
  rows: dict[Any, list[float | None]] = {}
  for part in done:
    for step, *losses in part.history:
      row = rows.setdefault(step, [None] * len(losses))
      for i, loss in enumerate(losses):
        row[i] = loss if row[i] is None else row[i]
  return done[0]._replace(
    history=tuple((step, *row) for step, row in sorted(rows.items())),
    seconds=tuple(map(max, zip(*(part.seconds for part in done)))),
    waited=max(part.waited for part in done),
    stepped=max(part.stepped for part in done),
    tested=max(part.tested for part in done),
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
