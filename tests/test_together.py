"""Several processes that share a mesh equal one; one of them may be lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mhil import processes
from tests import program, several

# Ten heads of one class each, so that eight devices have one at least.
SMALL = ["--config.stream.increment=1"]
# Of the devices, and of the clock.
OF_MESH = ("mesh", "devices", "step_bytes_per_device", "collectives")
HEADS = {2: 4, 4: 8}
pytestmark = pytest.mark.slow


class Place:
  """The tiny data, and a run of one process."""

  def __init__(self, folder):
    self.folder, self.cache = folder, folder / "cache"
    data = program.save_arrays(folder / "data")
    self.flags = [*program.tiny_flags(data), *SMALL]
    self.whole = folder / "whole"
    self.done = program.run(self.to(self.whole, 8), self.cache)

  def to(self, folder, head, *more):
    """Flags of a run that writes there."""
    mesh = f"--config.mesh.head={head}"
    return [*self.flags, mesh, f"--workdir={folder}", *more]

  def killed(self, victim, folder):
    """What four processes said of which one was killed, and how soon."""
    # Long enough that they are still at work.
    flags = self.to(folder, 8, "--config.train.log_every=1")
    started = several.start(4, flags, self.cache)
    try:
      assert several.wait_for(lambda: len(program.saves(folder)) >= 2, started)
      started[victim].kill()
      killed = time.monotonic()
      done = several.finish(started)
      return done, time.monotonic() - killed
    finally:
      for process in started:
        process.kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  made = Place(tmp_path_factory.mktemp("together"))
  assert made.done.status == 0, made.done
  return made


def same(place, folder):
  """Every number, row and pixel is that of one process."""
  ours, wanted = program.numbers(folder), program.numbers(place.whole)
  for name in OF_MESH:
    ours.pop(name), wanted.pop(name)
  assert len(wanted["history"]) > 20
  assert ours == wanted
  for name in "accuracy_matrix.csv", "accuracy_matrix.png":
    assert (folder / name).read_bytes() == (place.whole / name).read_bytes()


def quiet(done):
  """The first says what one process says, the others nothing."""
  assert [d.status for d in done] == [0] * len(done), done
  assert [d.err for d in done] == [""] * len(done), done
  assert "average incremental accuracy" in done[0].out
  assert [d.out for d in done[1:]] == [""] * (len(done) - 1), done


@pytest.mark.parametrize("count", [4])
def test_processes_equal_one(place, tmp_path, count):
  folder = tmp_path / "run"
  quiet(several.run(count, place.to(folder, HEADS[count]), place.cache))
  same(place, folder)
  assert len(program.numbers(folder)["devices"]) == 2 * count


@pytest.mark.parametrize("count", [2, 4])
def test_and_over_a_network(place, tmp_path, count):
  if not several.roomy():
    pytest.skip("no namespaces with addresses of their own here")
  folder, told = tmp_path / "run", tmp_path / "told"
  flags = place.to(folder, HEADS[count])
  process = several.apart(count, flags, place.cache, told)
  quiet(several.gathered(process, count, told))
  same(place, folder)


@pytest.mark.parametrize(
  "more",
  [
    ["--config.mesh.head=4", "--config.loss.name=distributed_ce"],
    ["--config.mesh.data=4", "--config.data.streamed=true"],
  ],
  ids=["distributed_ce", "streamed"],
)
def test_where_sums_cross_processes(place, tmp_path, more):
  """Sums are taken in another order: losses agree to a ten thousandth."""
  runs = tmp_path / "one", tmp_path / "two"
  flags = [[*place.flags, *more, f"--workdir={x}"] for x in runs]
  assert program.run(flags[0], place.cache).status == 0
  quiet(several.run(2, flags[1], place.cache))
  ours, wanted = (program.numbers(folder) for folder in runs)
  for a, b in zip(ours["history"], wanted["history"], strict=True):
    assert [x is None for x in a] == [x is None for x in b]
    pairs = [(x, y) for x, y in zip(a, b) if x is not None]
    np.testing.assert_allclose(*zip(*pairs), rtol=1e-4, atol=1e-5)
  matrices = (np.array(x["accuracy_after_task"], float) for x in (ours, wanted))
  np.testing.assert_allclose(*matrices, atol=0.02)
  assert ours["collectives"] == wanted["collectives"] != []


@pytest.mark.parametrize("more", [["--config.mesh.subnet=2"], ["--stage"]])
def test_branches_in_parts(place, tmp_path, more):
  """Parts of a branch lie in one process, and heads in two."""
  if more == ["--stage"]:
    more = ["--config=configs/local_stream.py", "--config.mesh.stage=2"]
    more += ["--config.train.epochs=1", "--config.data.limit=30", "--quiet"]
  else:
    more = [*place.flags, *more, "--config.subnets.local_steps=5"]
  more = [*more, "--config.mesh.head=2"]
  runs = tmp_path / "one", tmp_path / "two"
  assert program.run([*more, f"--workdir={runs[0]}"], place.cache).status == 0
  quiet(several.run(2, [*more, f"--workdir={runs[1]}"], place.cache))
  ours, wanted = (program.numbers(folder) for folder in runs)
  assert ours["params_sha256"] == wanted["params_sha256"]
  assert ours["accuracy_matrix"] == wanted["accuracy_matrix"]


def one_line(done, *words):
  assert done.status == processes.LOST, done
  (line,) = done.err.splitlines()
  for word in ("error: ", *words, "--resume"):
    assert word in line


def test_one_of_four_is_killed_and_any_number_goes_on(place, tmp_path):
  folder = tmp_path / "run"
  done, seconds = place.killed(2, folder)
  assert done.pop(2).status == -signal.SIGKILL
  for other in done:
    one_line(other, "process 2 with heads 4, 5 is gone")
  # A beat is missed for so long, and then told.
  assert seconds < processes.PATIENCE + 15
  assert len(program.saves(folder)) >= 2
  for count, head in (1, 2), (2, 4), (4, 8):
    again = tmp_path / f"by {count}"
    shutil.copytree(folder, again)
    flags = place.to(again, head, "--config.train.log_every=1", "--resume")
    if count == 1:
      assert program.run(flags, place.cache).status == 0
    else:
      quiet(several.run(count, flags, place.cache))
    ours = program.numbers(again)["params_sha256"]
    assert ours == program.numbers(place.whole)["params_sha256"]


def test_the_first_of_four_is_killed(place, tmp_path):
  done, seconds = place.killed(0, tmp_path / "run")
  assert done.pop(0).status == -signal.SIGKILL
  for other in done:
    one_line(other, "process 0 with heads 0, 1, 8, 9 is gone")
  assert seconds < 10


def test_a_line_that_is_cut_is_noticed_at_both_ends(place, tmp_path):
  if not several.roomy():
    pytest.skip("no namespaces with addresses of their own here")
  folder, told = tmp_path / "run", tmp_path / "told"
  flags = place.to(folder, 4, "--config.train.epochs=200")
  process = several.apart(2, flags, place.cache, told)
  several.wait_for(lambda: len(program.saves(folder)) >= 2, [process])
  (told / "cut").touch()
  cut = time.monotonic()
  first, second = several.gathered(process, 2, told)
  assert time.monotonic() - cut < processes.PATIENCE + 15
  one_line(first, "process 1 with heads 2, 3, 6, 7 is gone")
  one_line(second, "process 0 with heads 0, 1, 4, 5, 8, 9 has not answered")


def test_processes_that_were_started_otherwise_say_so(place, tmp_path):
  flags = place.to(tmp_path / "run", 4)
  flags = [flags, [*flags, "--config.seed=3"]]
  first, second = several.run(2, flags, place.cache)
  assert (first.status, second.status) == (2, 2)
  told = "seed=3 in process 1, and 0 in process 0; give all processes the same"
  assert second.err == f"error: {told}\n"
  assert first.err == f"error: process 1 ended: {told}\n"
  assert not (tmp_path / "run").exists()


def test_a_mistake_of_all_is_told_once(place, tmp_path):
  flags = place.to(tmp_path / "run", 5)
  first, second = several.run(2, flags, place.cache)
  assert (first.status, second.status, second.err) == (2, 2, "")
  (line,) = first.err.splitlines()
  assert "cannot be shared out evenly to 2 processes" in line


def test_the_launcher_stops_all_at_one_step_and_goes_on(place, tmp_path):
  folder = tmp_path / "run"

  def launched(count, *more):
    words = ["-m", "experiments.launch", f"--num_processes={count}", "--"]
    return subprocess.Popen(
      [sys.executable, *words, *place.to(folder, HEADS[count], *more)],
      cwd=program.ROOT,
      env=program.environment(place.cache),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  process = launched(2)
  assert several.wait_for(lambda: program.saves(folder), [process])
  process.send_signal(signal.SIGINT)
  done = several.told(program.finish(process))
  assert done.status == os.EX_TEMPFAIL, done
  step = int(re.search(r"saved at step (\d+)", done.out)[1])
  assert program.saves(folder)[-1] == step
  (again,) = re.findall("resume with: (.*)", done.out)
  assert "coordinator" not in again and "--resume" in again
  done = several.told(program.finish(launched(4, "--resume")))
  assert done.status == 0, done
  ours, wanted = (
    json.loads((x / "metrics.json").read_text()) for x in (folder, place.whole)
  )
  assert ours["params_sha256"] == wanted["params_sha256"]
