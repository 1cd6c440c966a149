"""The winner of all heads is the arg-max of all scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhil import losses, phases, scoring, sharding
from mhil import run as run_lib
from tests import tiny

P = jax.P


def winners(table, devices):
  """`scoring.first_best` of scores `[b, heads, c]` dealt to devices."""
  b, heads, c = table.shape
  mesh = sharding.make_mesh(head=devices)
  dealt = table.reshape(b, heads // devices, devices, c)
  spread = jax.shard_map(
    scoring.first_best,
    mesh=mesh,
    in_specs=P(None, None, "head"),
    out_specs=P(),
  )
  placed = sharding.place(dealt, mesh, P(None, None, "head"))
  return np.asarray(jax.jit(spread)(placed))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_winner_is_the_first_of_the_best(devices):
  rng = np.random.default_rng(0)
  # Few values, so that most rows have their best score twice.
  table = rng.integers(0, 4, (64, 8, 3)).astype(np.float32)
  want = table.reshape(64, -1).argmax(1)
  assert len(set(want.tolist())) > 6
  np.testing.assert_array_equal(winners(table, devices), want)


def test_scores_that_are_not_numbers_have_some_winner():
  table = np.zeros((2, 4, 3), np.float32)
  table[0, 1, 1] = np.nan
  found = winners(table, 2)
  assert found[1] == 0 and 0 <= found[0] < 12


def test_masked_scores_do_not_win():
  table = np.full((1, 4, 3), losses.MASKED, np.float32)
  table[0, 2, 1] = -1e4
  np.testing.assert_array_equal(winners(table, 4), [7])


@pytest.mark.parametrize("mesh", [{"head": 3}, {"head": 2, "data": 2}], ids=str)
def test_predictions_are_those_of_the_scores(mesh):
  run = tiny.build(sizes=(3, 1, 2), **mesh)
  state = tiny.steps(run, run_lib.start(run), 2, 6)
  images = run.dataset.test_images
  parts = run.mesh, run.dataset, run.objective, run.loss
  found = jax.jit(scoring.class_scores(*parts))(
    run.whole(state.bank),
    tiny.feed(run, 2).task,
    sharding.replicated(images[: len(images) // 2 * 2], run.mesh),
  )
  table = np.asarray(found).reshape(len(found), -1)
  # Head 1 has one class and head 2 two, of three columns each.
  classes = np.full((table.shape[1] // 3, 3), -1)
  for c in range(6):
    classes[run.stream.head_of[c], run.stream.column_of[c]] = c
  want = classes.reshape(-1)[table.argmax(1)]
  assert len(set(want.tolist())) > 1
  predict = phases.predictor(run, state, 2)
  np.testing.assert_array_equal(predict(images)[: len(want)], want)


def test_a_winner_takes_two_numbers_an_image():
  run = tiny.build(head=4, sizes=(2, 1, 1, 2))
  parts = run.mesh, run.dataset, run.objective, run.loss
  bank, task = run_lib.start(run).bank, tiny.feed(run, 3).task
  images = sharding.replicated(jnp.zeros((8, 2, 2, 1), jnp.uint8), run.mesh)

  def sent(program):
    compiled = jax.jit(program).lower(bank, task, images).compile()
    found = sharding.collectives(compiled, run.mesh)
    return sorted((c.kind, c.bytes) for c in found)

  assert sent(scoring.winner(*parts)) == [("all-reduce", 4 * 8)] * 2
  # The control: all scores, of two columns and four heads.
  assert sum(b for _, b in sent(scoring.class_scores(*parts))) == 8 * 8 * 4
