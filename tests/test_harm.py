"""Disks, clocks and other runs: nothing that was saved is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import program, several, test_faults
from tests.test_faults import dies, place, same

__all__ = ["place"]  # A fixture, of this module too.
pytestmark = pytest.mark.slow
# Mounts that nobody else sees, and that go with the process.
ROOM = "unshare", "--map-root-user", "--mount"


def mounted(script, cache):
  """Runs a shell script that may mount what it likes."""
  if subprocess.run([*ROOM, "true"], capture_output=True).returncode:
    pytest.skip("no name space to mount in")
  process = subprocess.Popen(
    [*ROOM, "sh", "-euc", script],
    cwd=program.ROOT,
    env=program.environment(cache),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  return program.finish(process)


def command(place, folder, *more):
  words = [sys.executable, "-m", "experiments.train", *place.flags]
  return " ".join([*words, f"--workdir={folder}", *more])


def one_line(err, *words):
  (line,) = err.splitlines()
  for word in ("error: ", *words):
    assert word in line, line


def test_a_full_disk_stops_it_and_room_lets_it_go_on(place, tmp_path):
  disk, out = tmp_path / "disk", tmp_path / "out"
  disk.mkdir()
  script = f"""
    mount -t tmpfs -o size=12m tmpfs {disk}
    {{
      until [ -d {disk}/run/checkpoints/10 ]; do sleep .02; done
      # As another program would. A save at work ends; the next finds no room.
      free=$(df -k --output=avail {disk} | tail -1)
      dd if=/dev/zero of={disk}/other bs=1k count=$((free - 900)) 2> /dev/null
    }} &
    {command(place, disk / "run")} || echo "ended with $?"
    ls {disk}/run/checkpoints
    rm {disk}/other
    {command(place, disk / "run", "--resume")}
    cp -r {disk}/run {out}
  """
  done = mounted(script, place.cache)
  assert done.status == 0, done
  one_line(done.err, "has no room left", "make room", "--resume")
  assert "ended with 2" in done.out and "damaged" not in done.out
  same(place, out)


def test_a_disk_that_is_full_from_the_start(place, tmp_path):
  script = f"""
    mount -t tmpfs -o size=1m tmpfs {tmp_path}
    {command(place, tmp_path / "run")} || [ $? = 2 ]
    ls {tmp_path}/run
  """
  done = mounted(script, place.cache)
  assert done.status == 0, done
  one_line(done.err, "has no room left", "bytes are free")
  assert "checkpoints" not in done.out


def test_a_folder_that_may_only_be_read(place, tmp_path):
  script = f"""
    mount -t tmpfs -o ro tmpfs {tmp_path}
    {command(place, tmp_path / "run")}
  """
  done = mounted(script, place.cache)
  assert done.status == 2 and done.out == ""
  one_line(done.err, "cannot be written (Read-only file system)", "name a")


def test_a_clock_that_is_set_back(place, tmp_path):
  """By an hour, again and again, within a run and between two."""
  back = """
