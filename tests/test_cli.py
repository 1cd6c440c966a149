"""What a user gets wrong ends in one line, status 2, and no junk."""

import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from mhil import config as config_lib
from mhil import prepare, validation
from tests import program, tiny

FIELDS = list(config_lib.flatten(config_lib.to_dict(config_lib.Config())))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return program.save_arrays(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fails(tmp_path, data):
  """Runs with flags; one line on stderr that says all of `words`."""

  def check(flags, *words, workdir=None, status=2):
    folder = workdir or tmp_path / "never"
    before = content(folder)
    tiny_flags = program.tiny_flags(data)
    done = program.forked(
      [*tiny_flags, f"--workdir={folder}", *flags], tmp_path / "fork"
    )
    assert done.status == status, done
    assert done.out == ""
    assert done.err.startswith("error: ") and done.err.endswith("\n")
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
      assert word in done.err
    assert content(folder) == before
    return done.err

  return check


def content(folder):
  """Every file's path, size and time; None where there is no folder."""
  if not folder.is_dir():
    return None
  files = [p for p in folder.rglob("*") if p.is_file()]
  return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


# Field, value as typed, and what the line must say besides.
VALUES = [
  ("seed", "-1", "use 0"),
  ("seed", "4294967296", "4294967295"),
  ("seed", "99999999999999999999999", "4294967295"),
  ("seed", "first", "a whole number"),
  ("mesh.data", "0", "use 1"),
  ("mesh.data", "3", "does not divide", "use 9"),
  ("mesh.head", "6", "5 tasks", "mesh.head=5"),
  ("mesh.head", "-1", "use 1"),
  ("mesh.stage", "400", "is cut along it with", "mesh.stage=1"),
  ("mesh.data", "400", "2000 devices", "256", "smaller axis"),
  ("data.name", "digit", "did you mean digits"),
  ("data.name", "", "use digits, arrays:FOLDER or tfds:NAME"),
  ("data.name", "arrays:no/such/folder", "no such folder", "make it"),
  ("stream.base", "11", "10 classes", "use"),
  ("stream.increment", "3", "10 classes", "use", "increment=2"),
  ("stream.increment", "0", "use 1"),
  ("stream.increment", "2.5", "a whole number"),
  ("stream.sizes", "3,3", "add up to 6", "10", "+4"),
  ("stream.sizes", "15,-5", "use 1"),
  ("stream.sizes", "5,x", "whole numbers"),
  ("stream.order", "1,1,2", "repeated 1", "every class once"),
  ("stream.order_seed", "4294967296", "4294967295"),
  ("network.name", "mpl", "mlp, convnet"),
  ("loss.name", "dec", "dce"),
  ("memory.size", "-2", "use -1"),
  ("memory.size", "many", "a whole number"),
  ("optimizer.name", "adma", "adam"),
  ("optimizer.learning_rate", "nan", "use 0"),
  ("optimizer.learning_rate", "inf", "use 0"),
  ("optimizer.learning_rate", "-0.1", "use 0"),
  ("optimizer.learning_rate", "fast", "a number"),
  ("optimizer.momentum", "1.5", "0 to 1"),
  ("optimizer.weight_decay", "-1", "use 0"),
  ("train.epochs", "0", "use 1"),
  ("train.epochs", "2.5", "a whole number", "--config.train.epochs="),
  ("train.epochs", "", "a whole number"),
  ("train.epochs", "true", "a whole number"),
  ("train.batch", "-8", "use 1"),
  ("train.train_heads", "old", "all, readout, new"),
  ("train.from_scratch", "3", "true or false"),
  ("train.log_every", "0", "use 1"),
  ("checkpoint.every", "-1", "use 0"),
  ("checkpoint.keep", "0", "use 1"),
]


@pytest.mark.parametrize(
  "field, value, words", [(f, v, w) for f, v, *w in VALUES]
)
def test_a_value_that_cannot_be_meant(field, value, words, fails):
  heads = ["--config.mesh.head=5"] if field != "mesh.head" else []
  err = fails([*heads, f"--config.{field}={value}"], *words)
  assert field.removesuffix(".name") in err
  # Long numbers and lists may be printed in another form than typed.
  assert value.strip("(),").split(",")[0] in err


NO_FIELDS = [
  ("train.epoch=3", "--config.train.epochs=3"),
  ("epochs=3", "did you mean"),
  ("train=3", "did you mean"),
  ("train.", "did you mean"),
  ("mesh.heads=3", "--config.mesh.head=3"),
  ("no.such.thing=1", "did you mean"),
]


@pytest.mark.parametrize("typed, word", NO_FIELDS)
def test_an_unknown_field_names_the_nearest(typed, word, fails):
  fails([f"--config.{typed}"], typed, word, "not a field")


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--wrokdir=x"], ["wrokdir", "Did you mean", "workdir"]),
    (["--nonsense"], ["nonsense", "--help"]),
    (["-x"], ["'x'", "--help"]),
    (["stray"], ["'stray'", "--NAME=VALUE"]),
    (["--config.train.epochs", "2", "stray"], ["'stray'"]),
    (["--config.train.epochs", "--quiet"], ["train.epochs", "'--quiet'"]),
    (["--resume=perhaps"], ["--resume=perhaps", "--help"]),
    (["--noconfig.train.epoch"], ["train.epoch", "--config.train.epochs"]),
    (["--config="], ["--config=", "not a file", "digits"]),
    (["--config"], ["--config=", "not a file", "digits"]),
    (["--config=configs"], ["--config=configs", "not a file"]),
    (["--config=configs/digit.py"], ["configs/digit.py", "not a file"]),
    (["--config=configs/digits.py"], ["before", "--config=FILE first"]),
    (["--config.network.widths=4,"], ["network.widths", "8, and 4,", "once"]),
    (["--resume"], ["--resume", "never", "holds no run", "without --resume"]),
    (["--resume", "--workdir="], ["--resume", "add --workdir="]),
  ],
)
def test_a_flag_that_cannot_be_meant(flags, words, fails):
  fails(flags, *words)


