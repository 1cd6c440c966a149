"""What a configuration may hold, and the message where it does not."""

import dataclasses
from typing import Any

from mhil import config as config_lib
from mhil.limits import CHOICES, INF, KINDS, MOST, RANGE, RESNETS

# What can be cut along mesh.stage.
STAGED = ("local", "layer_parallel")


def validate(config: config_lib.Config) -> None:
  """Raises ValueError for the first field that cannot be meant.

  The message names the field, its value and the fix.
  """
  flat = config_lib.flatten(config_lib.to_dict(config))
  usual = config_lib.flatten(config_lib.to_dict(config_lib.Config()))
  for field, default in usual.items():
    _check_type(field, flat.get(field), default)
  for field, known in CHOICES.items():
    if flat[field] not in known:
      raise ValueError(
        f"{field}={flat[field]!r} is not known; use one of {', '.join(known)}"
      )
  for field, (least, most) in RANGE.items():
    # NaN, and infinity where there is no most, are refused too.
    top = most if most < INF else MOST[type(usual[field])]
    if not least <= flat[field] <= top:
      huge = most < INF or top < flat[field] < INF
      limit = f" to {top}" if huge else " or more"
      out = f"{field}={flat[field]} is out of range"
      raise ValueError(f"{out}; use {least}{limit}")
  _check_fixed(config)
  _check_stages(config)
  if config.optimizer.schedule == "steps" and not config.optimizer.milestones:
    raise ValueError(
      "optimizer.milestones=() makes optimizer.schedule=steps constant; name "
      "epochs such as (100, 120), or use optimizer.schedule=constant"
    )
  if config.network.name in RESNETS and config.network.norm == "none":
    raise ValueError(
      f"network.norm=none leaves network.name={config.network.name} without "
      "normalisation; use network.norm=batch or network.norm=group"
    )
  _check_network(config.network)
  _check_subnets(config)
  if not config.network.widths or min(config.network.widths) < 1:
    raise ValueError(
      f"network.widths={config.network.widths} is no network; use positive "
      "widths such as (64,)"
    )
  _check_local(config)
  _check_layer_parallel(config)
  _check_objective(config)


def _check_objective(config: config_lib.Config) -> None:
  name, statistics = config.objective.name, config.subnets.statistics
  if statistics != "running" and name != "end_to_end":
    raise ValueError(
      f"subnets.statistics={statistics} is not offered for objective.name="
      f"{name}; use subnets.statistics=running or objective.name=end_to_end"
    )
  if config.network.output_norm and name != "end_to_end":
    raise ValueError(
      f"network.output_norm=true is not part of objective.name={name}; use "
      "objective.name=end_to_end"
    )


def _check_stages(config: config_lib.Config) -> None:
  stage = config.mesh.stage
  if stage == 1:
    return
  if config.objective.name not in STAGED:
    raise ValueError(
      f"mesh.stage={stage} would do the same work several times, since nothing "
      f"is cut along it with objective.name={config.objective.name}; use "
      "mesh.stage=1"
    )
  if config.optimizer.clip:
    raise ValueError(
      f"optimizer.clip={config.optimizer.clip} asks for the norm of a whole "
      f"gradient, which mesh.stage={stage} holds in parts; use optimizer.clip=0"
    )


def _check_local(config: config_lib.Config) -> None:
  local = config.local
  cut = local.modules > 1 or bool(local.cuts)
  if cut and config.objective.name != "local":
    raise ValueError(
      f"local.modules={local.modules} and local.cuts={local.cuts} cut nothing "
      f"with objective.name={config.objective.name}; use objective.name=local"
    )
  if local.modules > 1 and local.cuts:
    raise ValueError(
      f"local.modules={local.modules} and local.cuts={local.cuts} both say "
      "where to cut; use local.modules=1 with local.cuts"
    )
  if local.cuts and local.lists != "published":
    raise ValueError(
      f"local.lists={local.lists} is not read with local.cuts={local.cuts}; "
      "use local.modules in place of local.cuts, or local.lists=published"
    )
  _check_unread(config)
  # Their normaliser is that of the heads' logits, not of an auxiliary one's.
  own = local.loss == "softmax" and local.isolated
  if cut and own and config.loss.name != "dce":
    raise ValueError(
      f"loss.name={config.loss.name} couples the heads, which an auxiliary "
      "classifier has no part in; use loss.name=dce or local.loss=contrast"
    )


