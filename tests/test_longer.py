"""New classes arrive: the same folder goes on with a longer stream."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from experiments import build, cli, longer
from mhil import config as config_lib
from mhil import data, partitions, sources, streams
from tests import chaos, program, several, test_assemble, test_faults, tiny

KNOWN, CLASSES = 10, 12
EXPORT = """
import runpy
runpy.run_module("experiments.export", run_name="__main__", alter_sys=True)
"""
# What the digits' seed makes of ten classes, and two behind them.
ORDER = (2, 8, 4, 9, 1, 6, 7, 3, 0, 5, 10, 11)
GROWN = f"--config.stream.order={ORDER}", "--config.stream.sizes=(2,2,2,2,2,2)"
# The old data's own, so that the larger set's pixels become the same inputs.
META = {"mean": [0.5], "std": [0.2]}


def save(folder, dataset):
  """A set as `arrays:FOLDER`, with its normalisation."""
  program.save_arrays(
    folder,
    **{
      f"{split}_{kind}": getattr(dataset, f"{split}_{kind}")
      for split in ("train", "test")
      for kind in ("images", "labels")
    },
  )
  (folder / "meta.json").write_text(json.dumps(META))
  return f"arrays:{folder}"


class Place:
  """Ten classes, the same and two more, and a run over the ten."""

  def __init__(self, folder):
    self.folder, self.cache = folder, folder / "cache"
    many = tiny.dataset(CLASSES)
    self.old = save(folder / "old", longer.beginning(many, KNOWN))
    self.new = save(folder / "new", many)

  def run(self, name, *more, new=False, script=None):
    """Runs the program to its end; its folder is `name`."""
    flags = program.tiny_flags(self.new if new else self.old)
    flags += [f"--workdir={self.folder / name}", *more]
    beside = self.folder / f"{name}-told"
    return program.forked(flags, beside, script, self.cache)

  def longer(self, name, *more, **how):
    """Goes on with the run in a folder, now of twelve classes."""
    return self.run(name, "--resume", *GROWN, *more, new=True, **how)

  def copy(self, new, name="short"):
    shutil.copytree(self.folder / name, self.folder / new)
    return self.folder / new


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  made = Place(tmp_path_factory.mktemp("longer"))
  assert made.run("short", "--config.mesh.head=5").status == 0
  return made


@pytest.fixture(scope="module")
def planned(place):
  """The run that knew of all classes from the start."""
  done = place.run("planned", *GROWN, "--config.mesh.head=3", new=True)
  assert done.status == 0, done
  return place


def same(place, name, wanted="planned"):
  ours, wanted = place.folder / name, place.folder / wanted
  assert program.numbers(ours) == program.numbers(wanted)
  for file in "accuracy_matrix.csv", "curves.png", "config.json":
    assert (ours / file).read_bytes() == (wanted / file).read_bytes(), file
  told = [json.loads((x / "stream.json").read_text()) for x in (ours, wanted)]
  for stream in told:
    stream.pop("before", None)  # What the shorter run was, until the next time.
  assert told[0] == told[1]


def test_it_ends_as_if_it_had_been_planned(planned):
  planned.copy("grown")
  done = planned.longer("grown", "--config.mesh.head=3")
  assert (done.status, done.err) == (0, ""), done
  assert done.out.startswith("stream: 6 tasks, of which 5 were there before\n")
  same(planned, "grown")
  before = program.numbers(planned.folder / "short")["accuracy_matrix"]
  after = program.numbers(planned.folder / "grown")["accuracy_matrix"]
  assert [row[:5] for row in after[:5]] == before and len(after) == 6


@pytest.mark.slow
def test_stopped_in_its_third_task(planned):
  script = test_faults.dies(
    "train.StopSignal.__call__", 33, "os.kill(os.getpid(), signal.SIGTERM)"
  )
  done = planned.run("half", "--config.mesh.head=5", script=script)
  assert done.status == os.EX_TEMPFAIL
  assert planned.longer("half", "--config.mesh.head=3").status == 0
  same(planned, "half")


# The folder's three files, a step of the new task, and before its numbers.
DEATHS = [("claims.replace", call) for call in range(4)]
DEATHS += [("StopSignal.__call__", 9)]


@pytest.mark.slow
@pytest.mark.parametrize("death", DEATHS)
def test_killed_while_it_grows(death, planned):
  target, call = death
  name = f"killed-{target}-{call}"
  planned.copy(name)
  script = test_faults.dies(f"train.{target}", call)
  done = planned.longer(name, "--config.mesh.head=3", script=script)
  assert done.status == -signal.SIGKILL, done
  done = planned.longer(name, "--config.mesh.head=3")
  assert done.status == 0, done
  same(planned, name)


@pytest.mark.slow
def test_heads_alone_go_on_too_and_new_ones_join(planned, tmp_path):
  """Of a network whose heads have no link, each part grows by itself."""
  assert planned.run("some", "--heads=0,3,4").status == 0
  assert planned.run("rest", "--heads=1,2").status == 0
  for name, heads in ("some", "0,3,4"), ("rest", "1,2"):
    done = planned.longer(name, f"--heads={heads}")
    assert done.status == 0, done
  alone = planned.run("alone", "--heads=5", *GROWN, new=True)
  assert alone.status == 0, alone
  parts = ",".join(str(planned.folder / x) for x in ("some", "rest", "alone"))
  flags = [f"--parts={parts}", f"--workdir={planned.folder / 'joined'}"]
  done = program.forked(flags, tmp_path, test_assemble.ASSEMBLE)
  assert (done.status, done.err) == (0, ""), done
  ours = program.numbers(planned.folder / "joined")
  wanted = program.numbers(planned.folder / "planned")
  for name in test_assemble.OF_MESH:
    del ours[name], wanted[name]
  assert ours == wanted


@pytest.mark.slow
def test_processes_grow_together_from_a_save_before_a_damaged_one(planned):
  folder = planned.copy("together")
  *_, sound, newest = program.saves(folder)
  chaos.truncate(
    folder / "checkpoints" / str(newest) / "state" / "manifest.ocdbt"
  )
  flags = program.tiny_flags(planned.new)
  flags += [f"--workdir={folder}", "--resume", *GROWN, "--config.mesh.head=6"]
  first, second = several.run(2, flags, planned.cache)
  assert (first.status, second.status) == (0, 0), (first, second)
  assert (first.err, second.err, second.out) == ("", "", "")
  assert f"checkpoint {newest} is damaged (" in first.out
  assert f"going back to checkpoint {sound}" in first.out
  ours = program.numbers(folder)
  wanted = program.numbers(planned.folder / "planned")
  for name in test_assemble.OF_MESH:
    del ours[name], wanted[name]
  assert ours == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
  ("policy", "alike"), [("reservoir", True), ("per_class", False)]
)
def test_other_memories(policy, alike, place):
  how = f"--config.memory.policy={policy}", "--config.mesh.head=3"
  assert place.run(policy, *how).status == 0
  assert place.longer(policy, *how).status == 0
  planned = f"{policy}-planned"
  assert place.run(planned, *how, *GROWN, new=True).status == 0
  hashes = [
    program.numbers(place.folder / x)["params_sha256"]
    for x in (policy, planned)
  ]
  # `per_class` deals its slots to all classes of the stream from the start.
  assert (hashes[0] == hashes[1]) == alike


def refused(place, name, *more, say, grown=GROWN):
  """One line, and the folder is as it was."""
  folder = place.folder / name
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  done = place.run(name, "--resume", *grown, *more, new=True)
  assert (done.status, done.out) == (2, ""), done
  assert done.err.count("\n") == 1 and say in done.err, done.err
  assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


REFUSED = {
  "the order of a seed": (
    ["--config.stream.order=()"],
    "gives the 5 tasks that are there other classes; use stream.order="
    f"{(*ORDER[:10], 11, 10)}",
  ),
  "other sizes": (
    ["--config.stream.sizes=(2,2,2,2,4)"],
    "stream.sizes=(2, 2, 2, 2, 4) does not begin with the (2, 2, 2, 2, 2)",
  ),
  "another rate": (
    ["--config.optimizer.learning_rate=0.5"],
    "holds a run with optimizer.learning_rate=0.01, not 0.5",
  ),
  "subnets": (
    ["--config.mesh.subnet=2", "--config.mesh.head=1"],
    "mesh.subnet=2 with subnets.method=ist has dealt the units",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, place):
  flags, say = REFUSED[case]
  given = {flag.partition("=")[0] for flag in flags}
  kept = [flag for flag in GROWN if flag.partition("=")[0] not in given]
  refused(place, "short", *flags, say=say, grown=kept)


def test_data_that_do_not_begin_with_the_old(place):
  many = tiny.dataset(CLASSES)
  images = many.train_images.copy()
  images[3] += 1
  mixed = np.roll(np.arange(len(many.train_labels)), 1)
  sets = {
    "changed": many._replace(train_images=images),
    "mixed": many._replace(
      train_images=many.train_images[mixed],
      train_labels=many.train_labels[mixed],
    ),
    # One more sample of an old class would change the length of its task.
    "more": many._replace(
      train_images=np.concatenate([many.train_images, images[:1]]),
      train_labels=np.append(many.train_labels, many.train_labels[:1]),
    ),
  }
  for name, dataset in sets.items():
    where = save(place.folder / name, dataset)
    refused(
      place,
      "short",
      f"--config.data.name={where}",
      say=f"data.name={where} does not begin with the data of 10 classes",
    )


def test_data_whose_pixels_become_other_inputs(place):
  where = save(place.folder / "bright", tiny.dataset(CLASSES))
  (place.folder / "bright" / "meta.json").unlink()
  flag = f"--config.data.name={where}"
  refused(place, "short", flag, say='"mean": [0.5], "std": [0.2], "pad": 0')
  refused(place, "short", flag, say=f"data.name={where} has mean=(0.52")
  # Of colour, two numbers stand for no one.
  folder = place.copy("of colour")
  told = json.loads((folder / "stream.json").read_text()) | {"mean": [0.5, 0.5]}
  (folder / "stream.json").write_text(json.dumps(told))
  refused(place, "of colour", say="learnt with (0.5, 0.5)")


BAD = {"mean": None, "data_sha256": 5, "std": "a", "tasks": [], "scale": {}}


def test_a_folder_that_is_damaged_or_a_stream_that_shrinks(place):
  folder = place.copy("harmed")
  text = (folder / "stream.json").read_text()
  (folder / "stream.json").write_text(text[:20])
  refused(place, "harmed", say="stream.json is damaged; restore it")
  for name, value in BAD.items():
    told = {k: v for k, v in json.loads(text).items() if k != name}
    (folder / "stream.json").write_text(
      json.dumps(told if value is None else told | {name: value})
    )
    refused(place, "harmed", say="stream.json is damaged; restore it")
  many = json.loads(text)
  many["tasks"] += [[10, 11], [12, 13]]
  (folder / "stream.json").write_text(json.dumps(many))
  refused(place, "harmed", say="has 12 classes, the run in --workdir=")
  # Without it nothing is known of the old stream, and the fields must agree.
  (folder / "stream.json").unlink()
  refused(place, "harmed", say="holds a run with data.name=")
  assert place.run("harmed", "--resume", "--config.mesh.head=5").status == 0
  assert (folder / "stream.json").read_text() == text


def test_streamed_sets_are_cut_without_decoding():
  class Records(list):
    def __getitems__(self, rows):
      assert len(rows) <= 1, "decoded"
      return [self[i] for i in rows]

  class Features:
    def deserialize_example_np(self, record):
      return {"x": np.full((2, 2, 1), record, np.uint8)}

  column = sources.Column(Records(range(6)), Features(), "x")
  labels = np.array([0, 1, 1, 0, 2, 2], np.int32)
  whole = data.Dataset(
    "s", column, labels, column, labels, 3, 255.0, (0.5,), (0.5,), 0, False
  )
  first = longer.beginning(whole, 2)
  assert first.classes == 2 and len(first.train_images) == 4
  assert isinstance(first.train_images, sources.Column)
  assert longer.beginning(whole, 1) is None


KEPT = [
  ("states", "penalty", True),
  ("states", "lagrangian", True),
  ("multipliers", "penalty", False),
  ("multipliers", "lagrangian", True),
]


@pytest.mark.parametrize(("name", "method", "kept"), KEPT)
def test_by_sample_there_is_no_row_for_a_new_one(name, method, kept):
  dataset = tiny.dataset(4)
  stream = streams.class_incremental(4, increment=2, order_seed=None)
  given = None, stream, dataset, None, None, None, None, partitions.NONE
  parts = build.Parts(*given)
  began = {"tasks": stream.tasks[:1], **longer.pixels(dataset)}
  began["data_sha256"] = longer.begins(dataset, 2)
  config = config_lib.Config()
  setattr(config.layer_parallel, name, "sample")
  config.layer_parallel.method = method

  def check():
    longer.check(
      None, began, config, parts, lambda n: longer.begins(dataset, n)
    )

  check()
  config.objective.name = "layer_parallel"
  if kept:
    with pytest.raises(cli.UserError, match=rf"{name}=sample keeps a row"):
      check()
  else:
    check()


@pytest.mark.slow
def test_until_something_is_learnt_the_shorter_run_is_there_too(
  planned, tmp_path
):
  folder = planned.copy("undecided")
  script = test_faults.dies("train.StopSignal.__call__", 2)
  done = planned.longer("undecided", "--config.mesh.head=3", script=script)
  assert done.status == -signal.SIGKILL, done
  flags = [f"--run={folder}", f"--out={tmp_path / 'net'}"]
  done = program.forked(flags, tmp_path, EXPORT)
  assert done.status == 2 and "is not finished" in done.err, done
  # Other new classes, the shorter run, and in the end the first longer one.
  many = tiny.dataset(CLASSES)
  images = many.train_images.copy()
  images[-3:] //= 2
  where = save(planned.folder / "mended", many._replace(train_images=images))
  flags = f"--config.data.name={where}", "--config.mesh.head=3"
  done = planned.longer("undecided", *flags, script=script)
  assert done.status == -signal.SIGKILL, done
  done = planned.run("undecided", "--resume", "--config.mesh.head=5")
  assert (done.status, done.err) == (0, ""), done
  same(planned, "undecided", "short")
  assert planned.longer("undecided", "--config.mesh.head=3").status == 0
  same(planned, "undecided")
  # Now it has learnt, and a stream only grows.
  done = planned.run("undecided", "--resume", "--config.mesh.head=5")
  assert done.status == 2 and "a stream only grows" in done.err, done
