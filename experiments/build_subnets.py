"""From a configuration to branches that train in parts along `subnet`."""

import dataclasses
from collections.abc import Callable

from mhil import (
  blocks,
  cutting,
  limits,
  networks,
  objectives,
  partitions,
  subnets,
)
from mhil import config as config_lib

Make = Callable[[config_lib.Network], networks.Branch]


def parted(
  config: config_lib.Config, branch: networks.Branch, make: Make
) -> tuple[objectives.Objective, partitions.Partition]:
  """The objective of whole branches, and how they fall into parts.

  Args:
    config: with `mesh.subnet` above 1.
    branch: whole.
    make: a branch for the same images and outputs.

  Raises:
    ValueError: for what cannot be cut.
  """
  s = config.subnets
  if config.objective.name != "end_to_end":
    raise ValueError(
      f"objective.name={config.objective.name} cuts a branch that mesh.subnet="
      f"{config.mesh.subnet} cuts too; use objective.name=end_to_end"
    )
  branch, part, cut = cut_of(config, branch, make)
  partition = subnets.partition(
    cut,
    objectives.end_to_end(part),
    every=s.local_steps,
    method=s.method,
    renew=s.renew,
    deal=s.state == "deal",
  )
  objective = objectives.end_to_end(branch)
  return subnets.tested(objective, branch, s.statistics), partition


def cut_of(
  config: config_lib.Config, branch: networks.Branch, make: Make
) -> tuple[networks.Branch, networks.Branch, cutting.Cut]:
  """The branch as tests see it, the branch of one part, and the cut."""
  network, n = config.network, config.mesh.subnet
  if config.subnets.method != "ist":
    return branch, branch, cutting.copies(n)
  if network.name in limits.RESNETS:
    cut = blocks.sections(branch, n, config.subnets.dealt)
    whole = blocks.scaled(branch, cut) if config.subnets.scale else branch
    return whole, blocks.subnet(branch, cut), cut
  if network.name != "mlp":
    raise ValueError(
      f"network.name={network.name} has nothing to cut into mesh.subnet={n}; "
      "use network.name=mlp or a resnet, or subnets.method=local_sgd"
    )
  cut = subnets.neurons(network.widths, n)
  widths = tuple(width // n for width in network.widths)
  return branch, make(dataclasses.replace(network, widths=widths)), cut
