"""Classes of images, by a network that `experiments.export` wrote.

  python -m experiments.predict --network=DIR --images=IMAGES.npy --out=OUT.npy

IMAGES.npy holds images as they are stored, `[n, height, width, channels]`;
OUT.npy gets a class for each, `[n]`. Neither the run nor its data are needed.
"""

import pathlib
import time

import numpy as np
from absl import flags

from experiments import cli, export
from mhil import serving


def main() -> None:
  """Reads the flags and answers."""
  given = flags.FLAGS
  if not (given.network and given.images and given.out):
    raise cli.UserError("--network, --images and --out are all needed")
  images = read(pathlib.Path(given.images))
  with cli.checking():
    answer, told = serving.load(pathlib.Path(given.network), given.batch)
    answer(images[: given.batch])  # Compiles.
    start = time.perf_counter()
    classes, _ = answer(images)
  seconds = time.perf_counter() - start
  np.save(given.out, classes, allow_pickle=False)
  print(f"{len(classes):,} images, {len(classes) / seconds:,.0f} a second")
  if told["missing_heads"]:
    print(export.missing(told))


def read(path: pathlib.Path) -> np.ndarray:
  """The images of a file.

  Raises:
    UserError: for what is no array.
  """
  try:
    found = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError):
    raise cli.UserError(
      f"--images={path} is no array of images; name a file of numpy.save"
    ) from None
  if not isinstance(found, np.ndarray) or found.ndim < 2 or not len(found):
    raise cli.UserError(f"--images={path} holds no images; name another file")
  return found


if __name__ == "__main__":
  flags.DEFINE_string("network", None, "Folder that experiments.export wrote.")
  flags.DEFINE_string("images", None, "Array of images, of numpy.save.")
  flags.DEFINE_string("out", None, "Where their classes go.")
  flags.DEFINE_integer("batch", 256, "Images at once.", lower_bound=1)
  cli.run(main)
