"""Linear probes: what they find, and what they must not."""

import functools
import json

import jax
import numpy as np
import pytest

from experiments import build, cli, workdir
from experiments import probe as program
from mhil import config as config_lib
from mhil import facts, probe
from tests import program as tiny_program
from tests.test_plots import check_picture, figures

__all__ = ["figures"]


def blobs(n, noise, seed=0, classes=3, f=5):
  rng = np.random.default_rng(1)
  centre = rng.normal(0, 1, (classes, f))
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % classes
  return centre[labels] + rng.normal(0, noise, (n, f)), labels


def test_what_is_there_is_found():
  found = probe.accuracy(*blobs(90, 0.05), *blobs(60, 0.05, seed=2))
  assert found == 1.0


def test_what_is_not_there_is_not_found():
  train, labels = blobs(600, 0.05)
  mixed = np.random.default_rng(3).permutation(labels)
  found = probe.accuracy(train, mixed, *blobs(600, 0.05, seed=2))
  # Chance is a third. All rows of a class are alike, so 3 guesses decide: a
  # guess is right for one class in three.
  assert found <= 2 / 3
  noise = np.random.default_rng(4).normal(0, 1, (600, 5))
  found = probe.accuracy(noise, labels, noise[::-1], labels)
  assert abs(found - 1 / 3) < 0.1


def test_more_noise_leaves_less():
  found = [
    probe.accuracy(*blobs(300, noise), *blobs(300, noise, seed=2))
    for noise in (0.1, 1.0, 3.0)
  ]
  assert found[0] > found[1] > found[2]


def test_scale_and_dead_features_do_not_matter():
  (train, labels), (test, wanted) = blobs(90, 0.7), blobs(60, 0.7, seed=2)
  plain = probe.accuracy(train, labels, test, wanted)
  train, test = (
    np.concatenate([1e3 * x + 7, np.ones((len(x), 2))], 1)
    for x in (train, test)
  )
  assert probe.accuracy(train, labels, test, wanted) == plain


# -- the program -------------------------------------------------------------


FIELDS = {
  "seed": 3,
  "mesh.head": 1,
  "stream.increment": tiny_program.CLASSES,
  "network.widths": (9, 8, 7),
  "network.norm": "batch",
  "network.reads": 4,
  "objective.name": "local",
  "local.cuts": (0, 1),
  "local.classifier": "0c1f",
  "memory.size": 0,
  "train.epochs": 2,
  "train.batch": 20,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a tiny run: three modules, a classifier that reads part."""
  folder = tmp_path_factory.mktemp("probed")
  name = tiny_program.save_arrays(folder / "tiny")
  fields = FIELDS | {"data.name": name}
  flags = [cli.override(field, value) for field, value in fields.items()]
  flags += ["--quiet", f"--workdir={folder / 'run'}"]
  done = tiny_program.forked(flags, folder / "fork")
  assert done.status == 0, done.err
  return folder / "run"


def test_a_run_is_probed_behind_each_module(run):
  found = program.of_run(run)
  assert (found.run, found.data, found.seed) == ("run", "tiny", 3)
  # Blobs are told apart by a linear probe of their few pixels.
  assert len(found.percent) == 3 and found.percent[0] > 50
  # Behind the last module lies what the readout sees.
  parts = build.parts(workdir.read_config(run, "runs"))
  given = program.restored(parts, run)
  features = jax.jit(functools.partial(parts.objective.features, *given))
  set_ = parts.dataset
  (train_set,), (test_set,) = (
    program.features(lambda x: [features(x)], images, set_)
    for images in (set_.train_images, set_.test_images)
  )
  assert train_set.shape[1] == 7 and train_set.std() > 0
  labels = set_.train_labels, set_.test_labels
  last = probe.accuracy(train_set, labels[0], test_set, labels[1])
  assert found.percent[-1] == round(100 * last, 2)


def test_what_was_trained_is_probed(run):
  parts = build.parts(workdir.read_config(run, "runs"))
  params, _ = program.restored(parts, run)
  rows = jax.tree.map(lambda x: x[None, None], params)
  told = json.loads((run / "metrics.json").read_text())
  assert facts.params_sha256(rows, 1) == told["params_sha256"]


def test_figure_and_numbers_say_where_they_are_from(run, figures, tmp_path):
  found = program.of_run(run)
  other = found._replace(run="two", seed=5, percent=found.percent[:2])
  out = tmp_path / "probe.png"
  program.write(out, {"R0": found, "E": other}, "a command")
  assert check_picture(out).any()
  assert figures[0].get_suptitle() == "tiny, seed 3, 5"
  told = json.loads(out.with_suffix(".json").read_text())
  assert told["command"] == "a command"
  assert told["runs"]["E"] == {
    "run": "two",
    "data": "tiny",
    "seed": 5,
    "percent": found.percent[:2],
  }


@pytest.mark.parametrize(
  "folder, shown", [("runs/a", "runs/a"), ("/some/where/a", "DIR/a")]
)
def test_no_place_of_a_machine_is_told(folder, shown):
  assert program._shown(program.pathlib.Path(folder)) == shown


def test_a_part_of_a_set_is_named():
  data = config_lib.Data(name="tfds:fashion_mnist", limit=150)
  assert program._about(data) == (
    "tfds:fashion_mnist, 150 images of each class"
  )


def test_a_folder_without_a_run_is_named(tmp_path):
  with pytest.raises(cli.UserError, match="holds no run; name another"):
    program.of_run(tmp_path)


def test_a_run_of_another_kind_is_named(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"mesh": {"head": 5}}))
  with pytest.raises(cli.UserError, match=r"objective\.name=end_to_end"):
    program.of_run(tmp_path)


def test_a_configuration_comes_back_as_it_was(tmp_path):
  want = config_lib.Config(local=config_lib.Local(cuts=(1, 2), mode="E"))
  (tmp_path / "config.json").write_text(config_lib.to_json(want))
  assert workdir.read_config(tmp_path, "runs") == want
