"""A network as a file: the same answers, without its run or its data."""

import json

import numpy as np
import pytest

from mhil import phases, serving
from mhil import run as run_lib
from tests import program, test_alone, tiny

EXPORT = """
import runpy
runpy.run_module("experiments.export", run_name="__main__", alter_sys=True)
"""
PREDICT = EXPORT.replace("export", "predict")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A network of all heads that lay on two devices, and its run."""
  folder = tmp_path_factory.mktemp("serving") / "network"
  run, done, _ = test_alone.trained("all", head=2)
  told = serving.save(folder, run, done.state)
  return folder, run, done, told


def test_it_answers_as_the_run_does(whole):
  folder, run, done, told = whole
  answer, found = serving.load(folder, batch=16)
  assert found == told and told["missing_heads"] == []
  images = run.dataset.test_images
  assert len(images) % 16
  classes, scores = answer(images)
  np.testing.assert_array_equal(classes, done.predict(images))
  assert len(set(classes.tolist())) > 2
  assert scores.shape == classes.shape and np.isfinite(scores).all()


def test_any_number_of_images_gives_the_same(whole):
  folder, run, *_ = whole
  answer, _ = serving.load(folder, batch=16)
  images = run.dataset.test_images
  all_at_once = serving.load(folder, batch=len(images))[0](images)
  for n in 1, 15, 16, 17:
    classes, scores = answer(images[:n])
    np.testing.assert_array_equal(classes, all_at_once[0][:n])
    np.testing.assert_allclose(scores, all_at_once[1][:n], rtol=1e-5)


def test_other_parameters_answer_otherwise(whole):
  """The control: a network that has learnt nothing."""
  _, run, done, _ = whole
  images = run.dataset.test_images
  drawn = phases.predictor(run, run_lib.start(run), 3)(images)
  assert (drawn != done.predict(images)).any()


def test_missing_heads_are_named_and_never_answer(tmp_path):
  run, done, _ = test_alone.trained("all", (1,))
  told = serving.save(tmp_path, run, done.state)
  classes, _ = serving.load(tmp_path)[0](run.dataset.test_images)
  assert told["missing_heads"] == [0, 2, 3]
  assert set(classes.tolist()) <= set(run.stream.tasks[1])
  assert told["classes"] == list(run.stream.tasks[1])
  gone = {c for t in (0, 2, 3) for c in run.stream.tasks[t]}
  assert set(told["missing_classes"]) == gone


@pytest.mark.parametrize(
  "images, words",
  [
    (np.zeros((3, 2, 2), np.uint8), r"images are \(3, 2, 2\), and the network"),
    (np.zeros((3, 4, 4, 1), np.uint8), "give it images of"),
    (np.zeros((3, 2, 2, 1)), "3 of float64; give the network some, of uint8"),
    (np.zeros((0, 2, 2, 1), np.uint8), "images are 0 of uint8; give"),
  ],
)
def test_images_that_it_does_not_take_are_refused(whole, images, words):
  answer, _ = serving.load(whole[0])
  with pytest.raises(ValueError, match=words):
    answer(images)


@pytest.mark.parametrize("damage", ["cut", "no program", "no words", "words"])
def test_a_damaged_network_is_refused(whole, damage, tmp_path):
  for name in serving.PROGRAM, serving.ABOUT:
    (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
  path = tmp_path / serving.PROGRAM
  if damage == "cut":
    path.write_bytes(path.read_bytes()[:100])
  elif damage == "no program":
    path.unlink()
  elif damage == "no words":
    (tmp_path / serving.ABOUT).unlink()
  else:
    (tmp_path / serving.ABOUT).write_text("{")
  with pytest.raises(ValueError, match="holds no sound network"):
    serving.load(tmp_path)


@pytest.mark.slow
def test_from_a_run_to_a_file_to_classes(tmp_path):
  folder, cache = tmp_path / "run", tmp_path / "cache"
  data = program.save_arrays(tmp_path / "data")
  flags = [*program.tiny_flags(data), f"--workdir={folder}"]
  trained = program.forked(flags, tmp_path / "t", cache=cache)
  assert trained.status == 0, trained
  to = [f"--run={folder}", f"--out={tmp_path / 'network'}"]
  done = program.forked(to, tmp_path / "e", EXPORT, cache)
  assert (done.status, done.err) == (0, ""), done
  assert done.out.startswith("10 classes, ")
  images = tiny.dataset(10).test_images
  np.save(tmp_path / "images.npy", images)
  given = [f"--{name}={tmp_path / name}" for name in ("network",)]
  given += [
    f"--images={tmp_path / 'images.npy'}",
    f"--out={tmp_path / 'o.npy'}",
  ]
  done = program.forked(given, tmp_path / "p", PREDICT, cache)
  assert (done.status, done.err) == (0, ""), done
  classes = np.load(tmp_path / "o.npy")
  numbers = json.loads((folder / "metrics.json").read_text())
  right = (classes == tiny.dataset(10).test_labels).mean()
  assert right == pytest.approx(numbers["last_accuracy"])

  # The run itself, its heads on five devices, answers alike.
  ask = [f"--run={folder}", given[1], f"--out={tmp_path / 'r.npy'}"]
  done = program.forked([*ask, "--batch=64"], tmp_path / "r", PREDICT, cache)
  assert (done.status, done.err) == (0, ""), done
  np.testing.assert_array_equal(np.load(tmp_path / "r.npy"), classes)

  both = program.forked([*given, ask[0]], tmp_path / "x", PREDICT)
  assert both.status == 2 and "one of --network=DIR and --run=DIR" in both.err
  bad = program.forked(
    [*given[:1], "--images=no", given[2]], tmp_path / "b", PREDICT
  )
  assert bad.status == 2
  assert bad.err == (
    "error: --images=no is no array of images; name a file of numpy.save\n"
  )
