"""From a configuration to the library's parts; knows all the methods."""

import dataclasses
import math
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from mhil import (
  blocks,
  cutting,
  data,
  losses,
  networks,
  objectives,
  optimizers,
  partitions,
  prepare,
  rehearsal,
  sharding,
  streams,
  subnets,
  transforms,
  validation,
)
from mhil import config as config_lib
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
  transform: transforms.Transform
  partition: partitions.Partition


def parts(config: config_lib.Config) -> Parts:
  """Builds every part.

  Raises:
    ValueError: names the field, its value and the fix.
  """
  validation.validate(config)
  sharding.simulate(min(devices(config.mesh), SIMULATED))
  dataset = data.load(
    config.data.name,
    folder=config.data.folder or None,
    image=config.data.image,
    label=config.data.label,
    limit=config.data.limit or None,
    stream=config.data.streamed,
    augment=config.data.augment,
  )
  stream = make_stream(config.stream, dataset.classes)
  mesh = make_mesh(config.mesh, len(stream.tasks))
  recipe = make_recipe(config)
  transform = make_memory(config, mesh, dataset)
  prepare.check(mesh, stream, dataset, recipe, transform.size)
  branch = make_branch(config.network, dataset, stream.head_width + 1)
  objective = objectives.end_to_end(branch)
  partition = partitions.NONE
  if mesh.shape["subnet"] > 1:
    branch, part, cut = make_cut(config, branch, dataset, stream)
    objective = objectives.end_to_end(branch)
    partition = make_partition(config.subnets, part, cut)
    how = config.subnets.statistics
    objective = subnets.tested(objective, branch, how)
  prepare.check_parts(mesh, recipe, transform, partition)
  loss = make_loss(config.loss)
  lot = mesh, stream, dataset, objective, loss, recipe, transform
  return Parts(*lot, partition)


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
  how: dict[str, Any] = {"norm": network.norm, "dtype": network.dtype}
  how["axis"] = "data"
  if network.name == "mlp":
    how["output_norm"] = network.output_norm
    return networks.mlp(math.prod(shape), outputs, network.widths, **how)
  if network.name == "convnet":
    return networks.convnet(shape, outputs, network.widths, **how)
  if network.name.startswith("resnet18"):
    how["stem"] = 7 if network.name == "resnet18_imagenet" else 3
    return networks.resnet18(outputs, channels=shape[-1], **how)
  depth: Any = network.blocks
  if network.name == "resnet":
    how["widths"] = network.widths
  else:
    depth = int(network.name.removeprefix("resnet"))
  return networks.resnet_cifar(depth, outputs, channels=shape[-1], **how)


def make_cut(
  config: config_lib.Config,
  branch: networks.Branch,
  dataset: data.Dataset,
  stream: streams.Stream,
) -> tuple[networks.Branch, networks.Branch, cutting.Cut]:
  """The branch as tests see it, the branch of one part, and the cut."""
  network, n = config.network, config.mesh.subnet
  if config.subnets.method != "ist":
    return branch, branch, cutting.copies(n)
  if network.name in validation.RESNETS:
    cut = blocks.sections(branch, n, config.subnets.dealt)
    whole = blocks.scaled(branch, cut) if config.subnets.scale else branch
    return whole, blocks.subnet(branch, cut), cut
  if network.name != "mlp":
    raise ValueError(
      f"network.name={network.name} has nothing to cut into mesh.subnet={n}; "
      "use network.name=mlp or a resnet, or subnets.method=local_sgd"
    )
  cut = subnets.neurons(network.widths, n)
  small = dataclasses.replace(
    network, widths=tuple(width // n for width in network.widths)
  )
  return branch, make_branch(small, dataset, stream.head_width + 1), cut


def make_partition(
  s: config_lib.Subnets, part: networks.Branch, cut: cutting.Cut
) -> partitions.Partition:
  """How a branch falls into parts that are trained apart."""
  return subnets.partition(
    cut,
    objectives.end_to_end(part),
    every=s.local_steps,
    method=s.method,
    renew=s.renew,
    deal=s.state == "deal",
  )


def make_loss(loss: config_lib.Loss) -> losses.Loss:
  """The loss that every head pays."""
  if loss.name == "dce":
    return losses.dce(loss.reference, loss.smoothing)
  make = losses.ce if loss.name == "ce" else losses.distributed_ce
  return make(loss.smoothing)


def make_memory(
  config: config_lib.Config, mesh: Mesh, dataset: data.Dataset
) -> transforms.Transform:
  """What is remembered of samples that have passed."""
  m = config.memory
  if m.size <= 0:
    return transforms.none(dataset.classes)
  return rehearsal.transform(
    mesh,
    dataset,
    size=m.size,
    batch=config.train.batch,
    draws=m.draws,
    candidates=m.candidates,
    policy=m.policy,
    selection=m.selection,
    scope=m.scope,
    place=m.place,
  )


def make_optimizer(
  optimizer: config_lib.Optimizer, epochs: int
) -> tuple[optax.GradientTransformation, optimizers.Rate]:
  """The optimiser of unit rate, and the rate over a task."""
  o = optimizer
  decay: dict[str, Any] = {"decay_norm": o.decay_norm, "clip": float(o.clip)}
  unit = (
    optimizers.adam(float(o.weight_decay), **decay)
    if o.name == "adam"
    else optimizers.sgd(float(o.momentum), float(o.weight_decay), **decay)
  )
  base = float(o.learning_rate)
  if o.schedule == "steps":
    shares = [percent / 100 for percent in o.percents] or float(o.factor)
    rate = optimizers.steps(base, o.milestones, shares, epochs=epochs)
  else:
    make = optimizers.cosine if o.schedule == "cosine" else optimizers.constant
    rate = make(base)
  if o.warm_up:
    rate = optimizers.warm_up(rate, o.warm_up, epochs=epochs)
  return unit, rate


def make_recipe(config: config_lib.Config) -> Recipe:
  """The plain numbers of `recipe.Recipe`."""
  t = config.train
  optimizer, rate = make_optimizer(config.optimizer, t.epochs)
  auto = t.train_heads != "new"
  return Recipe(
    optimizer=optimizer,
    rate=rate,
    epochs=t.epochs,
    batch=t.batch,
    train_heads=t.train_heads,
    correction={"on": True, "off": False, "auto": auto}[config.loss.correction],
    cumulative=config.memory.size < 0,
    balanced_epochs=t.balanced_epochs,
    balanced_rate=optimizers.constant(float(t.balanced_rate)),
    from_scratch=t.from_scratch,
    streamed=config.data.streamed,
    log_every=t.log_every,
  )
