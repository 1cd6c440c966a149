"""How much class information leaves each module of trained runs.

  python -m experiments.probe --runs=runs/a,runs/b --out=probe.png

Each run is a work directory of `experiments.train` with local learning, or
with its end-to-end control (`local.isolated=false`). A linear probe, ridge
regression on features averaged over pixels, is trained on what leaves each
module of head 0 and measured on the test set. Writes the figure, and the
numbers beside it as JSON.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import build, cli
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
  curves = {}
  for label, folder in zip(labels, folders):
    with cli.checking():
      curves[label] = of_run(folder, given.data_folder)
    print(label, " ".join(f"{x:.3f}" for x in curves[label]), flush=True)
  plots.probes(curves, out)
  text = json.dumps(curves, indent=1) + "\n"
  out.with_suffix(".json").write_text(text, encoding="utf-8")


def of_run(folder: pathlib.Path, data_folder: str = "") -> list[float]:
  """Test accuracy of a probe behind each module of a trained run.

  Raises:
    UserError: for a folder without a run, or a run of another kind.
  """
  config = read_config(folder / "config.json")
  if config.objective.name != "local" or config.mesh.stage > 1:
    raise cli.UserError(
      f"--runs={folder} holds a run with objective.name="
      f"{config.objective.name} and mesh.stage={config.mesh.stage}; use one "
      "with objective.name=local and mesh.stage=1"
    )
  config.data.folder = data_folder or config.data.folder
  parts = build.parts(config)
  width = parts.stream.head_width + 1
  branch = build.make_branch(config.network, parts.dataset, width)
  cut = build.make_split(config.local, branch, parts.dataset)
  params, stats = restored(parts, folder)
  run = jax.jit(functools.partial(local.interfaces(cut), params, stats))
  dataset = parts.dataset
  sets = [
    (features(run, images, dataset), labels)
    for images, labels in (
      (dataset.train_images, dataset.train_labels),
      (dataset.test_images, dataset.test_labels),
    )
  ]
  (train, train_labels), (test, test_labels) = sets
  return [
    probe.accuracy(a, train_labels, b, test_labels) for a, b in zip(train, test)
  ]


def read_config(path: pathlib.Path) -> config_lib.Config:
  """The configuration that a run was started with."""
  if not path.is_file():
    raise cli.UserError(f"--runs={path.parent} holds no run; name another")
  config = config_lib.Config()
  for field, value in config_lib.flatten(json.loads(path.read_text())).items():
    value = tuple(value) if isinstance(value, list) else value
    config_lib.assign(config, field, value)
  return config


def restored(parts: build.Parts, folder: pathlib.Path) -> tuple[Any, Any]:
  """Parameters and statistics of head 0, from the newest save."""
  fresh = heads.initializer(
    parts.objective, parts.recipe.optimizer, len(parts.stream.tasks), parts.mesh
  )
  key = sharding.replicated(jax.random.key(0), parts.mesh)
  step = sharding.place(np.int32(0), parts.mesh, jax.P())
  like = programs.State(step, jax.jit(fresh)(key), parts.transform.init())
  with checkpoint.Checkpoints(folder / "checkpoints") as saves:
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


if __name__ == "__main__":
  define_flags()
  cli.run(main)
