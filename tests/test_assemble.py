"""Processes without a link, killed and resumed: one network in the end."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests import program, test_faults

ASSEMBLE = """
import runpy
runpy.run_module("experiments.assemble", run_name="__main__", alter_sys=True)
"""
HEADS = {"a": "0,3", "b": "4", "c": "1,2"}
# A namespace of its own, in which not even the loopback device is up.
CUT_OFF = "unshare", "--map-root-user", "--net"
# What depends on the number of devices of one process, and on the clock.
OF_MESH = "step_bytes_per_device", "mesh", "devices"


def cut_off():
  if shutil.which(CUT_OFF[0]) is None:
    return False
  tried = subprocess.run([*CUT_OFF, "true"], capture_output=True)
  return tried.returncode == 0


class Place:
  """The tiny data, and parts that are trained when they are asked for."""

  def __init__(self, folder):
    self.folder, self.cache = folder, folder / "cache"
    self.flags = program.tiny_flags(program.save_arrays(folder / "data"))

  def train(self, name, *more, script=None):
    """Runs one process to its end; its folder is `name`."""
    flags = [*self.flags, f"--workdir={self.folder / name}", *more]
    beside = self.folder / f"{name}-told"
    return program.forked(flags, beside, script, self.cache)

  def assemble(self, out, *names):
    """Runs `experiments.assemble` over folders."""
    parts = ",".join(str(self.folder / name) for name in names)
    flags = [f"--parts={parts}", f"--workdir={self.folder / out}"]
    return program.forked(flags, self.folder / f"{out}-told", ASSEMBLE)

  def copy(self, name, new):
    """Another folder with the same run."""
    shutil.copytree(self.folder / name, self.folder / new)
    return self.folder / new


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """The whole run, and three parts of it that ended well."""
  made = Place(tmp_path_factory.mktemp("assemble"))
  whole = made.train("whole", "--config.mesh.head=5")
  assert whole.status == 0, whole
  for name, heads in HEADS.items():
    done = made.train(name, f"--heads={heads}")
    assert (done.status, done.err) == (0, ""), done
    assert "alone: every other head's classes count as wrong" in done.out
  return made


def same(place, out, *but):
  ours = program.numbers(place.folder / out)
  wanted = program.numbers(place.folder / "whole")
  for name in (*OF_MESH, *but):
    del ours[name], wanted[name]
  assert ours == wanted
  for name in "accuracy_matrix.csv", "accuracy_matrix.png", "curves.png":
    made = place.folder / out / name
    assert made.read_bytes() == (place.folder / "whole" / name).read_bytes()


@pytest.mark.slow
def test_streamed_parts_in_any_order_of_heads_are_the_same(place):
  flags = "--config.data.streamed=true", "--config.heads=3,2,1,0,"
  done = place.train("streamed", *flags, "--config.mesh.head=1")
  assert done.status == 0, done
  rest = place.train("streamed-too", flags[0], "--heads=4")
  assert rest.status == 0, rest
  assert place.assemble("read", "streamed", "streamed-too").status == 0
  same(place, "read", "memory")


@pytest.mark.slow
def test_parts_put_together_are_the_run_of_one_program(place):
  done = place.assemble("out", *HEADS)
  assert (done.status, done.err) == (0, ""), done
  same(place, "out")
  # The order in which parts are named means nothing.
  assert place.assemble("turned", *reversed(HEADS)).status == 0
  same(place, "turned")


@pytest.mark.slow
def test_parts_of_other_versions_are_told(place):
  folder = place.copy("b", "older")
  numbers = json.loads((folder / "metrics.json").read_text())
  numbers["versions"]["jax"] = "0.1"
  (folder / "metrics.json").write_text(json.dumps(numbers))
  done = place.assemble("of versions", "a", "older", "c")
  assert (done.status, done.err) == (0, ""), done
  (note,) = [x for x in done.out.splitlines() if x.startswith("note: ")]
  assert "older was trained with jax 0.1, " in note
  same(place, "of versions")


@pytest.mark.slow
def test_with_images_spread_over_devices_too(place):
  flags = ["--config.mesh.data=2", "--config.memory.size=20"]
  whole = place.train("whole of two", *flags, "--config.mesh.head=2")
  assert whole.status == 0, whole
  names = "first of two", "rest of two"
  for name, heads in zip(names, ("0,3", "1,2,4")):
    done = place.train(name, *flags, f"--heads={heads}", "--config.mesh.head=1")
    assert done.status == 0, done
  assert place.assemble("of two", *names).status == 0
  ours, wanted = (
    program.numbers(place.folder / x) for x in ("of two", "whole of two")
  )
  assert ours["params_sha256"] == wanted["params_sha256"]
  assert ours["accuracy_matrix"] == wanted["accuracy_matrix"]


@pytest.mark.slow
def test_what_was_put_together_can_be_gone_on_with(place):
  assert place.assemble("again", *HEADS).status == 0
  (place.folder / "again" / "metrics.json").unlink()
  done = place.train("again", "--resume", "--config.mesh.head=3")
  assert (done.status, done.err) == (0, ""), done
  assert "damaged" not in done.out
  same(place, "again", "exchange", "compiles")


@pytest.mark.slow
def test_one_that_is_killed_and_resumed_changes_nothing(place):
  script = test_faults.dies("train.StopSignal.__call__", 40)
  heads = f"--heads={HEADS['c']}"
  killed = place.train("killed", heads, script=script)
  assert killed.status == -signal.SIGKILL
  refused = place.assemble("early", "a", "b", "killed")
  assert refused.status == 2
  assert re.search(r"killed is not finished; go on with it by", refused.err)
  assert place.train("killed", heads, "--resume").status == 0
  assert place.assemble("mended", "a", "b", "killed").status == 0
  same(place, "mended")


@pytest.mark.slow
def test_with_all_traffic_cut_the_result_is_the_same(place):
  if not cut_off():
    pytest.skip("no network namespace may be made here")
  folder = place.folder / "cut"
  flags = [*place.flags, f"--workdir={folder}", f"--heads={HEADS['b']}"]
  done = subprocess.run(
    [*CUT_OFF, sys.executable, "-m", "experiments.train", *flags],
    cwd=program.ROOT,
    env=program.environment(place.cache),
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert place.assemble("uncut", "a", "cut", "c").status == 0
  same(place, "uncut")


@pytest.mark.slow
class TestMistakes:
  """Each ends in one line that names it, and leaves no network behind."""

  def check(self, place, words, *names):
    done = place.assemble("wrong", *names)
    assert done.status == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert re.search(words, done.err), done.err
    assert not (place.folder / "wrong").exists()

  def test_a_head_that_is_missing(self, place):
    self.check(
      place, "heads=1,2 are missing; train them by --heads=1,2", "a", "b"
    )

  def test_a_head_that_is_there_twice(self, place):
    place.copy("b", "twice")
    self.check(place, "head 4 is in .*b and in .*twice; name", *HEADS, "twice")

  def test_a_run_of_all_heads(self, place):
    self.check(place, "whole trained all heads; name runs that", "a", "whole")

  def test_no_run(self, place):
    self.check(place, "nowhere holds no run; name another", "a", "nowhere")

  def test_another_configuration(self, place):
    self.change(place, "other", lambda held: held.update(seed=1))
    self.check(place, "other has seed=1, .*a 0; train one", "a", "other", "c")

  def test_other_data(self, place):
    folder = place.copy("b", "data-changed")
    (folder / "data.sha256").write_text("0" * 64 + "\n")
    words = "data-changed learnt from data 000000000000, "
    self.check(place, words, "a", "data-changed", "c")

  @pytest.mark.slow
  def test_scores_that_are_lost(self, place):
    folder = place.copy("b", "no-scores")
    (folder / "scores" / "3.npy").unlink()
    words = r"3\.npy is missing or damaged; train .*no-scores again"
    self.check(place, words, "a", "no-scores", "c")

  @pytest.mark.slow
  def test_scores_that_are_a_pickle(self, place):
    folder = place.copy("b", "pickled")
    with (folder / "scores" / "0.npy").open("wb") as file:
      np.save(file, np.array([print]), allow_pickle=True)
    self.check(place, r"0\.npy is missing or damaged", "a", "pickled", "c")

  def test_scores_whose_header_is_damaged(self, place):
    path = place.copy("b", "bad-header") / "scores" / "0.npy"
    sound = path.read_bytes()
    # Length of the header, and its first brace: tokens that never end.
    for at, byte in (8, b"\0"), (10, b"["):
      path.write_bytes(sound[:at] + byte + sound[at + 1 :])
      self.check(place, r"0\.npy is missing or damaged", "a", "bad-header", "c")

  def test_scores_of_another_run(self, place):
    folder = place.copy("b", "other-scores")
    np.save(folder / "scores" / "4.npy", np.zeros((3, 1, 2), np.float32))
    self.check(place, r"4\.npy is of another run", "a", "other-scores", "c")

  def test_a_checkpoint_that_is_lost(self, place):
    folder = place.copy("b", "no-save")
    last = max(program.saves(folder))
    shutil.rmtree(folder / "checkpoints" / str(last))
    words = "no-save has lost its last checkpoint"
    self.check(place, words, "a", "no-save", "c")

  def test_a_checkpoint_of_another_run(self, place):
    folder = place.copy("b", "other-saves") / "checkpoints"
    shutil.rmtree(folder)
    folder.mkdir()
    # Its own mark, and the saves of another.
    shutil.copy(place.folder / "b" / "checkpoints" / "ID", folder)
    for save in (place.folder / "c" / "checkpoints").glob("[0-9]*"):
      shutil.copytree(save, folder / save.name)
    words = "other-saves/checkpoints holds saves of another run and none of its"
    self.check(place, words, "a", "other-saves", "c")

  def change(self, place, new, edit):
    path = place.copy("b", new) / "config.json"
    held = json.loads(path.read_text())
    edit(held)
    path.write_text(json.dumps(held))

  @pytest.mark.parametrize("heads", ["", "x", "0,,1", "-1"])
  def test_heads_that_are_no_numbers(self, place, heads):
    done = place.train("bad", f"--heads={heads}")
    assert done.status == 2 and "is no list of numbers; use for" in done.err
    assert not (place.folder / "bad").exists()

  def test_a_head_beyond_the_stream(self, place):
    done = place.train("beyond", "--heads=5")
    assert done.status == 2
    assert "heads=5 does not name heads of this stream, each once" in done.err
    assert not (place.folder / "beyond").exists()

  def test_a_part_is_not_written_over(self, place):
    done = place.assemble("b", *HEADS)
    assert done.status == 2 and "b is one of --parts; name another" in done.err
