"""A network as a file: the same answers, without its run or its data."""

import contextlib
import io
import json
import shutil
import types

import numpy as np
import pytest

from experiments import cli, export, predict, train, workdir
from mhil import config as config_lib
from mhil import data, phases, serving
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


@pytest.mark.slow
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
    (np.zeros((3, 2, 3), np.uint8), r"images are \(3, 2, 3\), and the network"),
    (np.zeros((3, 4), np.uint8), r"images are \(3, 4\), and the network"),
    (np.zeros((3, 4, 4, 1), np.uint8), "give it images of"),
    (np.zeros((3, 2, 2, 1)), "3 of float64; give the network some, of uint8"),
    (np.zeros((0, 2, 2, 1), np.uint8), "images are 0 of uint8; give"),
  ],
)
def test_images_that_it_does_not_take_are_refused(whole, images, words):
  answer, _ = serving.load(whole[0])
  with pytest.raises(ValueError, match=words):
    answer(images)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_images_that_are_no_numbers_are_refused(bad):
  told = {"image_shape": [2, 2, 1], "image_dtype": "float32"}
  images = np.zeros((5, 2, 2, 1), np.float32)
  answer = serving.in_batches(lambda x: (x[:, 0, 0, 0],), told, 2)
  assert answer(images)[0].tolist() == [0] * 5
  images[3:, 1, 0] = bad
  words = "NaN or infinity, first in image 3; repair or drop such images"
  with pytest.raises(ValueError, match=words):
    answer(images)


@pytest.mark.parametrize("shape", [(4, 2), (6,)], ids=str)
def test_images_may_have_any_form_that_a_data_set_may(shape, tmp_path):
  stored = np.random.default_rng(0).random((10, *shape), np.float32)
  labels = {f"{split}_labels": np.arange(10) for split in ("train", "test")}
  images = {f"{split}_images": stored for split in ("train", "test")}
  name = program.save_arrays(tmp_path, **labels, **images)
  wanted = data.load(name).test_images
  told = {"image_shape": list(wanted.shape[1:]), "image_dtype": "float32"}
  np.testing.assert_array_equal(serving.check(stored, told), wanted)


def other_words(**changed):
  """Damage that changes what a network says of itself."""

  def damage(folder):
    path = folder / serving.ABOUT
    told = json.loads(path.read_text()) | changed
    told = {name: x for name, x in told.items() if x is not GONE}
    path.write_text(json.dumps(told))

  return damage


def text(words):
  return lambda folder: (folder / serving.ABOUT).write_text(words)


def cut(folder):
  path = folder / serving.PROGRAM
  path.write_bytes(path.read_bytes()[:100])


