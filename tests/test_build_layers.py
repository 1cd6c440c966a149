"""Layer-parallel configurations: what is built, refused and told."""

import functools

import jax
import numpy as np
import pytest

from experiments import (
  build,
  build_layers,
  compare,
  layers_table,
  pace,
  suites,
  workdir,
)
from mhil import config as config_lib
from mhil import (
  losses,
  networks,
  objectives,
  prepare,
  sharding,
  trainer,
  validation,
)
from tests import test_abreast, tiny


def config(**changes):
  made = config_lib.Config()
  made.objective.name = "layer_parallel"
  made.network.widths = (8, 8)
  for field, value in changes.items():
    config_lib.assign(made, field.replace("__", "."), value)
  return made


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      {"layer_parallel__stages": 2, "objective__name": "end_to_end"},
      "cut nothing with objective.name=end_to_end; use",
    ),
    (
      {"layer_parallel__stages": 2, "layer_parallel__cuts": (1,)},
      "both say where to cut; use layer_parallel.stages=1",
    ),
    ({"loss__name": "ce"}, "loss.name=ce couples the heads, which a stage"),
    ({"layer_parallel__method": "admm"}, "is not known; use one of penalty"),
    ({"layer_parallel__beta": -1.0}, "layer_parallel.beta=-1.0 is out of"),
    ({"layer_parallel__beta": float("inf")}, "layer_parallel.beta=inf is out"),
    ({"layer_parallel__corrections": 0}, "layer_parallel.corrections=0 is out"),
    (
      {
        "layer_parallel__method": "lagrangian",
        "layer_parallel__states": "sample",
      },
      "multipliers=network has no network with layer_parallel.states=sample",
    ),
  ],
)
def test_configurations_that_cannot_be_meant(changes, words):
  with pytest.raises(ValueError, match=words):
    validation.validate(config(**changes))


def dataset(pad):
  return tiny.dataset(6, shape=(4, 4, 1))._replace(pad=pad)


def make(pad=0, **fields):
  made = config(**{f"layer_parallel__{k}": v for k, v in fields.items()})
  data = dataset(pad)
  branch = build.make_branch(made.network, data, 3)
  return build_layers.make(made.layer_parallel, branch, data)


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"stages": 4}, "layer_parallel.stages=4 are more than the 3 pieces"),
    ({"beta": 0.0}, "layer_parallel.beta=0.0 is not positive; use"),
    ({"eta": 0.0}, "layer_parallel.eta=0.0 is not positive; use"),
    ({"eta": 0.0}, "for a control layer_parallel.correction=off"),
  ],
)
def test_methods_that_cannot_be_meant(fields, words):
  with pytest.raises(ValueError, match=words):
    make(**{"stages": 2, "cost": 0.9} | fields)


@pytest.mark.parametrize(
  "fields, named",
  [
    ({"method": "lagrangian", "multipliers": "sample"}, "multipliers"),
    ({"states": "sample"}, "states"),
  ],
)
def test_what_is_kept_by_sample_needs_samples_as_stored(fields, named):
  words = (
    rf"layer_parallel.{named}=sample .* use layer_parallel.{named}=network"
  )
  with pytest.raises(ValueError, match=words):
    make(2, stages=2, cost=0.9, **fields)
  assert make(0, stages=2, cost=0.9, **fields).name == "layer_parallel"


def test_tables_that_a_device_cannot_hold_are_refused():
  learn, mesh = make(stages=2, states="sample"), sharding.make_mesh(head=2)
  # 120 states of 8 floats, a mark for each; and a count of steps.
  size = 2 * (120 * (8 * 4 + 1) + 4)
  prepare.check_side(mesh, learn, 3, size)
  words = f"keeps {size:,} bytes by sample on a device of {size - 1:,}; use"
  with pytest.raises(ValueError, match=words):
    prepare.check_side(mesh, learn, 3, size - 1)


def test_the_penalty_has_no_multipliers_to_keep():
  learn = make(2, stages=2, cost=0.9, multipliers="sample")
  _, _, side = jax.eval_shape(learn.init, jax.random.key(0))
  assert side["multipliers"] == []


def test_facts_say_what_a_step_costs():
  facts = make(stages=3, cost=0.9).facts
  assert [len(names) for names in facts["stages"]] == [1, 1, 1]
  assert 0 < facts["aux_share"] <= 0.9
  line = workdir.stages(facts, 1)
  assert "3 stages of" in line and "1 along mesh.stage" in line


@functools.cache
def finished():
  run = test_abreast.run_of(count=2)
  return run, trainer.fit(run)


@pytest.mark.slow
def test_statistics_are_settled_and_weights_are_not_touched():
  _, result = finished()
  learn, _ = test_abreast.objective(2)
  parts = sharding.make_mesh(), tiny.stream(), tiny.dataset()
  plain = learn._replace(settle=None, spread=None)
  other = prepare.build(*parts, plain, losses.dce(), test_abreast.RECIPE, 0)
  unsettled = trainer.fit(other)
  banks = result.state.bank, unsettled.state.bank
  jax.tree.map(np.testing.assert_array_equal, *(b.params for b in banks))
  first, second = (jax.tree.leaves(b.stats) for b in banks)
  assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(first, second))


