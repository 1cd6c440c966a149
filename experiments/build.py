"""From a configuration to the library's parts; knows all the methods."""

import functools
import math
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh

from experiments import build_layers, build_subnets
from mhil import (
  alone,
  cuts,
  data,
  frozen,
  local,
  losses,
  modules,
  networks,
  objectives,
  optimizers,
  partitions,
  prepare,
  rehearsal,
  relay,
  room,
  sharding,
  stages,
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


def parts(config: config_lib.Config, processes: int = 1) -> Parts:
  """Builds every part.

  Args:
    config: of the run.
    processes: that share its devices.

  Raises:
    ValueError: names the field, its value and the fix.
  """
  validation.validate(config)
  sharding.simulate(min(-(-devices(config.mesh) // processes), SIMULATED))
  dataset = data.load(
    config.data.name,
    folder=config.data.folder or None,
    image=config.data.image,
    label=config.data.label,
    limit=config.data.limit or None,
    whole_test=config.data.whole_test,
    stream=config.data.streamed,
    augment=config.data.augment,
  )
  stream = make_stream(config.stream, dataset.classes, config.network.fixed)
  mesh = make_mesh(config.mesh, len(stream.tasks))
  recipe = make_recipe(config)
  # The memory is where a step begins.
  transform = make_memory(config, stages.meshes(mesh)[0], dataset)
  prepare.check(mesh, stream, dataset, recipe, transform.size)
  branch = branch_of(config, dataset, stream)
  objective = make_objective(config, branch, dataset)
  partition = partitions.NONE
  if config.mesh.subnet > 1:
    outputs = stream.head_width + 1
    make = functools.partial(make_branch, dataset=dataset, outputs=outputs)
    objective, partition = build_subnets.parted(config, branch, make)
  prepare.check_parts(mesh, recipe, transform, partition)
  loss = make_loss(config.loss)
  alone.check(config.heads, mesh, stream, loss, transform)
  network, held = config.network, len(config.heads) or len(stream.heads)
  told = f"network.name={network.name} with network.widths={network.widths}"
  room.check_heads(mesh, objective, recipe.optimizer, held, told)
  lot = mesh, stream, dataset, objective, loss, recipe, transform
  return Parts(*lot, partition)


def end_to_end(config: config_lib.Config, parts: Parts) -> objectives.Objective:
  """Back-propagation through the branch of a configuration's parts."""
  return objectives.end_to_end(branch_of(config, parts.dataset, parts.stream))


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


def make_stream(
  stream: config_lib.Stream, classes: int, fixed: bool
) -> streams.Stream:
  """The stream; `order_seed` -1 keeps the classes in their own order."""
  return streams.class_incremental(
    classes,
    base=stream.base or None,
    increment=stream.increment,
    sizes=stream.sizes or None,
    order=stream.order or None,
    order_seed=None if stream.order_seed < 0 else stream.order_seed,
    fixed=fixed,
  )


def branch_of(
  config: config_lib.Config, dataset: data.Dataset, stream: streams.Stream
) -> networks.Branch:
  """The branch of one head as a run has it, its classifier frozen or not."""
  branch = make_branch(config.network, dataset, stream.head_width + 1)
  return frozen.frozen(branch, config.network.reads)


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


def make_objective(
  config: config_lib.Config, branch: networks.Branch, dataset: data.Dataset
) -> objectives.Objective:
  """How one branch learns."""
  if config.objective.name == "end_to_end":
    objective = objectives.end_to_end(branch)
    return subnets.tested(objective, branch, config.subnets.statistics)
  if config.objective.name == "layer_parallel":
    return build_layers.make(config.layer_parallel, branch, dataset)
  cut = make_split(config.local, branch, dataset)
  objective, count = local.local(cut), config.mesh.stage
  if count == 1:
    return objective
  parts = local.stages(cut, dataset.train_images.shape[1:], count)
  spread = functools.partial(relay.spread, parts=parts)
  return objective._replace(spread=spread)


def make_split(
  o: config_lib.Local, branch: networks.Branch, dataset: data.Dataset
) -> modules.Split:
  """The branch in modules; `local.cuts` are numbers of its pieces."""
  shape = dataset.train_images.shape[1:]
  method = modules.Method(
    mode=o.mode,
    classifier=o.classifier,
    loss=o.loss,
    restore=(float(o.restore_first), float(o.restore_last)),
    task=(float(o.task_first), float(o.task_last)),
    pixels=(dataset.mean, dataset.std),
    isolated=o.isolated,
  )
  trunk = branch.pieces[:-1]
  if not all(0 <= cut < len(trunk) for cut in o.cuts):
    raise ValueError(
      f"local.cuts={o.cuts} is not inside {branch.name}; use numbers from 0 to "
      f"{len(trunk) - 1}, which stand for {', '.join(trunk)}"
    )
  where = tuple(trunk[cut] for cut in o.cuts)
  if not where and o.lists == "measured":
    where = cuts.measured(branch, shape, o.modules)
  elif not where:
    where = cuts.published(branch.name, o.modules, o.lists == "balanced")
  return modules.split(branch, shape, where, method)


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
    else optimizers.sgd(
      float(o.momentum), float(o.weight_decay), o.nesterov, **decay
    )
  )
  base = float(o.learning_rate)
  if o.schedule == "epoch_cosine":
    # Its warm-up is its own.
    return unit, optimizers.epoch_cosine(base, epochs, warm_up=o.warm_up)
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
