"""Saves that are whole, checked, and move between meshes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import bank, checkpoint, sharding

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
  assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]
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
  covered = json.loads((folder / checkpoint.MANIFEST).read_text())["sha256"]
  # Neither holds anything that a restore reads.
  after = {checkpoint.STAMP, "commit_success.txt", checkpoint.MANIFEST}
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
  covered = json.loads((folder / checkpoint.MANIFEST).read_text())["sha256"]
  # The arrays, the numbers, what describes them, and the manifest itself.
  names = [n for n in covered if "/d/" in n][:1]
  names += ["progress/metadata", "state/_METADATA", checkpoint.MANIFEST]
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
  (half / checkpoint.MANIFEST).unlink()
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
