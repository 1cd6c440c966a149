"""Killed, stopped, damaged, moved: a run ends as if nothing had happened."""

import json
import os
import random
import re
import shlex
import shutil
import signal

import numpy as np
import pytest

from tests import chaos, pages, program, tiny

HEAD5 = "--config.mesh.head=5"
# What depends on the mesh and not on what was learnt.
OF_MESH = ("mesh", "devices", "step_bytes_per_device", "collectives")


class Place:
  """The tiny data, a compilation cache, and one run that nobody disturbed."""

  def __init__(self, folder):
    self.cache = folder / "cache"
    self.data = program.save_arrays(folder / "data")
    self.flags = [*program.tiny_flags(self.data), HEAD5]
    self.whole = folder / "whole"
    self.done = program.run([*self.flags, self.to(self.whole)], self.cache)

  def to(self, folder):
    return f"--workdir={folder}"

  def start(self, folder, *more, script=None):
    """Starts a process of its own, to be watched."""
    flags = [*self.flags, self.to(folder), *more]
    return program.start(flags, self.cache, script)

  def run(self, folder, *more, script=None):
    """The same without the seconds of importing."""
    flags = [*self.flags, self.to(folder), *more]
    beside = folder.with_name(f"{folder.name}-told")
    return program.forked(flags, beside, script, self.cache)

  def copy(self, folder):
    """The whole run's saves in a folder, as if killed before its metrics."""
    shutil.copytree(self.whole, folder)
    for path in folder.iterdir():
      if path.name not in ("checkpoints", "config.json", "data.sha256"):
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  made = Place(tmp_path_factory.mktemp("faults"))
  assert made.done.status == 0, made.done
  return made


def same(place, folder, but=()):
  """Every number, row and pixel but the clock's is that of the whole run."""
  ours, wanted = program.numbers(folder), program.numbers(place.whole)
  for name in but:
    assert ours.pop(name) != wanted.pop(name), name
  assert ours == wanted
  for name in "accuracy_matrix.csv", "accuracy_matrix.png", "curves.png":
    ours = (folder / name).read_bytes()
    assert ours == (place.whole / name).read_bytes(), name
  if not but:
    assert told(folder) == told(place.whole)


def told(folder):
  """Words of the report, without those on time."""
  page = (folder / "report.html").read_text()
  root = pages.tree(page)
  (main,) = root.iter("main")
  main.remove(pages.section(page, "Throughput", root))
  return pages.words(root)


