"""From a configuration to layer-parallel training."""

import functools

from mhil import (
  abreast,
  auxnet,
  chain,
  coupling,
  data,
  guessing,
  layer_parallel,
  networks,
  objectives,
)
from mhil import config as config_lib


def make(
  o: config_lib.LayerParallel, branch: networks.Branch, dataset: data.Dataset
) -> objectives.Objective:
  """The objective for a data set's images.

  Raises:
    ValueError: names the field, its value and the fix.
  """
  shape = dataset.train_images.shape[1:]
  stages = chain.chain(branch, shape, o.stages, o.cuts)
  method = coupling.Method(
    beta=float(o.beta),
    eta=float(o.eta),
    corrections=o.corrections,
    correction=o.correction,
    serial_every=o.serial_every,
    sweeps=o.sweeps,
  )
  guesser = make_guesser(o, stages, dataset)
  objective = layer_parallel.layer_parallel(stages, guesser, method)
  spread = functools.partial(
    abreast.spread, chain=stages, guesser=guesser, method=method
  )
  return objective._replace(spread=spread)


def by_sample(o: config_lib.LayerParallel) -> list[str]:
  """What is kept for each sample: of `states` and `multipliers`."""
  names = ("states", "multipliers") if o.method == "lagrangian" else ("states",)
  return [name for name in names if getattr(o, name) == "sample"]


def make_guesser(
  o: config_lib.LayerParallel, stages: chain.Chain, dataset: data.Dataset
) -> guessing.Guesser:
  """Where states and multipliers come from."""
  lagrangian, samples = o.method == "lagrangian", len(dataset.train_labels)
  kept = by_sample(o)
  if kept and (dataset.pad or dataset.flip):
    raise ValueError(
      f"layer_parallel.{kept[0]}=sample belong to a sample as it is stored, "
      f"and {dataset.name} is augmented; use layer_parallel.{kept[0]}=network, "
      "or data.augment=false"
    )
  if o.states == "sample":
    return guessing.by_sample(stages, samples, multipliers=lagrangian)
  multipliers = o.multipliers if lagrangian else "none"
  aux = auxnet.auxnet(stages, float(o.cost), o.depth, multipliers == "network")
  return guessing.by_network(
    aux,
    stages,
    multipliers=multipliers,
    samples=samples,
    rate=float(o.rate),
  )
