"""Classes of images, by a run or by what `experiments.export` wrote of it.

  python -m experiments.predict --network=DIR --images=IMAGES.npy --out=OUT.npy
  python -m experiments.predict --run=DIR --images=IMAGES.npy --out=OUT.npy

IMAGES.npy holds images as `arrays:FOLDER` does, `[n, height, width, channels]`,
`[n, height, width]` or `[n, d]`, of the size and the type that the heads learnt
on; OUT.npy gets a class for each, `[n]` int32. A network needs neither the run
nor its data. A run is put on the devices of its mesh, its heads over all of
them, and of the scores only each device's best are compared.
"""

import contextlib
import errno
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, export
from mhil import phases, serving, sources


def main() -> None:
  """Reads the flags and answers."""
  given = flags.FLAGS
  if bool(given.network) == bool(given.run):
    raise cli.UserError("give one of --network=DIR and --run=DIR")
  if not (given.images and given.out):
    raise cli.UserError("--images and --out are both needed")
  out = pathlib.Path(given.out)
  with draft(out) as path:
    images = read(pathlib.Path(given.images))
    if given.network:
      with cli.checking():
        answer, told = serving.load(pathlib.Path(given.network), given.batch)
    else:
      answer, told = of_run(pathlib.Path(given.run), given.batch)
    with cli.checking():
      answer(images[: given.batch])  # Compiles.
      start = time.perf_counter()
      classes, *_ = answer(images)
    seconds = time.perf_counter() - start
    with cli.writing("out", out):
      with path.open("wb") as file:
        np.save(file, classes, allow_pickle=False)
      path.rename(out)
  print(f"{len(classes):,} images, {len(classes) / seconds:,.0f} a second")
  if told["missing_heads"]:
    print(export.missing(told))


@contextlib.contextmanager
def draft(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file beside `out`, to be written and renamed; in the end it is gone.

  Raises:
    UserError: if there can be none, or `out` is there and no plain file.
  """
  with cli.writing("out", out):
    if out.exists() and not out.is_file():
      raise OSError(errno.EEXIST, "it is no file")
    path = out.with_name(f".{out.name}.draft")
    path.touch()
  try:
    yield path
  finally:
    path.unlink(missing_ok=True)


def of_run(
  folder: pathlib.Path, batch: int
) -> tuple[Callable[[np.ndarray], tuple[np.ndarray, ...]], dict[str, Any]]:
  """The same as `serving.load` of a run, without scores.

  Raises:
    UserError: for a folder without a finished run.
  """
  run, state = export.restore(folder)
  told = serving.about(run, state)
  predict = phases.predictor(run, state, len(run.stream.tasks) - 1)

  def ask(images):
    return (predict(images).astype(np.int32),)

  return serving.in_batches(ask, told, batch), told


def read(path: pathlib.Path) -> np.ndarray:
  """The images of a file.

  Raises:
    UserError: for what is no array.
  """
  try:
    found = sources.read_array(path)
  except ValueError as error:
    raise cli.UserError(f"--images={error}") from None
  if found.ndim < 2 or not len(found):
    raise cli.UserError(f"--images={path} holds no images; name another file")
  return found


if __name__ == "__main__":
  flags.DEFINE_string("network", None, "Folder that experiments.export wrote.")
  flags.DEFINE_string("run", None, "Work directory of a finished run.")
  flags.DEFINE_string("images", None, "Array of images, of numpy.save.")
  flags.DEFINE_string("out", None, "Where their classes go.")
  flags.DEFINE_integer("batch", 256, "Images at once.", lower_bound=1)
  cli.run(main)