def writing(folder):
  """Saves that are being written."""
  return list((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def kill_when(process, condition):
  """Kills as soon as the condition holds; False if the program was faster."""
  while process.poll() is None:
    if condition():
      process.kill()
      break
  program.finish(process)
  return process.returncode == -signal.SIGKILL


# The program kills itself in the middle of the given step, or of a write.
DIES = """
import os, signal, sys
from experiments import cli, train
from mhil import checkpoint, run

def die():
  os.kill(os.getpid(), signal.SIGKILL)

{patch}
sys.argv[0] = "train"
train.define_flags()
cli.run(train.main, config=True)
"""
AT_CALL = """
calls = iter(range({call}))
real = {target}
def patched(*args, **kwargs):
  if next(calls, None) is None:
    {what}
  return real(*args, **kwargs)
{target} = patched
"""


def dies(target, call, what="die()"):
  return DIES.format(patch=AT_CALL.format(target=target, call=call, what=what))


def test_the_undisturbed_run_is_quiet_and_learns(place):
  assert place.done.err == ""
  assert place.done.out.rstrip().endswith(f"results in {place.whole}")
  numbers = program.numbers(place.whole)
  # Ten classes: guessing gets a tenth.
  assert numbers["average_incremental_accuracy"] > 0.3
  assert numbers["steps"] == program.STEPS and len(numbers["history"]) > 20


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers(place, tmp_path):
  assert place.run(tmp_path / "again").status == 0
  same(place, tmp_path / "again")


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
  # Drawn anew in every test run; pytest shows it if it fails.
  seed = random.randrange(1 << 20)
  print("chaos of seed", seed)
  disturbed = chaos.Chaos(tmp_path, seed, latest=2 * program.STEPS)
  while disturbed.kills < 4:
    disturbed.stream()
  told = disturbed.told()
  assert told["streams_as_if_undisturbed"] == told["streams"] > 0
  # A save is finished in the background, while the next steps are taken.
  assert (
    told["steps_lost"].get("killed", {"most": 0})["most"] <= 2 * chaos.EVERY
  )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in memory", "streamed"])
def test_killed_between_two_steps(how, place, tmp_path):
  folder = tmp_path / "run"
  call = random.randrange(1, 69)
  print("dies at call", call)
  script = dies("train.StopSignal.__call__", call)
  # A streamed run is held against the run in memory, number for number.
  flag = f"--config.data.streamed={how == 'streamed'}"
  assert place.run(folder, flag, script=script).status == -signal.SIGKILL
  assert not (folder / "metrics.json").exists()
  assert place.run(folder, flag, "--resume").status == 0
  same(place, folder, () if how == "in memory" else ("step_bytes_per_device",))


@pytest.mark.slow
def test_killed_before_the_first_save(place, tmp_path):
  folder = tmp_path / "run"
  script = dies("train.StopSignal.__call__", 2)
  assert place.run(folder, script=script).status == -signal.SIGKILL
  assert program.saves(folder) == []
  done = place.run(folder, "--resume")
  assert done.status == 0
  same(place, folder)


@pytest.mark.slow
def test_killed_from_outside_while_a_save_is_written(place, tmp_path):
  folder = tmp_path / "run"
  process = place.start(folder)
  assert kill_when(
    process, lambda: len(program.saves(folder)) > 1 and bool(writing(folder))
  )
  assert place.run(folder, "--resume").status == 0
  assert writing(folder) == []
  same(place, folder)


# The arrays are written, the manifest not; the manifest, but not the name.
WRITES = {
  "checkpoint._hashes": 3,
  "checkpoint.Checkpoints._write_manifest": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", WRITES)
def test_killed_at_the_worst_moment_of_a_write(target, place, tmp_path):
  folder = tmp_path / "run"
  done = place.run(folder, script=dies(target, WRITES[target]))
  assert done.status == -signal.SIGKILL
  assert len(writing(folder)) == 1 and program.saves(folder)
  done = place.run(folder, "--resume")
  assert done.status == 0 and "damaged" not in done.out, done
  assert writing(folder) == []
  same(place, folder)


@pytest.mark.slow
def test_killed_before_the_numbers_are_written(place, tmp_path):
  folder = tmp_path / "run"
  # The first four are data.sha256, config.json, stream.json and report.html.
  script = dies("train.claims.replace", 4)
  assert place.run(folder, script=script).status == -signal.SIGKILL
  assert (folder / "curves.png").exists() and (folder / "report.html").exists()
  assert not (folder / "metrics.json").exists()
  assert place.run(folder, "--resume").status == 0
  same(place, folder)


def test_other_data_are_noticed(place, tmp_path):
  folder = place.copy(tmp_path / "run")
  (folder / "data.sha256").write_text("0" * 64 + "\n")
  done = place.run(folder, "--resume")
  assert done.status == 2 and "began with data 000000000000" in done.err
  (folder / "data.sha256").unlink()
  done = place.run(folder, "--resume")
  assert done.status == 2 and "has lost data.sha256" in done.err


def largest(folder):
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("harm", chaos.HARM)
def test_newest_save_damaged(harm, place, tmp_path):
  folder = place.copy(tmp_path / "run")
  *_, before, newest = program.saves(folder)
  harm(largest(folder / "checkpoints" / str(newest) / "state"))
  done = place.run(folder, "--resume")
  assert done.status == 0 and done.err == ""
  (line,) = [x for x in done.out.splitlines() if "is damaged" in x]
  assert line.startswith(f"checkpoint {newest} is damaged (")
  assert line.endswith(f"going back to checkpoint {before}")
  assert newest in program.saves(folder)
  same(place, folder)


@pytest.mark.slow
def test_all_saves_damaged(place, tmp_path):
  folder = place.copy(tmp_path / "run")
  count = len(program.saves(folder))
  for step in program.saves(folder):
    chaos.truncate(largest(folder / "checkpoints" / str(step) / "state"))
  done = place.run(folder, "--resume")
  assert done.status == 0
  lines = [x for x in done.out.splitlines() if "is damaged" in x]
  assert len(lines) == count and lines[-1].endswith("going back to the start")
  same(place, folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(number, place, tmp_path):
  folder = tmp_path / "a run's"
  process = place.start(folder)
  while process.poll() is None and not program.saves(folder):
    pass
  process.send_signal(number)
  done = program.finish(process)
  assert done.status == os.EX_TEMPFAIL and done.err == "", done
  memory, said, how = done.out.splitlines()
  assert memory.startswith("memory: 20 samples over the whole mesh, 80 bytes")
  step = int(re.fullmatch(r"stopped by a signal; saved at step (\d+)", said)[1])
  assert step in program.saves(folder) and step < program.STEPS
  assert how.startswith("resume with: python -m experiments.train ")
  assert not (folder / "metrics.json").exists()
  # What it says to type works as it stands.
  flags = shlex.split(how.partition("experiments.train ")[2])
  assert program.run(flags, place.cache).status == 0
  same(place, folder)


@pytest.mark.slow
def test_a_second_signal_is_not_held_back(place, tmp_path):
  twice = "for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)"
  script = dies("run.read", 4, twice)
  done = place.run(tmp_path / "run", script=script)
  assert done.status == -signal.SIGTERM
  assert place.run(tmp_path / "run", "--resume").status == 0
  same(place, tmp_path / "run")


def stop_halfway(place, folder, *more):
  """Stops a run of five devices in the middle of its third task."""
  script = dies(
    "train.StopSignal.__call__", 33, "os.kill(os.getpid(), signal.SIGTERM)"
  )
  assert place.run(folder, *more, script=script).status == os.EX_TEMPFAIL
  return folder


@pytest.fixture(scope="module")
def halfway(place, tmp_path_factory):
  return stop_halfway(place, tmp_path_factory.mktemp("halfway") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("head", [1, 2])
def test_resumed_with_fewer_devices(head, place, halfway, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(halfway, folder)
  done = place.run(folder, "--resume", f"--config.mesh.head={head}")
  assert done.status == 0, done
  ours, whole = program.numbers(folder), program.numbers(place.whole)
  assert len(ours["devices"]) == ours["mesh"]["head"] == head
  for name in OF_MESH:
    del ours[name], whole[name]
  # Two devices hold six heads for five tasks; the sixth never opens.
  assert all(not any(row[1 + program.TASKS :]) for row in ours["history"])
  ours["history"] = [row[: 1 + program.TASKS] for row in ours["history"]]
  # Every head computes what it computed before: not one bit differs.
  assert ours == whole
  held = json.loads((folder / "config.json").read_text())
  assert held["mesh"]["head"] == head


# Workers store in slots of their own, so what is held after the next task, or
# in which order, depends on their number; what is drawn until then does not.
CUT = {
  "none": ("--config.memory.size=0", program.STEPS),
  "herding": ("--config.memory.selection=herding", 45),
}


@pytest.mark.slow
@pytest.mark.parametrize("memory", CUT)
def test_resumed_with_the_samples_cut_in_two(memory, place, tmp_path):
  how, alike = CUT[memory]
  assert place.run(tmp_path / "whole", how).status == 0
  folder = stop_halfway(place, tmp_path / "run", how)
  more = "--resume", "--config.mesh.head=2", "--config.mesh.data=2"
  done = place.run(folder, how, *more)
  assert done.status == 0, done
  ours, whole = program.numbers(folder), program.numbers(tmp_path / "whole")
  assert ours["history"][-1][0] == program.STEPS
  # Half a batch's gradient plus the other half's is summed in another order:
  # float32 rounding, 1e-7 a step, which 42 Adam steps of .01 can amplify.
  for a, b in zip(ours["history"], whole["history"], strict=True):
    for x, y in zip(a, b):
      assert (x is None) == (y is None)
      if x is not None and a[0] <= alike:
        np.testing.assert_allclose(x, y, rtol=1e-3)
  before = [row for row in whole["history"] if row[0] <= 33]
  assert ours["history"][: len(before)] == before
  # One of 14 to 70 test samples may sit on the edge.
  after = ours["accuracy_after_task"], whole["accuracy_after_task"]
  for a, b in list(zip(*after))[: 5 if memory == "none" else 3]:
    assert abs(a - b) <= 1 / 14


DIVERGES = {
  "rate": [
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=1e30",
  ],
  # Finite loss, infinite parameters after the same step.
  "overflow": [
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=3e38",
    "--config.checkpoint.every=1",
  ],
}


def diverged(done):
  assert done.status == 1 and done.err.count("\n") == 1, done
  assert "Traceback" not in done.err
  # Nothing but what is said before training.
  assert re.fullmatch(r"memory: 20 samples over the whole mesh, .*\n", done.out)
  words = r"error: .*head (\d+) became NaN or infinite (?:at|by) step (\d+); "
  match = re.match(words + r"last good checkpoint: (.*?); lower", done.err)
  assert match, done.err
  return int(match[1]), int(match[2]), match[3]


def all_finite(folder):
  """Whether a run that resumes from the newest save sees finite numbers."""
  import jax
  import orbax.checkpoint as ocp

  for step in program.saves(folder):
    path = folder / "checkpoints" / str(step) / "state"
    tree = ocp.StandardCheckpointer().restore(path)
    for leaf in jax.tree.leaves(tree):
      assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.parametrize("how", DIVERGES)
def test_a_loss_that_is_no_number(how, place, tmp_path):
  folder = tmp_path / "run"
  head, step, last = diverged(place.run(folder, *DIVERGES[how]))
  assert head == 0 and step <= 10
  steps = program.saves(folder)
  assert last == (f"step {steps[-1]}" if steps else "none was saved")
  assert all(s < step for s in steps)
  all_finite(folder)
  assert not (folder / "metrics.json").exists()


@pytest.mark.slow
def test_it_goes_bad_after_a_good_save(place, tmp_path):
  folder = tmp_path / "run"
  done = place.run(
    folder, script=DIES.format(patch=POISON.format(step=33, head=1))
  )
  head, step, last = diverged(done)
  assert head == 1 and 33 <= step <= 36
  assert (
    last == f"step {program.saves(folder)[-1]}"
    and program.saves(folder)[-1] <= 33
  )
  all_finite(folder)
  # The save that it names is good: from there the run ends as it should.
  assert place.run(folder, "--resume").status == 0
  same(place, folder)


# A head's parameters turn to NaN behind the loop's back.
POISON = """
import jax, numpy
real = run.read
def read(state):
  if int(state.step) >= {step}:
    def poison(x):
      rows = numpy.array(x)
      rows[:, {head}] = numpy.nan
      return jax.device_put(rows, x.sharding)
    bank = state.bank
    params = jax.tree.map(poison, bank.params)
    state = state._replace(bank=bank._replace(params=params))
  return real(state)
run.read = read
"""


def test_data_too_large_to_learn_from(place, tmp_path):
  dataset = tiny.dataset(program.CLASSES)
  huge = {
    f"{split}_images": getattr(dataset, f"{split}_images").astype(np.float32)
    * np.float32(1e36)
    for split in ("train", "test")
  }
  data = program.save_arrays(tmp_path / "data", **huge)
  (tmp_path / "data" / "meta.json").write_text('{"mean": [0], "std": [1]}')
  folder = tmp_path / "run"
  head, step, _ = diverged(
    place.run(folder, f"--config.data.name={data}", HEAD5)
  )
  assert head == 0 and step <= 5 and program.saves(folder) == []


@pytest.mark.slow
def test_two_default_folders_do_not_collide(place, tmp_path):
  flags = [*place.flags, "--config.train.epochs=1"]
  # Twice at once, from a place of their own: `runs/` is relative.
  script = f"import os; os.chdir({str(tmp_path)!r})\n" + DIES.format(patch="")
  both = [program.start(flags, place.cache, script) for _ in range(2)]
  for process in both:
    done = program.finish(process)
    assert done.status == 0, done
  names = [p.name for p in (tmp_path / "runs").iterdir()]
  assert len(names) == 2 and all(n.startswith("digits-") for n in names)