def flip(folder):
  path = folder / serving.PROGRAM
  found = bytearray(path.read_bytes())
  found[len(found) // 2] ^= 1
  path.write_bytes(found)


GONE = object()


@pytest.mark.parametrize(
  "damage",
  [
    cut,
    flip,
    lambda folder: (folder / serving.PROGRAM).unlink(),
    lambda folder: (folder / serving.ABOUT).unlink(),
    *map(text, ("{", "null", "[]", "{}", "\xff")),
    # As another export has it, whose program is not the one that is here.
    other_words(program_sha256="0" * 64),
    other_words(program_sha256=GONE),
    other_words(image_shape=[4, 4, 1]),
    other_words(image_shape=4),
    other_words(image_dtype="float32"),
    other_words(missing_heads=GONE),
    other_words(missing_heads=None),
    other_words(missing_classes=["a"]),
  ],
)
def test_a_damaged_network_is_refused(whole, damage, tmp_path):
  for name in serving.PROGRAM, serving.ABOUT:
    shutil.copy(whole[0] / name, tmp_path)
  serving.load(tmp_path)
  damage(tmp_path)
  with pytest.raises(ValueError, match="holds no sound network") as raised:
    serving.load(tmp_path)
  assert "\n" not in str(raised.value)


def test_a_network_that_answers_otherwise_is_not_written(whole, monkeypatch):
  folder, run, *_ = whole
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  def load(folder):
    answer, told = sound(folder)
    return lambda images: (answer(images)[0] + 1, answer(images)[1]), told

  sound = serving.load
  monkeypatch.setattr(serving, "load", load)
  with pytest.raises(AssertionError, match="not equal"):
    serving.save(folder, run, run_lib.start(run))
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def asked(program, **given):
  """What a program prints that is given these flags."""
  values = dict.fromkeys(("network", "run", "images", "out")) | {"batch": 64}
  values |= {name: given[name] and str(given[name]) for name in given}
  said = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
    patch.setattr(program.flags, "FLAGS", types.SimpleNamespace(**values))
    program.main()
  return said.getvalue()


def refused(program, **given):
  """The line in which it refuses these flags."""
  with pytest.raises(cli.UserError) as raised:
    asked(program, **given)
  assert "\n" not in str(raised.value)
  return str(raised.value)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A finished run of two heads of five, its network, and images."""
  folder = tmp_path_factory.mktemp("place")
  with pytest.MonkeyPatch.context() as patch:
    # The compiled programs of these tests are for nobody else.
    patch.setattr(workdir, "enable_compilation_cache", lambda: None)
    config = config_lib.Config()
    fields = {
      "data.name": program.save_arrays(folder / "data"),
      "network.widths": (8,),
      "memory.size": 20,
      "train.epochs": 1,
      "train.batch": 8,
      "checkpoint.every": 2,
    }
    for field, value in fields.items():
      config_lib.assign(config, field, value)
    train.choose(config, ["1", "3"])
    with contextlib.redirect_stdout(io.StringIO()):
      assert train.train(config, folder / "run")
    np.save(folder / "images.npy", tiny.dataset(10).test_images)
    yield folder


@pytest.fixture(scope="module")
def said(place):
  """What export said of the run, and predict of the network and of the run."""
  network, images = place / "network", place / "images.npy"
  return {
    "export": asked(export, run=place / "run", out=network),
    "network": asked(predict, network=network, images=images, out=place / "n"),
    "run": asked(predict, run=place / "run", images=images, out=place / "r"),
  }


@pytest.mark.parametrize("which", ["export", "network", "run"])
def test_it_is_said_which_classes_nobody_can_answer(place, said, which):
  numbers = json.loads((place / "run" / "metrics.json").read_text())
  order, sizes = numbers["class_order"], numbers["task_sizes"]
  assert sizes == [2] * 5
  gone = ", ".join(str(c) for t in (0, 2, 4) for c in order[2 * t :][:2])
  wanted = f"heads 0, 2, 4 are missing: no image is given to classes {gone}"
  assert said[which].splitlines()[-1] == wanted


def test_a_run_and_its_network_write_the_same_file(place, said):
  """Under the very name that was given, and nothing beside it."""
  assert (place / "n").read_bytes() == (place / "r").read_bytes()
  assert np.load(place / "n").dtype == np.int32
  left = {"data", "run", "images.npy", "network", "n", "r"}
  assert {path.name for path in place.iterdir()} == left
  names = {path.name for path in (place / "network").iterdir()}
  assert names == {serving.PROGRAM, serving.ABOUT}


def newest(run):
  saves = (run / "checkpoints").glob("[0-9]*")
  return max(saves, key=lambda path: int(path.name))


def without_end(run):
  shutil.rmtree(newest(run))


def damaged_end(run):
  path = max(newest(run).rglob("*"), key=lambda path: path.stat().st_size)
  path.write_bytes(b"x")


def other_data(**changed):
  """Data of the same name with these arrays, or a file of settings."""

  def change(run):
    settings = changed.get("meta")
    arrays = {} if settings else changed
    name = program.save_arrays(run / "data", **arrays)
    if settings:
      (run / "data" / "meta.json").write_text(json.dumps(settings))
    path = run / "config.json"
    fields = json.loads(path.read_text())
    fields["data"]["name"] = name
    path.write_text(json.dumps(fields))

  return change


UNFINISHED = "is not finished; go on with it by --resume"


@pytest.mark.parametrize("which", [export, predict], ids=["export", "predict"])
@pytest.mark.parametrize(
  "change, words",
  [
    (lambda run: (run / "metrics.json").unlink(), UNFINISHED),
    (without_end, UNFINISHED),
    (damaged_end, UNFINISHED),
    (
      other_data(train_images=255 - tiny.dataset(10).train_images),
      "run began with data",
    ),
    (other_data(meta={"mean": [0.5], "std": [0.1]}), "learnt with"),
    (lambda run: (run / "data.sha256").unlink(), "has lost data.sha256; "),
    (lambda run: (run / "config.json").unlink(), "holds no run; name another"),
    (lambda run: (run / "config.json").write_text("{"), "is damaged; restore"),
    (
      lambda run: (run / "stream.json").write_text("{"),
      "stream.json is damaged; restore",
    ),
  ],
)
def test_a_run_that_is_not_itself_is_refused(
  place, tmp_path, which, change, words
):
  run, out = tmp_path / "run", tmp_path / "out"
  shutil.copytree(place / "run", run)
  change(run)
  line = refused(which, run=run, images=place / "images.npy", out=out)
  assert words in line
  # Its own flag, and nothing left behind.
  assert "--run" in line and "--workdir" not in line
  assert not out.exists()


@pytest.mark.parametrize("which", [export, predict], ids=["export", "predict"])
def test_a_name_of_a_run_that_no_file_can_have(place, tmp_path, which):
  given = {"images": place / "images.npy", "out": tmp_path / "out"}
  line = refused(which, run=tmp_path / ("x" * 300), **given)
  assert not list(tmp_path.iterdir())
  assert line.endswith("holds no run; name another folder")


@pytest.mark.parametrize(
  "which, out, words",
  [
    (predict, "nowhere/o.npy", "No such file or directory"),
    (predict, "there", "it is no file"),
    (predict, "file/o.npy", "Not a directory"),
    (predict, "x" * 300, "File name too long"),
    (export, "file", "Not a directory"),
    (export, "file/below", "Not a directory"),
    (export, "x" * 300, "File name too long"),
  ],
)
def test_where_nothing_can_be_written_is_known_at_once(
  which, out, words, tmp_path
):
  (tmp_path / "there").mkdir()
  (tmp_path / "file").write_text("mine")
  # Neither a run nor images: what is looked at first is named.
  line = refused(which, run="no", images="no", out=tmp_path / out)
  assert line == (
    f"--out={tmp_path / out} cannot be written ({words}); name another place"
  )
  assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}
  assert (tmp_path / "file").read_text() == "mine"


def test_classes_are_written_all_or_not_at_all(
  place, said, tmp_path, monkeypatch
):
  def save(file, *_, **__):
    file.write(b"half")
    raise OSError("8 requested and 4 written")

  out = tmp_path / "o.npy"
  out.write_text("before")
  monkeypatch.setattr(predict.np, "save", save)
  given = {"network": place / "network", "images": place / "images.npy"}
  line = refused(predict, **given, out=out)
  assert f"--out={out} cannot be written (8 requested and 4 written)" in line
  assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


def header(told):
  """A file of numpy.save with this in place of its form."""
  return b"\x93NUMPY\x01\x00" + len(told).to_bytes(2, "little") + told


def packed(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


FORM = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s}\n"


@pytest.mark.parametrize(
  "content, words",
  [
    (b"", "is no plain array ("),
    (b"words", "is no plain array ("),
    (packed(images=np.zeros((9, 2, 2, 1)))[:-60], "is no plain array ("),
    (packed(images=np.zeros((9, 2, 2, 1))), "is no plain array ("),
    (header(b"{'descr': "), "is no plain array ("),
    (header(b"{1 2}\n"), "is no plain array ("),
    (header(FORM % b"(99999999999,9999999)"), "is no plain array ("),
    (header(FORM % b"(2,2,2,1)"), "is no plain array ("),
    (header(FORM % b"(0,2,2,1)"), "holds no images; name another file"),
    (header(FORM % b"()") + b"1", "holds no images; name another file"),
  ],
)
def test_what_is_no_array_of_images_is_refused(content, words, tmp_path):
  path = tmp_path / "images.npy"
  path.write_bytes(content)
  with pytest.raises(cli.UserError) as raised:
    predict.read(path)
  line = str(raised.value)
  assert line.startswith(f"--images={path} {words}") and "\n" not in line
  assert "; " in line


@pytest.mark.slow
def test_from_a_run_to_a_file_to_classes(tmp_path):
  folder, cache = tmp_path / "run", tmp_path / "cache"
  name = program.save_arrays(tmp_path / "data")
  flags = [*program.tiny_flags(name), f"--workdir={folder}"]
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
  assert bad.err.startswith("error: --images=no is no plain array (")
  assert bad.err.count("\n") == 1
