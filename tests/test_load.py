"""Two hundred tasks in one process: nothing grows but what is learnt."""

import collections
import json
import statistics

import pytest

from tests import program, soak, stream

MEGA = 1 << 20
# Of all tasks, those whose medians are compared: single ones are at the mercy
# of whatever else the machine does.
ENDS = 50


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  folder = tmp_path_factory.mktemp("load")
  flags = stream.flags(stream.save_arrays(folder / "data"), folder / "run")
  script = stream.watched(folder / "run", folder / "log")
  process = program.start(flags, folder / "cache", script)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 0 and err == "", err
  return folder / "run", stream.rows(folder / "log")


def ends(rows, name):
  """Medians over the first tasks, but the very first, and the last ones."""
  values = [row[name] for row in rows]
  return (
    statistics.median(values[1 : 1 + ENDS]),
    statistics.median(values[-ENDS:]),
  )


@pytest.mark.slow
def test_every_task_is_trained_tested_and_saved(ran):
  folder, rows = ran
  assert [row["task"] for row in rows] == list(range(stream.TASKS))
  numbers = json.loads((folder / "metrics.json").read_text())
  assert len(numbers["accuracy_after_task"]) == stream.TASKS
  assert set(numbers["steps_per_task"]) == {4}


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_task(ran):
  folder, rows = ran
  numbers = json.loads((folder / "metrics.json").read_text())
  assert numbers["compiles"]["after_first_task"] == 0
  # Compiled programs are mapped, hundreds of pieces each.
  first, last = ends(rows, "maps")
  assert last - first < 100


@pytest.mark.slow
def test_memory_is_flat(ran):
  first, last = ends(ran[1], "resident")
  # Between the two lie 150 tasks. Saves are copied and written as text, and
  # allocators keep such pages: 20 to 30 MB, once. For good stay a row of losses
  # and five counts for each of 200 heads, 4 kB a task, and what `soak.LEFT`
  # tells of, 6 MB in all. With the tables of confusion, which were kept once,
  # it was 400 MB.
  assert last - first < 60 * MEGA


@pytest.mark.slow
def test_a_task_takes_as_long_as_any_other(ran):
  first, last = ends(ran[1], "seconds")
  assert last < 1.5 * first


@pytest.mark.slow
def test_no_files_pile_up(ran):
  folder, rows = ran
  first, last = ends(rows, "files")
  # Three saves, one that is being written, one that is being deleted.
  assert last < 1.25 * first
  kept = [p.name for p in (folder / "checkpoints").iterdir() if p.is_dir()]
  assert sorted(kept, key=int) == ["792", "796", "800"]
  kinds = collections.Counter(p.suffix for p in folder.iterdir() if p.is_file())
  assert kinds.total() < 12, kinds


SHORT = 12


@pytest.mark.slow
def test_a_soak_stops_resumes_and_compares(tmp_path, monkeypatch):
  monkeypatch.setattr(soak, "BETWEEN", (3, 20))
  found = soak.soak(0, tmp_path, SHORT)
  assert found["streams"] == 2 and found["stops"] > 2
  assert list(found["params_sha256"].values()) == [found["streams"]]
  assert len(found["rows"]) == found["streams"] + found["stops"]


@pytest.mark.slow
def test_a_soak_sees_a_run_that_goes_on_otherwise(tmp_path, monkeypatch):
  monkeypatch.setattr(soak, "BETWEEN", (3, 20))
  real, begun = soak.trainer.fit, []

  def forgets(run, *, resume, **watch):
    begun.append(not resume)
    # A run of another seed goes on from the second stream's saves.
    other = run._replace(seed=1) if resume and sum(begun) > 1 else run
    return real(other, resume=resume, **watch)

  monkeypatch.setattr(soak.trainer, "fit", forgets)
  found = soak.soak(0, tmp_path, SHORT)
  assert len(found["params_sha256"]) == 2


def test_what_a_save_leaves_is_that_between_the_ends_of_streams():
  seen = [(0, 5000), (0, 9000), (1, 9500), (1, 9200), (2, 9900), (2, 9400)]
  rows = [{"stream": stream, "resident": bytes_} for stream, bytes_ in seen]
  assert soak.left(rows, tasks=10) == 20
  assert soak.left(rows[:2], tasks=10) == 0