BROKEN = {
  "syntax": ("def get_config(:\n", "line 1 (SyntaxError"),
  "name": ("\n\nprint(nothing)\n", "line 3 (NameError"),
  "inside": ("def get_config():\n  return 1 / 0\n", "line 2 (ZeroDivision"),
  "import": ("import no_such_module\n", "line 1 (ModuleNotFoundError"),
  "field": (
    "from mhil import config\n"
    "def get_config():\n  return config.Train(epoch=3)\n",
    "line 3 (TypeError",
  ),
  "bytes": ("\0", "Error"),
  "without": ("x = 1\n", "no get_config"),
  "arguments": ("def get_config(x):\n  return x\n", "TypeError"),
  "none": ("def get_config():\n  pass\n", "returns NoneType"),
  "dict": ("def get_config():\n  return {'seed': 1}\n", "returns dict"),
  "group": (
    "from mhil import config\n"
    "def get_config():\n  return config.Config(mesh=3)\n",
    "mesh.data",
  ),
  "type": (
    "from mhil import config\n"
    "def get_config():\n"
    "  return config.Config(train=config.Train(epochs='3'))\n",
    "train.epochs='3' is not a whole number",
  ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_config_file_is_named(kind, tmp_path, fails):
  text, word = BROKEN[kind]
  path = tmp_path / "own.py"
  path.write_text(text)
  # The file comes first, as it must: the other flags override it.
  done = program.forked(
    [f"--config={path}", f"--workdir={tmp_path / 'never'}"], tmp_path / "fork"
  )
  assert done.status == 2 and done.err.count("\n") == 1, done.err
  assert word in done.err and not (tmp_path / "never").exists()
  if kind not in ("group", "type"):
    assert f"--config={path}" in done.err


def ruin(name):
  images, labels = (np.array(a) for a in tiny.dataset(program.CLASSES)[1:3])
  floats = images.astype(np.float32)
  floats[7, 0, 0, 0] = np.nan
  negative, hole = labels.copy(), labels.copy()
  negative[3] = -1
  hole[hole == 4] = 11
  return {
    "shorter": {"train_labels": labels[:-1]},
    "negative": {"train_labels": negative},
    "hole": {"train_labels": hole},
    "kind": {"train_labels": labels.astype(np.float32)},
    "nan": {
      "train_images": floats,
      "test_images": floats[: len(tiny.dataset(program.CLASSES).test_labels)],
    },
    "shape": {"test_images": tiny.dataset(program.CLASSES).test_images[:, :1]},
    "unknown": {"test_labels": np.full(70, 10)},
  }[name]


@pytest.mark.parametrize(
  "name, words",
  [
    ("shorter", ["train_images", "200", "199", "one label an image"]),
    ("negative", ["train_labels", "-1", "from 0"]),
    ("hole", ["train_labels", "4", "without holes"]),
    ("kind", ["train_labels", "float32", "integer"]),
    ("nan", ["train_images", "NaN", "image 7", "repair or drop"]),
    ("shape", ["train_images", "test_images", "alike"]),
    ("unknown", ["test_labels", "10"]),
  ],
)
def test_data_that_cannot_be_meant(name, words, tmp_path, fails):
  folder = tmp_path / "arrays"
  name = program.save_arrays(folder, **ruin(name))
  fails([f"--config.data.name={name}"], str(folder), *words)


def test_a_missing_or_broken_array_is_named(tmp_path, fails):
  folder = tmp_path / "arrays"
  flag = f"--config.data.name={program.save_arrays(folder)}"
  (folder / "test_labels.npy").write_bytes(b"no numbers")
  fails([flag], "test_labels.npy", "numpy.save")
  (folder / "test_labels.npy").unlink()
  fails([flag], "test_labels.npy", "save it there")
  (folder / "train_images.npy").write_bytes(b"")
  fails([flag], "train_images.npy", "numpy.save")


def claimed(folder, data, **changed):
  """A folder as a run has left it that was stopped before its first save."""
  config = config_lib.Config(
    mesh=config_lib.Mesh(head=5), data=config_lib.Data(name=data)
  )
  values = {
    "network.widths": (8,),
    "memory.size": 20,
    "train.epochs": 3,
    "train.batch": 8,
    "train.log_every": 3,
    "optimizer.learning_rate": 0.01,
    "checkpoint.every": 5,
  }
  for field, value in (values | changed).items():
    config_lib.assign(config, field, value)
  folder.mkdir()
  (folder / "config.json").write_text(config_lib.to_json(config))
  return folder


def test_a_work_directory_with_a_run_wants_resume(tmp_path, data, fails):
  folder = claimed(tmp_path / "run", data)
  fails([], str(folder), "holds a run", "--resume", workdir=folder)


@pytest.mark.parametrize(
  "field, value, typed",
  [
    ("train.epochs", 2, "--config.train.epochs=2"),
    ("stream.order", (1, 0), "--config.stream.order=1,0,"),
    ("train.from_scratch", True, "--config.train.from_scratch=true"),
    ("stream.sizes", (4, 6), "--config.stream.sizes=4,6,"),
  ],
)
def test_another_configurations_run_names_the_field(
  field, value, typed, tmp_path, data, fails
):
  folder = claimed(tmp_path / "run", data, **{field: value})
  words = field, str(folder), typed, "another folder"
  fails(["--resume"], *words, workdir=folder)


def test_a_damaged_config_is_named(tmp_path, data, fails):
  folder = claimed(tmp_path / "run", data)
  for text in '{"seed": ', "[]", "3":
    (folder / "config.json").write_text(text)
    fails(["--resume"], "config.json is damaged", workdir=folder)


def test_checkpoints_of_nobody_are_not_taken_over(tmp_path, fails):
  folder = tmp_path / "run"
  (folder / "checkpoints" / "5").mkdir(parents=True)
  (folder / "checkpoints" / "5" / "x").touch()
  fails([], "no config.json", "another folder", workdir=folder)


@pytest.mark.parametrize(
  "flags, words",
  [([], "cannot be written ("), (["--resume"], "holds no run")],
)
def test_a_place_that_cannot_be_written(flags, words, tmp_path, fails):
  # Permission bits do not bind root; a file in the way binds everybody.
  (tmp_path / "file").touch()
  for place in tmp_path / "file" / "run", pathlib.Path("/proc/no/run"):
    fails(flags, f"--workdir={place}", words, workdir=place)


def test_a_read_only_place(tmp_path, fails):
  folder = tmp_path / "frozen"
  folder.mkdir()
  folder.chmod(0o500)
  try:
    (folder / "probe").touch()
  except OSError:
    fails([], str(folder), "cannot be written (", workdir=folder / "run")
  else:
    pytest.skip("permission bits do not bind this user")


def test_the_real_program_says_it_the_same_way(tmp_path):
  done = program.run(["--config.mesh.heads=4"], tmp_path)
  assert done.status == 2 and done.out == ""
  assert done.err == (
    "error: mesh.heads=4 is not a field of the configuration; did you mean "
    "--config.mesh.head=4?\n"
  )


def test_help_explains_itself(tmp_path):
  done = program.forked(["--help"], tmp_path)
  assert done.status == 0 and done.err == ""
  assert done.out.startswith("Trains a multi-head network")
  for name in "--workdir", "--resume", "--quiet", "--config ":
    assert name in done.out
  for field in FIELDS:
    assert f"--config.{field}=" in done.out
  assert max(map(len, done.out.splitlines())) <= 80


COMPARE = """
import runpy
runpy.run_module("experiments.compare", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
  "typed", ["--workdir=x", "--resume", "--quiet", "--config.seed=1"]
)
def test_compare_takes_no_flag_of_training(typed, tmp_path):
  (tmp_path / "file").touch()
  # A file, so that nothing would be run if the flag were taken.
  done = program.forked(
    [typed, f"--runs={tmp_path / 'file'}"], tmp_path / "fork", COMPARE
  )
  assert done.status == 2 and done.err.count("\n") == 1, done
  name = typed.strip("-").partition("=")[0]
  assert done.err.startswith(f"error: Unknown command line flag '{name}'")


def test_help_of_compare_lists_its_own_flags(tmp_path):
  done = program.forked(["--help"], tmp_path, COMPARE)
  assert done.status == 0 and done.err == ""
  flags = re.findall(r"^ +--([\w.]+)", done.out, re.MULTILINE)
  assert flags == ["suite", "seeds", "data_folder", "out", "runs", "note"]


def test_help_shows_the_files_values(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(
    "from mhil import config\ndef get_config():\n"
    "  return config.Config(seed=17)\n"
  )
  done = program.forked([f"--config={path}", "--help"], tmp_path)
  assert "--config.seed=17" in done.out


@pytest.mark.parametrize(
  "field, value",
  [
    ("train.from_scratch", True),
    ("seed", 3),
    ("optimizer.learning_rate", 2.5e-5),
    ("data.folder", "a folder's"),
    ("data.folder", ""),
    ("network.widths", (64,)),
    ("network.widths", (8, 4)),
    ("stream.sizes", ()),
  ],
)
def test_an_override_is_read_back_as_it_was(field, value, tmp_path):
  (word,) = shlex.split(cli.override(field, value))
  done = program.forked([word], tmp_path, READ.format(field=field))
  assert done.out == f"{value!r}\n", done


READ = """
from absl import flags
from experiments import cli
from mhil import config
def main():
  flat = config.flatten(config.to_dict(flags.FLAGS.config))
  print(repr(flat["{field}"]))
cli.run(main, config=True)
"""


@pytest.mark.parametrize("typed", ["8", "8,", "(8,)", "[8]"])
def test_a_tuple_of_one_may_be_typed_plainly(typed, tmp_path):
  script = READ.format(field="network.widths")
  done = program.forked([f"--config.network.widths={typed}"], tmp_path, script)
  assert done.out == "(8,)\n", done


def test_only_our_own_checks_are_the_users_mistakes():
  with pytest.raises(cli.UserError, match="does not divide"), cli.checking():
    prepare.check(
      jax.make_mesh((3, 1, 1, 1), ("data", "head", "stage", "subnet")),
      tiny.stream(),
      tiny.dataset(),
      tiny.RECIPE,
    )
  for bug in (
    lambda: np.zeros(2) + np.zeros(3),
    lambda: int("x"),
    lambda: validation.validate(None),
    lambda: tiny.stream().head_of.reshape(100),
  ):
    with pytest.raises((ValueError, TypeError)) as raised, cli.checking():
      bug()
    assert not isinstance(raised.value, cli.UserError)


def test_no_room_on_the_devices_is_told_in_a_line():
  run = jax.jit(lambda: jnp.zeros((2**24, 2**24)))
  with pytest.raises(cli.UserError) as raised, cli.checking():
    run().block_until_ready()
  message = str(raised.value)
  assert "Out of memory allocating" in message and "\n" not in message
  assert message.endswith("or more of mesh.head=")
  with pytest.raises(jax.errors.JaxRuntimeError), cli.checking():
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


BUG = """
from experiments import cli, train
from mhil import {module}
def bug(*_, **__):
  {what}
{module}.{name} = bug
import sys
sys.argv[0] = "train"
train.define_flags()
cli.run(train.main, config=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  "what, name",
  [
    ("return [1][2] or int('x')", "IndexError"),
    ("raise FloatingPointError('overflow')", "FloatingPointError"),
  ],
)
def test_a_bug_keeps_its_traceback(what, name, tmp_path, data):
  script = BUG.format(module="run", name="read", what=what)
  folder = tmp_path / "run"
  flags = [*program.tiny_flags(data), f"--workdir={folder}"]
  done = program.forked(flags, tmp_path, script)
  assert done.status == 1 and "Traceback" in done.err
  assert name in done.err


def test_the_default_folder_is_new_each_time(tmp_path, monkeypatch):
  from experiments import train

  monkeypatch.setattr("sys.argv", ["train"])
  names = [train._default_workdir() for _ in range(3)]
  assert len(set(names)) == 3
  for name in names:
    assert re.fullmatch(r"runs/digits-\d{8}-\d{6}-\d{6}", name)


def test_config_json_is_whole_or_absent(tmp_path, data, monkeypatch):
  from experiments import build, claims, longer

  seen = []
  real = pathlib.Path.rename

  def rename(self, target):
    seen.append((target.name, self.read_text(), target.exists()))
    return real(self, target)

  monkeypatch.setattr(pathlib.Path, "rename", rename)
  parts = build.parts(config_lib.Config())
  given = config_lib.Config(), False, "abc", parts
  with claims.claimed(tmp_path / "run", *given):
    pass
  # Last, for with a configuration it is a run that can be resumed.
  text = config_lib.to_json(config_lib.Config())
  assert seen == [
    ("stream.json", longer.told(parts, "abc"), False),
    ("data.sha256", "abc\n", False),
    ("config.json", text, False),
  ]
  left = sorted(p.name for p in (tmp_path / "run").iterdir())
  assert left == ["config.json", "data.sha256", "stream.json"]
