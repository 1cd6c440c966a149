"""Saves that are whole, checked, and move between meshes."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import bank, checkpoint, manifest, sharding

P = jax.P


def state(head=2, heads=6, fill=None, columns=3):
  """A step and one array `[l, h, c]` whose numbers count up, by head."""
  mesh = sharding.make_mesh(head=head)
  rows = -(-heads // head)
  array = np.arange(rows * head * columns, dtype=np.float32)
  if fill is not None:
    array[:] = fill
  array = array.reshape(rows, head, columns)
  step = sharding.replicated(np.int32(7), mesh)
  return {"step": step, "w": sharding.place(array, mesh, P(None, "head"))}


def flat(tree):
  return np.asarray(tree["w"]).reshape(-1, tree["w"].shape[-1])


@pytest.fixture
def told():
  return []


@pytest.fixture
def place(tmp_path, told):
  def make(**settings):
    return checkpoint.Checkpoints(tmp_path, say=told.append, **settings)

  return make


def saved(place, *steps, **settings):
  with place(**settings) as checkpoints:
    for step in steps:
      checkpoints.save(step, state(), {"step": step})


def test_nothing_to_restore(place, told):
  with place() as checkpoints:
    assert checkpoints.newest() is None
    assert checkpoints.restore(state()) is None
  assert told == []


def test_a_save_comes_back_as_it_was(place, told):
  progress = {"a": [1, None, 0.1], "b": {"c": "text"}}
  with place() as checkpoints:
    checkpoints.save(3, state(), progress)
  with place() as checkpoints:
    assert checkpoints.newest() == 3
    found, also = checkpoints.restore(state(fill=0))
  assert also == progress and told == []
  np.testing.assert_array_equal(flat(found), flat(state()))
  assert found["w"].sharding == state()["w"].sharding
  assert found["step"] == 7 and found["step"].dtype == jnp.int32


def test_the_newest_few_stay(place, tmp_path):
  saved(place, 1, 2, 3, 4, 5, keep=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5", "ID"]
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 5}


def test_a_step_is_saved_once(place):
  saved(place, 1)
  with place() as checkpoints:
    checkpoints.save(1, state(fill=0), {"step": "again"})
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}


def test_arrays_may_be_overwritten_once_save_returns(place):
  mesh = sharding.make_mesh(head=2)
  # Large enough that the write is still going on while the next step runs.
  array = np.random.default_rng(0).random((4, 2, 500_000), np.float32)
  like = {"w": sharding.place(array, mesh, P(None, "head"))}
  overwrite = jax.jit(lambda x: {"w": x["w"] * 0}, donate_argnums=0)
  compiled = overwrite.lower(like).compile()
  with place() as checkpoints:
    checkpoints.save(1, like, {})
    like = jax.block_until_ready(compiled(like))
    np.testing.assert_array_equal(flat(like), 0)
    checkpoints.newest()
    found, _ = checkpoints.restore(like)
  np.testing.assert_array_equal(np.asarray(found["w"]), array)


def test_the_manifest_covers_every_file(place, tmp_path):
  saved(place, 1)
  folder = tmp_path / "1"
  files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
  covered = json.loads((folder / manifest.MANIFEST).read_text())["sha256"]
  # Neither holds anything that a restore reads.
  after = {manifest.STAMP, "commit_success.txt", manifest.MANIFEST}
  assert files - covered.keys() <= after
  assert len(covered) > 5


def damage(path, how):
  data = path.read_bytes()
  if how == "removed":
    path.unlink()
  elif how == "truncated":
    path.write_bytes(data[: len(data) // 2])
  else:
    middle = len(data) // 2
    flipped = bytes([data[middle] ^ 1])
    path.write_bytes(data[:middle] + flipped + data[middle + 1 :])


@pytest.mark.parametrize("how", ["removed", "truncated", "flipped"])
def test_damage_anywhere_goes_back_to_the_save_before(
  how, tmp_path, place, told
):
  saved(place, 1, 2)
  folder = tmp_path / "2"
  kept = tmp_path.parent / f"{tmp_path.name}-kept"
  shutil.copytree(folder, kept)
  covered = json.loads((folder / manifest.MANIFEST).read_text())["sha256"]
  # The arrays, the numbers, what describes them, and the manifest itself.
  names = [n for n in covered if "/d/" in n][:1]
  names += ["progress/metadata", "state/_METADATA", manifest.MANIFEST]
  for name in names:
    damage(folder / name, how)
    with place() as checkpoints:
      found, progress = checkpoints.restore(state(fill=0))
      assert progress == {"step": 1} and checkpoints.newest() == 1
    np.testing.assert_array_equal(flat(found), flat(state()))
    message = told.pop()
    assert message.startswith("checkpoint 2 is damaged (") and not told
    assert message.endswith("going back to checkpoint 1")
    assert "\n" not in message
    # Set aside, not deleted; and the step can be saved again.
    assert (tmp_path / "2.damaged").is_dir() and not folder.exists()
    shutil.copytree(kept, folder)
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 2}


def test_all_damaged_starts_over_and_can_save_again(place, told, tmp_path):
  saved(place, 1, 2)
  for step in "1", "2":
    damage(tmp_path / step / "progress" / "metadata", "truncated")
  with place() as checkpoints:
    assert checkpoints.restore(state()) is None
    checkpoints.save(1, state(), {"step": "new"})
    assert checkpoints.restore(state())[1] == {"step": "new"}
  assert len(told) == 2
  assert told[0].endswith("going back to checkpoint 1")
  assert told[1].endswith("going back to the start")


def test_a_sound_save_that_does_not_fit_is_not_thrown_away(place, tmp_path):
  saved(place, 1)
  other = {"another": state()["w"], "step": state()["step"]}
  with place() as checkpoints, pytest.raises(Exception):  # noqa: B017
    checkpoints.restore(other)
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}


def test_half_a_save_is_not_seen_and_cleaned_away(place, told, tmp_path):
  saved(place, 1)
  half = tmp_path / "2.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "1", half)
  (half / manifest.MANIFEST).unlink()
  with place() as checkpoints:
    assert checkpoints.newest() == 1
    assert checkpoints.restore(state())[1] == {"step": 1}
    checkpoints.save(2, state(), {"step": 2})
  assert told == [] and not half.exists()


@pytest.mark.parametrize("before", [1, 2, 4, 5])
@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_heads_move_to_another_mesh_in_order(before, after, place):
  heads = 5
  with place() as checkpoints:
    checkpoints.save(1, state(before, heads), {})
    like = state(after, heads, fill=-1)
    found, _ = checkpoints.restore(like)
  found = jax.tree.map(bank.deal, found, like)
  assert found["w"].shape == like["w"].shape
  assert found["w"].sharding == like["w"].sharding
  np.testing.assert_array_equal(flat(found)[:heads], flat(state(1, heads)))


@pytest.mark.parametrize(
  "saved_shape, shape",
  [
    ((1, 1, 2), (3, 1, 2)),
    ((3, 1), (1, 2)),
    ((3, 2), (1, 5)),
    ((1, 5, 2, 3), (3, 2, 2, 3)),
    ((2, 3), (2, 2)),
  ],
)
def test_dealing_keeps_order_and_leaves_new_rows(saved_shape, shape):
  old = jnp.arange(np.prod(saved_shape), dtype=jnp.float32)
  like = jnp.full(shape, -1.0)
  dealt = bank.deal(old.reshape(saved_shape), like)
  rows = np.asarray(dealt).reshape(-1, *shape[2:])
  source = np.asarray(old).reshape(-1, *saved_shape[2:])
  n = min(len(rows), len(source))
  np.testing.assert_array_equal(rows[:n], source[:n])
  np.testing.assert_array_equal(rows[n:], -1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_is_never_saved(bad, place):
  broken = state()
  rows = np.array(broken["w"])
  rows[1, 1, 0] = bad  # Head 1 * 2 + 1.
  broken["w"] = jax.device_put(rows, broken["w"].sharding)
  with place() as checkpoints:
    told = r"^w of head 3 .* step {}; last good checkpoint: {}; lower"
    with pytest.raises(
      FloatingPointError, match=told.format(4, "none was saved")
    ):
      checkpoints.save(4, broken, {})
    checkpoints.save(5, state(), {})
    # A step that is saved already is checked all the same.
    for step in 5, 6:
      with pytest.raises(FloatingPointError, match=told.format(step, "step 5")):
        checkpoints.save(step, broken, {})
    assert checkpoints.newest() == 5


@pytest.fixture
def another(tmp_path_factory):
  """Saves of steps 1 and 2 of another run, in a folder of their own."""
  folder = tmp_path_factory.mktemp("another")
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in 1, 2:
      checkpoints.save(step, state(), {"step": "another"})
  return folder


def put(folder, other, step):
  """Puts a save into another folder, in place of the one that is there."""
  shutil.rmtree(folder / f"{step}")
  shutil.copytree(other / f"{step}", folder / f"{step}")


def test_a_save_of_another_run_is_set_aside(place, told, tmp_path, another):
  saved(place, 1, 2)
  put(tmp_path, another, 2)
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}
  assert told == [
    "checkpoint 2 is damaged (it is of another run); going back to checkpoint 1"
  ]
  assert (tmp_path / "2.damaged").is_dir()


@pytest.mark.parametrize("writes", [True, False])
def test_saves_of_another_run_alone_are_refused(
  writes, place, told, tmp_path, another
):
  saved(place, 1, 2)
  for step in 1, 2:
    put(tmp_path, another, step)
  refused = r"holds saves of another run and none of its own; .*remove .*ID to"
  with place(writes=writes) as checkpoints:
    with pytest.raises(ValueError, match=refused) as caught:
      checkpoints.restore(state())
    assert "\n" not in str(caught.value)
    # They are as they were, and taken by whoever wants to.
    (tmp_path / manifest.MARK).unlink()
    assert checkpoints.restore(state())[1] == {"step": "another"}
  assert told == []


def test_a_folder_may_be_copied_and_its_run_go_on(place, told, tmp_path):
  saved(place, 1)
  copy = tmp_path / "copy"
  shutil.copytree(tmp_path, copy)
  with checkpoint.Checkpoints(copy, say=told.append) as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}
    checkpoints.save(2, state(), {"step": 2})
  with checkpoint.Checkpoints(copy, writes=False) as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 2}
  marks = [(f / manifest.MARK).read_text() for f in (tmp_path, copy)]
  assert marks[0] == marks[1] and told == []


@pytest.mark.parametrize("left", [None, ""])
def test_a_mark_that_is_lost_is_that_of_the_oldest_save(
  left, place, told, tmp_path
):
  saved(place, 1, 2)
  path = tmp_path / manifest.MARK
  mark = path.read_text()
  path.unlink() if left is None else path.write_text(left)
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 2}
    checkpoints.save(3, state(), {"step": 3})
    assert checkpoints.restore(state())[1] == {"step": 3}
  assert path.read_text() == mark and told == []


def test_killed_between_the_mark_and_the_first_save(place, told, tmp_path):
  path = tmp_path / manifest.MARK
  path.write_text("0123\n")
  saved(place, 1)
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}
  assert path.read_text() == "0123\n" and told == []
  told = json.loads((tmp_path / "1" / manifest.MANIFEST).read_text())
  assert told["run"] == "0123"


def test_saves_that_are_older_than_marks_are_taken(place, told, tmp_path):
  saved(place, 1, 2)
  (tmp_path / manifest.MARK).unlink()
  for step in "1", "2":
    path = tmp_path / step / manifest.MANIFEST
    old = json.loads(path.read_text())
    del old["run"]
    path.write_text(json.dumps(old))
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 2}
    checkpoints.save(3, state(), {"step": 3})
  damage(tmp_path / "3" / "progress" / "metadata", "flipped")
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 2}
  assert len(told) == 1


@pytest.mark.parametrize(
  "text, why",
  [
    ('{"step": 2, "sha256": {}}', "manifest.json lists no files"),
    ('{"step": 2, "sha256": []}', "manifest.json lists no files"),
    ('{"step": 2}', "manifest.json lists no files"),
    ("[]", "manifest.json was changed"),
    ("null", "manifest.json was changed"),
    ("[" * 100_000, "manifest.json was changed"),
    ('{"step": []}', r"it is that of step \[\]"),
  ],
)
def test_a_manifest_that_is_none(text, why, place, told, tmp_path):
  saved(place, 1, 2)
  (tmp_path / "2" / manifest.MANIFEST).write_text(text)
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}
  (line,) = told
  assert re.match(rf"checkpoint 2 is damaged \({why}\); going", line), line


def test_a_manifest_names_every_file_of_a_save(place, told, tmp_path):
  saved(place, 1, 2)
  path = tmp_path / "2" / manifest.MANIFEST
  known = json.loads(path.read_text())
  del known["sha256"]["progress/metadata"]
  path.write_text(json.dumps(known))
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}
  assert "(progress/metadata is not in manifest.json); going" in told[0]


@pytest.mark.parametrize("text", ["[]", "", '{"item_handlers', "\xff", "{" * 9])
def test_a_stamp_that_orbax_would_stumble_over(
  text, place, told, tmp_path, caplog
):
  saved(place, 1, 2)
  path = tmp_path / "2" / manifest.STAMP
  path.write_bytes(text.encode("latin1"))
  refused = rf"2/{manifest.STAMP} is damaged; remove it, nothing"
  with pytest.raises(ValueError, match=refused):
    place(writes=False)
  with place() as checkpoints:
    assert checkpoints.restore(state())[1] == {"step": 1}
  assert told == [
    f"checkpoint 2 is damaged ({manifest.STAMP} was changed); it is set aside"
  ]
  assert (tmp_path / "2.damaged").is_dir()
  assert not [r for r in caplog.records if r.levelname == "ERROR"]


@pytest.mark.parametrize("writes", [True, False])
def test_a_file_where_the_folder_should_be(writes, tmp_path):
  path = tmp_path / "file"
  path.touch()
  with pytest.raises(ValueError, match=f"^{path} is a file, .*move it away$"):
    checkpoint.Checkpoints(path, writes=writes)
