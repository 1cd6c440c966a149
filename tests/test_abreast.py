"""Stages at once on devices of their own: equal numbers, audit, bytes."""

import functools

import jax
import numpy as np
import pytest

from mhil import (
  abreast,
  auxnet,
  chain,
  coupling,
  guessing,
  layer_parallel,
  losses,
  networks,
  optimizers,
  phases,
  prepare,
  sharding,
  stage_steps,
  stages,
  trainer,
)
from mhil.recipe import Recipe
from tests import tiny

RECIPE = Recipe(
  optimizer=optimizers.sgd(), epochs=1, batch=8, log_every=4, train_heads="all"
)


METHOD = coupling.Method(beta=0.3, eta=2.0, corrections=2)
# Every stage gets credit, from true states.
SWEPT = METHOD._replace(sweeps=2, corrections=3)


@functools.cache
def objective(count=3, method=METHOD, multipliers="none"):
  branch = networks.mlp(4, 3, hidden=(6, 6), norm="batch", axis="data")
  cut = chain.chain(branch, (2, 2, 1), count)
  # Layer norm of a single unit is a constant, and then batch norm of a guess is
  # its rounding, which gates the stage above differently in each program.
  aux = auxnet.auxnet(cut, cost=3.0, multipliers=multipliers == "network")
  assert min(aux.widths, default=2) > 1
  guesser = guessing.by_network(aux, cut, multipliers=multipliers)
  whole = layer_parallel.layer_parallel(cut, guesser, method)
  how = {"chain": cut, "guesser": guesser, "method": method}
  return whole._replace(spread=functools.partial(abreast.spread, **how)), cut


def run_of(stage=1, data=1, head=1, count=3, recipe=RECIPE, loss="dce", **how):
  learn, _ = objective(count, **how)
  mesh = sharding.make_mesh(stage=stage, data=data, head=head)
  loss = getattr(losses, loss)()
  parts = mesh, tiny.stream(), tiny.dataset(), learn, loss, recipe
  return prepare.build(*parts, 0)


@functools.cache
def staged():
  return run_of(stage=3, multipliers="network")


@functools.cache
def swept():
  return run_of(stage=3, method=SWEPT)


@functools.cache
def trained():
  return trainer.fit(staged())


def whole(result, run):
  bank = run.whole(result.state.bank)
  stats = {name: own for name, own in bank.stats.items() if own}
  return jax.tree.map(np.asarray, (bank.params, stats))


def close(a, b):
  # The same products, fused differently; SGD at a rate of 1e-3.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b
  )


@pytest.mark.slow
def test_stages_at_once_come_to_the_numbers_of_one_device():
  one, apart = run_of(multipliers="network"), staged()
  first, second = trainer.fit(one), trained()
  close(whole(first, one), whole(second, apart))
  history = [np.array(r.progress.history, float) for r in (first, second)]
  np.testing.assert_allclose(*history, rtol=1e-4)
  for a, b in zip(first.progress.tallies, second.progress.tallies):
    for x, y in zip(a, b):
      np.testing.assert_array_equal(x, y)
  probes = first.progress.probes, second.progress.probes
  assert probes[0][0].keys() == probes[1][0].keys()
  images = tiny.dataset().test_images[:4]
  np.testing.assert_array_equal(first.predict(images), second.predict(images))


@pytest.mark.slow
def test_sweeps_at_once_come_to_the_numbers_of_one_device():
  one, apart = run_of(method=SWEPT), swept()
  first, second = trainer.fit(one), trainer.fit(apart)
  close(whole(first, one), whole(second, apart))
  # The control: without sweeps the weights are others.
  other = trainer.fit(run_of(method=SWEPT._replace(sweeps=0)))
  with pytest.raises(AssertionError):
    close(whole(other, one), whole(second, apart))


@pytest.mark.slow
def test_the_penalty_and_both_other_axes_too():
  one, apart = run_of(count=2), run_of(stage=2, data=2, head=2, count=2)
  first, second = trainer.fit(one), trainer.fit(apart)
  flat = []
  for result, run in (first, one), (second, apart):
    params, _ = whole(result, run)
    flat.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:3], params))
  close(*flat)


@pytest.mark.slow
def test_no_program_of_a_stage_holds_a_collective():
  run = staged()
  # begin; guess, look, run, mend and learn where there is something to do. The
  # last stage runs at once.
  assert len(run.programs) == 1 + 2 + 2 + 3 + 2 + 2
  assert run.traffic == []


