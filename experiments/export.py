"""Writes a finished run's network as files that need neither run nor data.

  python -m experiments.export --run=runs/whole --out=network

Works for a run of all heads, of some (`--heads`), and for assembled ones. Of
heads that are missing it says which classes nobody can answer.
"""

import pathlib
import tempfile

from absl import flags

from experiments import build, claims, cli, longer, workdir
from mhil import checkpoint, data, prepare, programs, serving
from mhil import run as run_lib


def main() -> None:
  """Reads the flags and writes the network."""
  given = flags.FLAGS
  if not given.run or not given.out:
    raise cli.UserError("--run and --out are needed: --run=DIR --out=DIR")
  folder, out = pathlib.Path(given.run), pathlib.Path(given.out)
  told = export(folder, out)
  size = (out / serving.PROGRAM).stat().st_size
  print(f"{len(told['classes'])} classes, {size:,} bytes, in {out}")
  if told["missing_heads"]:
    print(missing(told))


def missing(told: dict) -> str:
  """Which classes a network cannot answer, in a line."""
  heads = ", ".join(map(str, told["missing_heads"]))
  classes = ", ".join(map(str, told["missing_classes"]))
  return f"heads {heads} are missing: no image is given to classes {classes}"


def export(folder: pathlib.Path, out: pathlib.Path) -> dict:
  """What `serving.about` says of the network that is in `out` now.

  Raises:
    UserError: for a folder without a finished run, or an `out` that cannot be
      written.
  """
  with cli.writing("out", out):
    # Where the folder is to be, so that none is left behind by a mistake.
    there = next(place for place in (out, *out.parents) if place.exists())
    tempfile.TemporaryFile(dir=there).close()
  run, state = restore(folder)
  with cli.checking(), cli.writing("out", out):
    return serving.save(out, run, state)


def restore(folder: pathlib.Path) -> tuple[run_lib.Run, programs.State]:
  """A finished run and its state, on the devices of this program.

  Raises:
    UserError: for a folder without a finished run, or other data than it
      began with.
  """
  workdir.enable_compilation_cache()
  config = workdir.read_config(folder, "run")
  unfinished = f"--run={folder} is not finished; go on with it by --resume"
  if not (folder / claims.METRICS).is_file():
    raise cli.UserError(unfinished)
  with cli.checking():
    parts = build.parts(config)
    claims.check_data(folder, data.fingerprint(parts.dataset), "run")
    # The network has the mean and the deviation of the pixels in it.
    if began := longer.read(folder, "run"):
      longer.check_pixels(folder, began, config, parts.dataset, "run")
    run = prepare.build(*parts[:6], config.seed, *parts[6:], config.heads)
    like = run_lib.shapes(run_lib.start(run))
    with checkpoint.Checkpoints(
      folder / "checkpoints", writes=False
    ) as checkpoints:
      saved = checkpoints.restore(like)
  if saved is None:
    raise cli.UserError(
      f"--run={folder} has no sound checkpoint; train it again"
    )
  if saved[1]["step"] != run.phases[-1].steps.stop:
    raise cli.UserError(unfinished)
  return run, run_lib.refit(run, saved[0], like)


if __name__ == "__main__":
  flags.DEFINE_string("run", None, "Work directory of a finished run.")
  flags.DEFINE_string("out", None, "Folder for the network.")
  cli.run(main)