import time
real_time, looks = time.time, iter(range(10**9))
time.time = lambda: real_time() - 3600 * (1 + next(looks) // 20)
time.time_ns = lambda: int(1e9 * time.time())
"""
  folder = tmp_path / "run"
  script = dies("train.StopSignal.__call__", 40)
  script = script.replace("import os", back + "import os")
  assert place.run(folder, script=script).status == -signal.SIGKILL
  done = place.run(folder, "--resume", script=back + RUNS)
  assert done.status == 0 and "damaged" not in done.out, done
  same(place, folder)
  newest = folder / "checkpoints" / str(program.saves(folder)[-1])
  stamp = json.loads((newest / "_CHECKPOINT_METADATA").read_text())
  assert stamp["commit_timestamp_nsecs"] < 1e9 * (time.time() - 2 * 3600)


RUNS = """
import sys
from experiments import cli, train
sys.argv[0] = "train"
train.define_flags()
cli.run(train.main, config=True)
"""


def test_two_runs_on_one_work_directory(place, tmp_path):
  folder = tmp_path / "run"
  # Long enough to be at work until it is killed.
  longer = "--config.train.epochs=300"
  first = place.start(folder, longer)
  assert several.wait_for(lambda: program.saves(folder), [first])
  second = place.run(folder, longer, "--resume")
  assert second.status == 2 and second.out == ""
  one_line(second.err, f"--workdir={folder} is in use", "name another folder")
  assert first.poll() is None
  first.kill()
  program.finish(first)
  # Nothing is left of the first one that would keep others out.
  third = place.start(folder, longer, "--resume")
  before = program.saves(folder)[-1]
  assert several.wait_for(lambda: program.saves(folder)[-1] > before, [third])
  third.terminate()
  assert program.finish(third).status == os.EX_TEMPFAIL


# In the third test, once its images are counted and before anybody knows.
COUNTED = """
evaluate = train.trainer.phases.evaluate
def patched(run, state, feed):
  def tally(*given):
    counts = [int(x.sum()) for x in run.tally(*given)]
    die()
  third = feed.phase.task == 2
  return evaluate(run._replace(tally=tally) if third else run, state, feed)
train.trainer.phases.evaluate = patched
"""
KILLED = {
  "in a test": test_faults.DIES.format(patch=COUNTED),
  "after the last test": dies("train.trainer.facts.of_run", 0),
  "between test and save": dies("checkpoint.Checkpoints.save", 7),
}


@pytest.mark.parametrize("when", KILLED)
def test_killed_in_a_test_and_before_a_save(when, place, tmp_path):
  folder = tmp_path / "run"
  done = place.run(folder, script=KILLED[when])
  assert done.status == -signal.SIGKILL
  assert place.run(folder, "--resume").status == 0
  same(place, folder)


def test_killed_while_it_restores(place, tmp_path):
  folder = place.copy(tmp_path / "run")
  shutil.rmtree(folder / "checkpoints" / str(program.saves(folder)[-1]))
  done = place.run(
    # Its numbers are read, its arrays not.
    folder,
    "--resume",
    script=dies("checkpoint.ocp.CheckpointManager.restore", 1),
  )
  assert done.status == -signal.SIGKILL
  assert place.run(folder, "--resume").status == 0
  same(place, folder)


def test_saves_that_have_changed_places(place, tmp_path):
  folder = place.copy(tmp_path / "run")
  *_, third, second, first = program.saves(folder)
  checkpoints = folder / "checkpoints"
  (checkpoints / str(first)).rename(checkpoints / "other")
  (checkpoints / str(second)).rename(checkpoints / str(first))
  (checkpoints / "other").rename(checkpoints / str(second))
  done = place.run(folder, "--resume")
  assert done.status == 0
  for step, other in (first, second), (second, first):
    assert f"checkpoint {step} is damaged (it is that of step {other})" in (
      done.out
    )
  assert f"going back to checkpoint {third}" in done.out
  same(place, folder)


def test_a_file_that_is_of_another_save(place, tmp_path):
  folder = place.copy(tmp_path / "run")
  second, first = program.saves(folder)[-2:]
  files = [
    folder / "checkpoints" / str(step) / "progress" / "metadata"
    for step in (first, second)
  ]
  shutil.copy(files[1], files[0])
  done = place.run(folder, "--resume")
  assert done.status == 0
  assert f"checkpoint {first} is damaged" in done.out
  assert "metadata was changed" in done.out
  same(place, folder)


def test_a_save_of_another_run(place, tmp_path):
  folder, other = place.copy(tmp_path / "run"), tmp_path / "other"
  assert place.run(other, "--config.seed=1").status == 0
  before, newest = program.saves(folder)[-2:]
  save = folder / "checkpoints" / str(newest)
  shutil.rmtree(save)
  shutil.copytree(other / "checkpoints" / str(newest), save)
  done = place.run(folder, "--resume")
  assert done.status == 0 and done.err == ""
  told = f"checkpoint {newest} is damaged (it is of another run); going back "
  assert f"{told}to checkpoint {before}\n" in done.out
  same(place, folder)


def test_saves_that_are_all_of_another_run(place, tmp_path):
  folder, other = place.copy(tmp_path / "run"), tmp_path / "other"
  assert place.run(other, "--config.seed=1").status == 0
  for step in program.saves(folder):
    shutil.rmtree(folder / "checkpoints" / str(step))
  for step in program.saves(other):
    save = "checkpoints", str(step)
    shutil.copytree(other.joinpath(*save), folder.joinpath(*save))
  done = place.run(folder, "--resume")
  assert done.status == 2
  one_line(done.err, "holds saves of another run and none of its own; bring")
  assert program.saves(folder) == program.saves(other)


def test_a_stamp_of_orbax_that_is_none(place, tmp_path):
  folder = place.copy(tmp_path / "run")
  newest = program.saves(folder)[-1]
  stamp = folder / "checkpoints" / str(newest) / "_CHECKPOINT_METADATA"
  stamp.write_text("[]")
  done = place.run(folder, "--resume")
  assert done.status == 0 and done.err == "", done
  assert f"checkpoint {newest} is damaged (_CHECKPOINT_METADATA was" in done.out
  same(place, folder)


def test_a_file_in_place_of_all_saves(place, tmp_path):
  folder = place.copy(tmp_path / "run")
  shutil.rmtree(folder / "checkpoints")
  (folder / "checkpoints").touch()
  done = place.run(folder, "--resume")
  assert done.status == 2
  one_line(done.err, "run/checkpoints is a file, and saves need a folder; move")
