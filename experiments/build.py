"""From a configuration to the library's parts; knows all the methods."""

from typing import NamedTuple

from jax.sharding import Mesh

from mhil import config as config_lib
from mhil import (
  data,
  losses,
  networks,
  objectives,
  optimizers,
  sharding,
  streams,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

# More threads in one process only make a mistyped mesh take minutes.
SIMULATED = 256


class Parts(NamedTuple):
  """The arguments of `trainer.train`, in its order."""

  mesh: Mesh
  stream: streams.Stream
  dataset: data.Dataset
  objective: objectives.Objective
  loss: losses.Loss
  recipe: Recipe


def parts(config: config_lib.Config) -> Parts:
  """Builds every part.

  Raises:
    ValueError: names the field, its value and the fix.
  """
  config_lib.validate(config)
  sharding.simulate(min(devices(config.mesh), SIMULATED))
  dataset = data.load(config.data.name, folder=config.data.folder or None)
  stream = make_stream(config.stream, dataset.classes)
  mesh = make_mesh(config.mesh, len(stream.tasks))
  recipe = make_recipe(config)
  run_lib.check(mesh, stream, dataset, recipe)
  branch = make_branch(config.network, dataset, stream.head_width + 1)
  objective = objectives.end_to_end(branch)
  loss = make_loss(config.loss)
  return Parts(mesh, stream, dataset, objective, loss, recipe)


def devices(mesh: config_lib.Mesh) -> int:
  """Devices that a mesh asks for."""
  return mesh.data * mesh.head * mesh.stage * mesh.subnet


def make_mesh(mesh: config_lib.Mesh, heads: int) -> Mesh:
  """The mesh; a device without any head would only be waste."""
  if mesh.head > heads:
    raise ValueError(
      f"mesh.head={mesh.head} is more than the stream's {heads} tasks, so "
      f"devices would hold no head; use mesh.head={heads} or less"
    )
  return sharding.make_mesh(
    data=mesh.data, head=mesh.head, stage=mesh.stage, subnet=mesh.subnet
  )


def make_stream(stream: config_lib.Stream, classes: int) -> streams.Stream:
  """The stream; `order_seed` -1 keeps the classes in their own order."""
  return streams.class_incremental(
    classes,
    base=stream.base or None,
    increment=stream.increment,
    sizes=stream.sizes or None,
    order=stream.order or None,
    order_seed=None if stream.order_seed < 0 else stream.order_seed,
  )


def make_branch(
  network: config_lib.Network, dataset: data.Dataset, outputs: int
) -> networks.Branch:
  """The branch of one head, for the data set's images."""
  shape = dataset.train_images.shape[1:]
  if network.name == "mlp":
    inputs = 1
    for size in shape:
      inputs *= size
    return networks.mlp(
      inputs, outputs, hidden=network.widths, norm=network.norm, axis="data"
    )
  return networks.convnet(
    shape, outputs, widths=network.widths, norm=network.norm, axis="data"
  )


def make_loss(loss: config_lib.Loss) -> losses.Loss:
  """The loss that every head pays."""
  if loss.name == "dce":
    return losses.dce(loss.reference)
  return losses.ce() if loss.name == "ce" else losses.distributed_ce()


def make_recipe(config: config_lib.Config) -> Recipe:
  """The plain numbers of `recipe.Recipe`."""
  o, t = config.optimizer, config.train
  schedules = {
    "constant": optimizers.constant,
    "cosine": optimizers.cosine,
  }
  auto = t.train_heads != "new"
  return Recipe(
    optimizer=optimizers.adam(o.weight_decay)
    if o.name == "adam"
    else optimizers.sgd(o.momentum, o.weight_decay),
    rate=schedules[o.schedule](o.learning_rate),
    epochs=t.epochs,
    batch=t.batch,
    train_heads=t.train_heads,
    correction={"on": True, "off": False, "auto": auto}[config.loss.correction],
    memory=None if config.memory.size < 0 else config.memory.size,
    from_scratch=t.from_scratch,
    log_every=t.log_every,
  )
