"""Programs of a run, lowered on a mesh that has no devices.

`prepare.build` makes arrays and hands them to the step; here they are shapes
and the mesh is abstract, so that any number of heads takes no memory. XLA:CPU
compiles for devices only, so what was lowered is then given simulated ones, as
many as the mesh has places. Nothing runs.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from experiments import measure, setups
from mhil import bank as bank_lib
from mhil import heads, programs, sharding, transforms
from mhil import run as run_lib

P = jax.P
WHOLE = P()
Tree = Any


class Given(NamedTuple):
  """The arguments of a step, `jax.ShapeDtypeStruct` in place of arrays."""

  state: programs.State
  epoch: programs.Epoch
  task: bank_lib.Task
  samples: programs.Samples


def abstract_mesh(devices: int) -> AbstractMesh:
  """The mesh of `sharding.make_mesh(head=devices)` without its devices."""
  sizes = tuple(devices if axis == "head" else 1 for axis in sharding.AXES)
  kinds = (jax.sharding.AxisType.Explicit,) * len(sizes)
  return AbstractMesh(sizes, sharding.AXES, axis_types=kinds)


def given(parts: setups.Parts, mesh: AbstractMesh) -> Given:
  """What a run of these parts hands to its step, on this mesh."""

  def shape(sizes: tuple[int, ...], dtype: Any, spec: P = WHOLE):
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

  number, classes = shape((), jnp.int32), parts.dataset.classes
  key = shape((), jax.random.key(0).dtype)
  count = len(parts.stream.heads)
  numbers = bank_lib.numbers(range(count), count, mesh)
  fresh = heads.initializer(
    parts.objective, parts.recipe.optimizer, numbers, mesh
  )
  bank = jax.tree.map(
    lambda x: shape(x.shape, x.dtype, bank_lib.SPEC),
    jax.eval_shape(jax.jit(fresh), key),
  )
  valid = *numbers.shape, parts.stream.head_width
  images, batch = parts.dataset.train_images, parts.recipe.batch
  return Given(
    programs.State(number, bank, ()),
    programs.Epoch(shape((-(-len(images) // batch), batch), jnp.int32), number),
    bank_lib.Task(
      *(number, number, number, shape((), jnp.bool_)),
      shape((classes,), jnp.float32),
      shape(numbers.shape, jnp.int32, bank_lib.SPEC),
      shape(valid, jnp.bool_, bank_lib.SPEC),
    ),
    programs.Samples(
      shape(images.shape, images.dtype),
      shape((len(images),), jnp.int32),
      shape((classes,), jnp.int32),
      shape((classes,), jnp.int32),
      key,
    ),
  )


def step(parts: setups.Parts, devices: int) -> jax.stages.Lowered:
  """The training step of `assembly.whole`, lowered without a device."""
  mesh, recipe = abstract_mesh(devices), parts.recipe
  program = programs.train_step(
    mesh,
    parts.dataset,
    parts.objective,
    parts.loss,
    recipe.optimizer,
    run_lib.rate_of(recipe),
    recipe.train_heads,
    transforms.none(parts.dataset.classes),
    recipe.correction,
    recipe.streamed,
  )
  traced = jax.jit(program, donate_argnums=0).trace(*given(parts, mesh))
  return traced.lower(lowering_platforms=("cpu",))


def inference(
  parts: setups.Parts, devices: int, way: Any, batch: int
) -> jax.stages.Lowered:
  """Scores of a batch of images, lowered without a device.

  Args:
    parts: of the run.
    devices: places of the mesh.
    way: `(mesh, dataset, objective, loss) -> program`, as in `scoring`.
    batch: number of images.
  """
  mesh = abstract_mesh(devices)
  program = way(mesh, parts.dataset, parts.objective, parts.loss)
  state, _, task, samples = given(parts, mesh)
  images = jax.ShapeDtypeStruct(
    (batch, *samples.images.shape[1:]),
    samples.images.dtype,
    sharding=samples.images.sharding,
  )
  traced = jax.jit(program).trace(state.bank, task, images)
  return traced.lower(lowering_platforms=("cpu",))


def cost(lowered: jax.stages.Lowered, devices: int) -> dict[str, float]:
  """`measure.of_program` of what XLA makes of it for so many devices."""
  mesh = sharding.make_mesh(head=devices)
  assignment = tuple(mesh.devices.flat)
  compiled = lowered.compile(device_assignment=assignment)
  return measure.of_program(compiled, sharding.collectives(compiled, mesh))


def on_a_device(tree: Tree) -> int:
  """Bytes of one device's share of shapes that lie on a mesh."""
  shares = jax.tree.map(
    lambda x: (
      math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    ),
    tree,
  )
  return sum(jax.tree.leaves(shares))