def _check_unread(config: config_lib.Config) -> None:
  name, usual = config.objective.name, config_lib.Local()
  if name == "local":
    return
  for field in dataclasses.fields(usual):
    value = getattr(config.local, field.name)
    if value != getattr(usual, field.name):
      raise ValueError(
        f"local.{field.name}={value} is not read with objective.name={name}; "
        "use objective.name=local"
      )


def _check_network(network: config_lib.Network) -> None:
  if (network.name == "resnet") != bool(network.blocks):
    raise ValueError(
      f"network.blocks={network.blocks} with network.name={network.name}; use "
      "network.name=resnet with the blocks of each section, such as (1, 5, 1)"
    )
  sections = len(network.blocks)
  if sections and len(network.widths) != sections + 1:
    raise ValueError(
      f"network.widths={network.widths} with network.blocks={network.blocks}; "
      f"use {sections + 1} widths, those of the stem and of each section"
    )
  if min(network.blocks, default=1) < 1 or sum(network.blocks) > 1000:
    raise ValueError(
      f"network.blocks={network.blocks} leaves a section empty or makes more "
      "than 1000 blocks; use 1 or more of each"
    )
  if network.output_norm and network.name != "mlp":
    raise ValueError(
      f"network.output_norm=true is not offered for network.name="
      f"{network.name}; use network.name=mlp"
    )


def _check_fixed(config: config_lib.Config) -> None:
  """One head: nothing to couple, to freeze or to lay on other devices."""
  if not config.network.fixed:
    return
  of = "is not for the one head of network.fixed=true"
  if config.heads:
    raise ValueError(
      f"heads={','.join(map(str, config.heads))} {of}; leave heads out, or use "
      "network.fixed=false"
    )
  wanted: dict[str, Any] = {"objective.name": "end_to_end", "loss.name": "ce"}
  wanted |= {"train.train_heads": "all", "mesh.head": 1}
  flat = config_lib.flatten(config_lib.to_dict(config))
  for field, value in wanted.items():
    if flat[field] != value:
      raise ValueError(
        f"{field}={flat[field]} {of}; use {field}={value} or "
        "network.fixed=false"
      )


def _check_subnets(config: config_lib.Config) -> None:
  n, network = config.mesh.subnet, config.network
  if n == 1 or config.subnets.method != "ist":
    return
  if network.reads:
    raise ValueError(
      f"network.reads={network.reads} names features of the whole network, of "
      f"which each of mesh.subnet={n} has other ones; use network.reads=0 or "
      "subnets.method=local_sgd"
    )
  if network.name == "mlp" and network.norm == "group":
    raise ValueError(
      f"network.norm=group normalises over units that mesh.subnet={n} deals "
      "apart; use network.norm=batch or network.norm=none"
    )


def _check_layer_parallel(config: config_lib.Config) -> None:
  o, name = config.layer_parallel, config.objective.name
  if (o.stages > 1 or o.cuts) and name != "layer_parallel":
    raise ValueError(
      f"layer_parallel.stages={o.stages} and layer_parallel.cuts={o.cuts} cut "
      f"nothing with objective.name={name}; use objective.name=layer_parallel"
    )
  if o.stages > 1 and o.cuts:
    raise ValueError(
      f"layer_parallel.stages={o.stages} and layer_parallel.cuts={o.cuts} both "
      "say where to cut; use layer_parallel.stages=1 with layer_parallel.cuts"
    )
  kept = o.method == "lagrangian" and o.states == "sample"
  if kept and o.multipliers == "network":
    raise ValueError(
      "layer_parallel.multipliers=network has no network with "
      "layer_parallel.states=sample; use layer_parallel.multipliers=sample"
    )
  # Its normaliser is that of true logits, not of those on guessed states.
  if name == "layer_parallel" and config.loss.name != "dce":
    raise ValueError(
      f"loss.name={config.loss.name} couples the heads, which a stage on "
      "guessed states has no part in; use loss.name=dce"
    )


def _check_type(field: str, value: Any, default: Any) -> None:
  wanted: Any = type(default)
  kinds = (int, float) if wanted is float else wanted
  fits = isinstance(value, kinds) and (
    wanted is bool or not isinstance(value, bool)
  )
  if wanted is tuple and fits:
    fits = all(type(x) is int and abs(x) <= MOST[int] for x in value)
  if not fits:
    raise ValueError(
      f"{field}={value!r} is not {KINDS[wanted]}; use for instance {default!r}"
    )