def on_their_own_devices(run, method):
  """That no program can reach another stage, as none is compiled for it."""
  meshes = stages.meshes(run.grid)
  names = stage_steps.names(method, len(meshes))
  for (_, k), program in zip(names, run.programs, strict=True):
    given, _ = program.input_shardings
    for where in jax.tree.leaves((given, program.output_shardings)):
      assert where.device_set == set(meshes[k].devices.flat)
  everywhere = [d for mesh in meshes for d in mesh.devices.flat]
  assert len(everywhere) == len(set(everywhere)) == run.grid.size


@pytest.mark.slow
def test_a_program_has_the_devices_of_its_stage_alone():
  on_their_own_devices(staged(), METHOD)
  on_their_own_devices(swept(), SWEPT)


@pytest.mark.slow
def test_collectives_over_data_are_gradients_and_none_spans_stage():
  run = run_of(stage=2, data=2, count=2)
  assert run.traffic
  assert {c.axes for c in run.traffic} == {("data",)}
  on_their_own_devices(run, METHOD)


@pytest.mark.parametrize(
  "make, method, multipliers, by_hand",
  [
    # Two passes of stages 0 and 1, one of stage 2; and a multiplier.
    (staged, METHOD, True, (2 + 2 + 1, 2 + 1 + 1)),
    # Three, two and one; and two sweeps.
    (swept, SWEPT, False, (3 + 2 + 2, 2 + 1 + 2)),
  ],
)
def test_exchanged_bytes_are_those_of_the_formula(
  monkeypatch, make, method, multipliers, by_hand
):
  run, (_, cut) = make(), objective(3)
  moved = np.zeros((3, 3), int)
  where = {m.devices.flat[0]: k for k, m in enumerate(stages.meshes(run.grid))}
  send = stages.send

  def counting(tree, mesh):
    for leaf in jax.tree.leaves(tree):
      a = where[next(iter(leaf.sharding.device_set))]
      b = where[mesh.devices.flat[0]]
      # States and multipliers are `[l, h, b, f]`, of three heads here.
      if leaf.ndim == 4 and leaf.shape[:3] == (3, 1, 8):
        moved[a, b] += leaf.nbytes // 3
    return send(tree, mesh)

  feed = phases.open_phase(run, run.phases[0])
  given = tiny.inputs.batches(run, feed, 0), feed.task, run.train_set
  state = prepare.start(run)
  monkeypatch.setattr(stages, "send", counting)
  run.step(state, *given)
  want = abreast.exchanged(cut, 8, method, multipliers)
  # Six float32 of each of eight samples.
  assert want == [4 * 8 * 6 * copies for copies in by_hand]
  both = moved + moved.T
  assert [both[0, 1], both[1, 2]] == want
  assert both[0, 2] == 0


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
  from mhil import checkpoint

  run = staged()
  want = whole(trained(), run)
  count = iter(range(100))
  with checkpoint.Checkpoints(tmp_path / "saves") as saves:
    trainer.fit(run, checkpoints=saves, stop=lambda: next(count) == 6)
  with checkpoint.Checkpoints(tmp_path / "saves") as saves:
    result = trainer.fit(run, checkpoints=saves, resume=True)
  jax.tree.map(np.testing.assert_array_equal, whole(result, run), want)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"count": 2}, "mesh.stage=3 does not fit 2 stages"),
    ({"method": coupling.Method(serial_every=2)}, "serial_every=2 runs the"),
    (
      {"recipe": RECIPE._replace(train_heads="readout")},
      "train.train_heads=readout trains on features",
    ),
    ({"loss": "ce"}, "loss.name=ce asks for the logits of all heads"),
  ],
)
def test_what_needs_the_whole_branch_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    run_of(stage=3, **change)


@pytest.mark.parametrize("loss", ["ce", "distributed_ce"])
def test_losses_that_couple_heads_are_refused_on_one_device_too(loss):
  """They would share a normaliser of true logits, not of guessed ones."""
  with pytest.raises(ValueError, match=r"other than dce .* use loss.name=dce"):
    run_of(loss=loss)


def test_what_is_kept_by_sample_is_refused():
  _, cut = objective(3)
  method = coupling.Method()
  guesser = guessing.by_sample(cut, 9, multipliers=False)
  with pytest.raises(ValueError, match=r"mesh.stage=3 does not; use"):
    abreast.spread(
      staged(),
      sharding.make_mesh(stage=3),
      chain=cut,
      guesser=guesser,
      method=method,
    )