@pytest.mark.slow
def test_a_run_of_stages_says_what_was_predicted_and_measured():
  run = test_abreast.run_of(stage=2, count=2)
  branch = networks.mlp(4, 3, hidden=(6, 6), norm="batch", axis="data")
  want = test_abreast.whole(trainer.fit(run), run)
  speed = pace.measured(run, objectives.end_to_end(branch))
  assert speed["measured"] == speed["serial_ms"] / speed["step_ms"] > 0
  assert speed["predicted"] == speed["serial_ms"] / speed["model_ms"] > 0
  text = pace.line({**speed, "predicted": 1.5, "measured": 1.3})
  assert text.endswith("predicted from its programs 1.50 x, measured 1.30 x")
  # The run is what it was.
  again = test_abreast.whole(trainer.fit(run), run)
  jax.tree.map(np.testing.assert_array_equal, again, want)


@pytest.mark.slow
def test_one_device_and_end_to_end_training_have_nothing_to_compare():
  branch = networks.mlp(4, 3, hidden=(6, 6), norm="batch", axis="data")
  serial = objectives.end_to_end(branch)
  assert pace.measured(finished()[0], serial) is None
  assert pace.measured(tiny.build(), serial) is None


@functools.cache
def remembering(place):
  """A run with a memory, in parts of a branch with batch norm."""
  learn, _ = test_abreast.objective(2)
  *parts, _, _, _, memory = tiny.parts(memory=tiny.Memory(place=place))
  recipe = test_abreast.RECIPE
  run = prepare.build(*parts, learn, losses.dce(), recipe, 0, memory)
  return trainer.fit(run)


@pytest.mark.slow
def test_statistics_are_settled_with_rows_on_the_host_too():
  device, host = (remembering(place) for place in ("device", "host"))
  banks = [result.state.bank for result in (device, host)]
  jax.tree.map(np.testing.assert_array_equal, *(b.stats for b in banks))
  # The control: without a memory they are others.
  _, other = finished()
  pairs = zip(
    jax.tree.leaves(banks[0].stats), jax.tree.leaves(other.state.bank.stats)
  )
  assert any(np.abs(a - b).max() > 1e-3 for a, b in pairs)


@pytest.mark.slow
def test_probes_are_those_of_the_test_and_of_the_guesses():
  _, result = finished()
  rows = result.progress.probes
  assert len(rows) == 3
  names = {"chain", "aux", "violation1"}
  want = {f"{when}/{n}" for when in ("collected", "settled") for n in names}
  assert all(set(row) == want for row in rows)
  # One head is open after the first task: its chain is what was tested.
  accuracy = result.metrics["accuracy_after_task"][0]
  assert rows[0]["settled/chain"] == pytest.approx(accuracy)
  text = layers_table.lines({"row": [result.metrics]})
  assert text[-1].startswith("| row | ")
  assert f"{100 * rows[-1]['settled/chain']:.1f}" in text[-1]


def test_a_run_without_guesses_has_no_line():
  metrics = {"probes": [{}]}
  assert not layers_table.lines({"end to end": [metrics]})[-1].startswith("| e")


@pytest.mark.parametrize(
  "suite", ["layer_parallel_readout", "layer_parallel_fashion"]
)
def test_suites_have_their_controls(suite):
  rows = suites.SUITES[suite]
  assert rows[0].overrides["objective.name"] == "end_to_end"
  field = "layer_parallel.correction"
  off = [row for row in rows if row.overrides.get(field) == "off"]
  assert off and all("control" in row.label for row in off)
  # Each is a row of the suite but for the correction.
  others = [row for row in rows if row not in off]
  for control in off:
    rest = {k: v for k, v in control.overrides.items() if k != field}
    assert [r for r in others if dict(r.overrides) == rest]


def test_each_number_of_stages_has_back_propagations_step_and_its_control():
  rows = suites.SUITES["layer_parallel_fashion"]
  fields = ("stages", "sweeps", "corrections", "correction")
  found = [
    [row.overrides.get(f"layer_parallel.{name}", "full") for name in fields]
    for row in rows
  ]
  for k in 2, 3, 4:
    assert [k, k - 1, k, "full"] in found and [k, k - 1, k, "off"] in found


def test_a_small_resnet_falls_into_all_stages_that_are_compared():
  data = tiny.dataset(10, shape=(28, 28, 1))
  for k in 2, 3, 4:
    row = compare.configure(
      suites.Row("", "layer_parallel_fashion", {"layer_parallel.stages": k}), 0
    )
    branch = build.make_branch(row.network, data, 11)
    facts = build_layers.make(row.layer_parallel, branch, data).facts
    assert len(facts["stages"]) == k and facts["aux_share"] <= 0.1
