"""Rows on the host: the same run, bit for bit, and nothing on the devices."""

import shutil
import types

import jax
import numpy as np
import pytest

from mhil import checkpoint, prepare, room, run, sharding, trainer
from tests import tiny
from tests.test_trainer import stop_after

WAYS = {
  "one worker": (tiny.Memory(), {}),
  "two workers": (tiny.Memory(), {"data": 2}),
  "two workers, two heads": (tiny.Memory(), {"data": 2, "head": 2}),
  "own rows only": (tiny.Memory(scope="local", draws=2), {"data": 2}),
  "reservoir": (tiny.Memory(policy="reservoir"), {"data": 2}),
  "herding": (tiny.Memory(selection="herding"), {"data": 2}),
  "streamed": (
    tiny.Memory(),
    {"recipe": tiny.RECIPE._replace(streamed=True, balanced_epochs=1)},
  ),
}


def pair(name):
  memory, mesh = WAYS[name]
  return [
    tiny.build(memory=memory._replace(place=place), **mesh)
    for place in ("device", "host")
  ]


def as_plain(tree):
  return jax.tree.map(np.asarray, tree)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_equals_the_run_with_rows_on_the_devices(name):
  ours, theirs = (trainer.fit(r) for r in reversed(pair(name)))
  for key in "params_sha256", "accuracy_matrix":
    assert ours.metrics[key] == theirs.metrics[key]
  assert ours.progress.history == theirs.progress.history
  ours, theirs = as_plain((ours.state.memory, theirs.state.memory))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert ours.buffer.rows.any()


def test_no_device_holds_the_buffer():
  rows = {}
  for r in pair("two workers"):
    state = run.start(r)
    rows[type(state.memory.buffer.rows)] = r.step.memory_analysis()
  shown = run.shown(r, state).memory.buffer.rows
  # Two workers each send two rows or fewer to each other, whatever is held.
  assert shown.shape == (2, 4, 2, 2, 1)
  host, device = rows[np.ndarray], rows[type(shown)]
  held = (6 - 4) * 4
  less = device.argument_size_in_bytes - host.argument_size_in_bytes
  assert less == held
  assert r.transform.facts["bytes_per_device"] == 0


def test_one_exchange_as_with_rows_on_the_devices():
  device, host = pair("two workers")
  # Which comes first in a program says nothing.
  assert sorted(device.traffic) == sorted(host.traffic)
  assert sum(c.kind == "all-to-all" for c in host.traffic) == 1
  assert not any(
    "all-to-all" in c.kind for c in pair("own rows only")[1].traffic
  )


@pytest.mark.parametrize("step", [4, 12])
def test_a_save_is_not_moved_by_what_comes_after(tmp_path, step):
  """The run goes on in the same rows while they are being written."""
  r = pair("two workers")[1]
  with checkpoint.Checkpoints(tmp_path, every=2, keep=100) as saves:
    whole = trainer.fit(r, checkpoints=saves)
  later = [p for p in tmp_path.iterdir() if p.name.isdigit()]
  for path in later:
    if int(path.name) > step:
      shutil.rmtree(path)
  with checkpoint.Checkpoints(tmp_path, every=2, keep=100) as saves:
    part = trainer.fit(r, checkpoints=saves, resume=True)
  assert len(later) > 5 and part.progress.step == whole.progress.step
  assert part.metrics["params_sha256"] == whole.metrics["params_sha256"]
  assert (part.state.memory.buffer.rows == whole.state.memory.buffer.rows).all()


def test_moves_to_other_workers_and_back_to_the_devices(tmp_path):
  two, one = pair("two workers")[1], pair("one worker")[1]
  with checkpoint.Checkpoints(tmp_path) as saves:
    part = trainer.fit(two, checkpoints=saves, stop=stop_after(11))
    like = run.start(one)
    moved = run.refit(one, saves.restore(run.shapes(like))[0], like)
  assert isinstance(moved.memory.buffer.rows, np.ndarray)
  assert moved.memory.buffer.rows.shape[0] == 1
  held = [
    r.transform.held(s.memory) for r, s in ((two, part.state), (one, moved))
  ]
  assert held[0].tolist() == held[1].tolist() and len(held[0]) > 6


def test_bad_place():
  with pytest.raises(
    ValueError, match=r"memory\.place='disk' is not known; use"
  ):
    tiny.parts(memory=tiny.Memory(place="disk"))


def test_rows_on_the_host_are_of_one_process(monkeypatch):
  # Only there: a mesh of four processes has devices of each.
  four = types.SimpleNamespace(process_count=lambda: 4)
  monkeypatch.setattr(room, "jax", four)
  with pytest.raises(
    ValueError, match=r"one process, of which there are 4; use"
  ):
    tiny.parts(memory=tiny.Memory(place="host"))


def test_rows_on_the_host_serve_no_stages():
  mesh = sharding.make_mesh(stage=2)
  *_, transform = tiny.parts(memory=tiny.Memory(place="host"))
  objective = tiny.objective()._replace(spread=lambda run, mesh: run)
  with pytest.raises(ValueError, match=r"place=host does not .*stage=2; use"):
    prepare.check_spread(mesh, objective, transform)
