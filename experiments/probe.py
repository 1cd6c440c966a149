"""How much class information leaves each module of trained runs.

  python -m experiments.probe --runs=runs/a,runs/b --out=probe.png

Each run is a work directory of `experiments.train` with local learning, or
with its end-to-end control (`local.isolated=false`). A linear probe, ridge
regression on features averaged over pixels, is trained on what leaves each
module of head 0 and measured on the test set. Writes the figure, and the
numbers beside it as JSON, both with their data set and seeds.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import build, cli, workdir
from mhil import (
  augment,
  checkpoint,
  heads,
  local,
  plots,
  probe,
  programs,
  sharding,
)
from mhil import bank as bank_lib
from mhil import config as config_lib

BATCH = 250


def define_flags() -> None:
  """Defines the flags; only for the program, as others import `probe`."""
  flags.DEFINE_list("runs", [], "Work directories, one curve each.")
  flags.DEFINE_list("labels", [], "Their names; those of the folders if none.")
  flags.DEFINE_string("data_folder", "", "Where TFDS sets are, if elsewhere.")
  flags.DEFINE_string("out", "probe.png", "The figure.")


def main() -> None:
  """Probes every run, draws the figure, writes the numbers."""
  given, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out)
  folders = [pathlib.Path(run) for run in given.runs]
  if not folders:
    raise cli.UserError("--runs= names no run; use --runs=DIR,DIR")
  labels = given.labels or [folder.name for folder in folders]
  if len(labels) != len(folders):
    raise cli.UserError(
      f"--labels has {len(labels)} names for {len(folders)} runs; use one each"
    )
  found = {}
  for label, folder in zip(labels, folders):
    with cli.checking():
      found[label] = of_run(folder, given.data_folder)
    numbers = " ".join(f"{x:.1f}" for x in found[label].percent)
    print(f"{label}: {numbers} %", flush=True)
  runs = ",".join(map(_shown, folders))
  more = " --data_folder=DIR" if given.data_folder else ""
  write(out, found, f"python -m experiments.probe --runs={runs}{more}")


class Probed(NamedTuple):
  """A run and what was found in it.

  Attributes:
    run: name of its folder.
    data: what it was trained and is tested on.
    seed: of its training.
    percent: accuracy of the probe behind each module.
  """

  run: str
  data: str
  seed: int
  percent: list[float]


def write(out: pathlib.Path, found: Mapping[str, Probed], command: str) -> None:
  """Draws the figure, and writes its numbers beside it, with their origin.

  Args:
    out: the figure.
    found: by the name to show.
    command: that made them.
  """
  sets = " and ".join(dict.fromkeys(each.data for each in found.values()))
  seeds = sorted({each.seed for each in found.values()})
  title = f"{sets}, seed {', '.join(map(str, seeds))}"
  plots.probes({k: each.percent for k, each in found.items()}, out, title)
  runs = {label: each._asdict() for label, each in found.items()}
  text = json.dumps({"command": command, "runs": runs}, indent=1) + "\n"
  out.with_suffix(".json").write_text(text, encoding="utf-8")


def of_run(folder: pathlib.Path, data_folder: str = "") -> Probed:
  """Test accuracy of a probe behind each module of a trained run.

  Raises:
    UserError: for a folder without a run, or a run of another kind.
  """
  config = workdir.read_config(folder, "runs")
  if config.objective.name != "local" or config.mesh.stage > 1:
    raise cli.UserError(
      f"--runs={folder} holds a run with objective.name="
      f"{config.objective.name} and mesh.stage={config.mesh.stage}; use one "
      "with objective.name=local and mesh.stage=1"
    )
  config.data.folder = data_folder or config.data.folder
  parts = build.parts(config)
  dataset = parts.dataset
  branch = build.branch_of(config, dataset, parts.stream)
  cut = build.make_split(config.local, branch, dataset)
  params, stats = restored(parts, folder)
  run = jax.jit(functools.partial(local.interfaces(cut), params, stats))
  train = features(run, dataset.train_images, dataset)
  test = features(run, dataset.test_images, dataset)
  labels = dataset.train_labels, dataset.test_labels
  percent = [
    round(100 * probe.accuracy(a, labels[0], b, labels[1]), 2)
    for a, b in zip(train, test)
  ]
  return Probed(folder.name, _about(config.data), config.seed, percent)


def restored(parts: build.Parts, folder: pathlib.Path) -> tuple[Any, Any]:
  """Parameters and statistics of head 0, from the newest save."""
  count = len(parts.stream.heads)
  numbers = bank_lib.numbers(range(count), count, parts.mesh)
  fresh = heads.initializer(
    parts.objective, parts.recipe.optimizer, numbers, parts.mesh
  )
  key = sharding.replicated(jax.random.key(0), parts.mesh)
  step = sharding.place(np.int32(0), parts.mesh, jax.P())
  # Its shapes are enough, and drawing the heads would compile for longer than
  # everything else here.
  where = jax.NamedSharding(parts.mesh, bank_lib.SPEC)
  bank = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    jax.eval_shape(fresh, key),
  )
  like = programs.State(step, bank, parts.transform.init())
  with (
    cli.checking(),
    checkpoint.Checkpoints(folder / "checkpoints") as saves,
  ):
    saved = saves.restore(like)
  if saved is None:
    raise cli.UserError(f"--runs={folder} has no checkpoint; name another run")
  bank = saved[0].bank
  return jax.tree.map(lambda x: np.asarray(x)[0, 0], (bank.params, bank.stats))


def features(run: Any, images: Any, dataset: Any) -> list[np.ndarray]:
  """Pooled features `[n, f]` behind each module."""
  parts = []
  for start in range(0, len(images), BATCH):
    rows = np.asarray(images[start : start + BATCH])
    given = augment.prepare(
      jnp.asarray(rows), **programs.pixels(dataset), train=False
    )
    parts.append([np.asarray(x) for x in run(given)])
  return [np.concatenate(each) for each in zip(*parts)]


def _about(data: config_lib.Data) -> str:
  name = data.name
  if name.startswith("arrays:"):
    name = pathlib.Path(name).name
  return name + f", {data.limit} images of each class" * bool(data.limit)


def _shown(folder: pathlib.Path) -> str:
  # Where runs lie on this machine is nobody's business.
  return f"DIR/{folder.name}" if folder.is_absolute() else str(folder)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
