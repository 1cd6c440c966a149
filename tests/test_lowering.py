"""What is lowered without devices is the program that runs train with."""

import re

import jax
import pytest

from experiments import lowering, setups
from mhil import inputs, losses, networks, phases, sharding
from mhil import run as run_lib

SMALL = setups.Setup(
  "small mlp",
  lambda logits: networks.mlp(192, logits, (16,), axis="data"),
  side=8,
  batch=8,
  samples=160,
)


def arguments(run):
  """What the loop hands to a step."""
  feed = phases.open_phase(run, run.phases[0])
  epoch = inputs.batches(run, feed, 0)
  return lowering.Given(run_lib.start(run), epoch, feed.task, run.train_set)


def shapes(tree):
  def shape(x):
    # `P(None, "head")` may be written with None for the other axes.
    spec = [*x.sharding.spec, *[None] * x.ndim][: x.ndim]
    return x.shape, x.dtype, spec, dict(x.sharding.mesh.shape)

  return jax.tree.map(shape, tree)


def program(compiled):
  """A program's text without the lines of source that it came from.

  Nor whether XLA was free to lay out the results: without devices jax pins
  them where they would have come to lie.
  """
  text = re.sub(r", metadata={[^}]*}", "", compiled.as_text())
  text = re.sub(r", allow_spmd_sharding_\w+_to_output={[^}]*}", "", text)
  head, _, rest = text.partition("\n")
  _, start, body = rest.partition("\n%")  # after the tables of source files
  assert len(body) > 1000
  return head + start + body


def compiled(lowered, devices):
  found = tuple(jax.devices()[:devices])
  return lowered.compile(device_assignment=found)


@pytest.mark.parametrize("heads, devices", [(4, 4), (3, 2)])
def test_shapes_are_those_of_a_run(heads, devices):
  run = setups.build(SMALL, heads, devices=devices)
  parts = setups.parts(SMALL, heads, losses.dce())
  given = lowering.given(parts, lowering.abstract_mesh(devices))
  assert shapes(given) == shapes(arguments(run))


@pytest.mark.parametrize("kind", setups.KINDS)
def test_the_step_is_that_of_a_run(kind):
  """Instruction by instruction, and in what it costs."""
  loss = setups.KINDS[kind]
  run = setups.build(SMALL, 4, devices=4, loss=loss)
  parts = setups.parts(SMALL, 4, loss)
  mine = compiled(lowering.step(parts, 4), 4)
  assert program(mine) == program(run.step)
  assert mine.cost_analysis() == run.step.cost_analysis()


def test_another_loss_is_another_program():
  """The control of the test above."""
  run = setups.build(SMALL, 4, devices=4)
  parts = setups.parts(SMALL, 4, losses.distributed_ce())
  assert program(compiled(lowering.step(parts, 4), 4)) != program(run.step)


def test_lowering_takes_no_device():
  assert len(jax.devices()) < 1000
  parts = setups.parts(SMALL, 1000, losses.dce())
  lowered = lowering.step(parts, 1000)
  assert "num_partitions = 1000" in lowered.as_text()
  with pytest.raises(ValueError, match="1000 devices, 8 cpu devices are there"):
    lowering.cost(lowered, 1000)


def test_a_device_has_its_share():
  """A device's state is that of its heads, besides the step's number."""
  parts = setups.parts(SMALL, 4, losses.dce())
  spread, alone = (
    lowering.on_a_device(lowering.given(parts, lowering.abstract_mesh(n)).state)
    for n in (4, 1)
  )
  assert alone - 4 == 4 * (spread - 4)
  numbers = 192 * 16 + 16 + 16 * 3 + 3
  # Parameters and two moments; Adam's count, the loss and the first bad step.
  assert spread - 4 == 4 * (3 * numbers + 3)


def test_a_mesh_without_devices_has_the_axes_of_one_with_devices():
  abstract, real = lowering.abstract_mesh(4), sharding.make_mesh(head=4)
  for name in "shape", "axis_names", "axis_types":
    assert getattr(abstract, name) == getattr(real, name)
