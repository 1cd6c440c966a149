r"""PAPER 5: independent subnet training (IST) of dense branches.

Yuan, Wolfe, Dun, Tang, Kyrillidis, Jermaine, "Distributed Learning of Deep
Neural Networks using Independent Subnet Training", PVLDB 15(8), 2022, arXiv
1910.02120.

  a round:  permute each hidden layer's neurons, cut them into n groups
            subnet i = the net of group i of every layer
            J steps on each subnet's own samples: w_i <- opt(w_i, grad loss_i)
            copy all subnets back
    first layer W[:, g1_i]   hidden W[g1_i, g2_i]   last layer W[g_i, :]

Mesh axis: `subnet`. Collectives over it: none in a step; an exchange has an
all-to-all of what the paper cuts along one axis, two of what it cuts along
both, an all-reduce of what it does not cut (`cutting.exchange`).

The paper's: the above, with plain SGD whose state does not outlive a round,
batch norm behind each layer, normalisation by the batch's statistics in tests.
Ours:
- No server: a neuron goes from its device to its next one. Blocks of hidden
  layers that no subnet holds lie spread over the devices and do not move.
- The optimiser's state can be dealt with the weights (`deal`).
- A readout's bias is shared and averaged; the paper's networks have none.
- Statistics for tests can be running ones, or collected on the merged net.
- Every head of a stream can be trained so, with any loss of its own.

Baselines in the same code path: `local_sgd`, whose parts are copies that are
averaged every J steps, and `data_parallel`, whose copies take each step on one
batch together: an all-reduce of gradients. Batch norm sees a copy's own samples
in both. `blocks` cuts residual networks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mhil import bank as bank_lib
from mhil import cutting, networks, partitions
from mhil.cutting import Cut
from mhil.objectives import Objective

METHODS = ("ist", "local_sgd", "data_parallel")
STATISTICS = ("running", "batch", "collected")


def neurons(hidden: Sequence[int], parts: int) -> Cut:
  """Cuts the hidden layers of `networks.mlp`.

  Args:
    hidden: units of each hidden layer.
    parts: n.

  Raises:
    ValueError: if there is no hidden layer, or n does not divide one.
  """
  if not hidden:
    raise ValueError(
      f"network.widths={tuple(hidden)} has nothing to cut into "
      f"mesh.subnet={parts}; use at least one hidden layer"
    )
  for width in hidden:
    if width % parts:
      raise ValueError(
        f"network.widths={tuple(hidden)} do not divide by mesh.subnet={parts}; "
        f"use {max(1, round(width / parts)) * parts} in place of {width}"
      )
  units = {f"dense{i}": width for i, width in enumerate(hidden)}
  before = {f"dense{i + 1}": f"dense{i}" for i in range(len(hidden) - 1)}
  last = f"dense{len(hidden) - 1}"

  def axes(name):
    piece, _, array = name.rpartition("|")[2].partition(".")
    if piece == "readout":
      return (last, None) if array == "dense.kernel" else ()
    if piece not in units:
      return ()  # counters of an optimiser
    if array == "dense.kernel":
      return before.get(piece), piece
    return (piece,)

  pairs = tuple((first, second) for second, first in before.items())
  return Cut(parts, units, axes, cutting.flatten, cutting.regrow, pairs)


def partition(
  cut: Cut,
  part: Objective,
  *,
  every: int,
  method: str = "ist",
  renew: bool = True,
  deal: bool = False,
) -> partitions.Partition:
  """Trains the parts of a cut branch apart.

  Args:
    cut: `neurons`, `blocks.sections`, or `cutting.copies` for the baselines.
    part: how one part learns; its branch has the units of one part.
    every: J, the local steps of a round.
    method: `ist`, `local_sgd` or `data_parallel`, which sums the gradients of
      all parts in each step.
    renew: draw new parts for each round; without, the first are kept.
    deal: deal the optimiser's state with the weights, instead of a fresh one
      in each round.

  Raises:
    ValueError: names the configuration's field, its value and the fix.
  """
  if every < 1:
    raise ValueError(
      f"subnets.local_steps={every} never trains a subnet; use 1 or more"
    )
  _check("method", method, METHODS)
  joint = method == "data_parallel"

  def exchange(trees, rest, old, new):
    held, rest = cutting.exchange(cut, cut.flat(trees), rest, old, new)
    return cut.grow(held, trees), rest

  def merge(objective):
    like = jax.eval_shape(objective.init, jax.random.key(0))
    form = {"params": like[0], "stats": like[1]}

    def together(trees, rest, index):
      parts = jax.vmap(cut.flat)(trees)
      return cut.grow(cutting.merge(cut, parts, rest, index), form)

    return together

  return partitions.Partition(
    name=method,
    parts=cut.parts,
    every=0 if joint else every,
    layout=bank_lib.COPIES if joint else bank_lib.PARTS,
    units=cut.units,
    part=part,
    split=lambda objective, optimizer: _split(
      cut, objective, part, optimizer if deal else None
    ),
    exchange=exchange,
    merge=merge,
    renew=renew and bool(cut.units),
    deal=deal,
    pairs=cut.pairs,
  )


def _split(
  cut: Cut,
  whole: Objective,
  part: Objective,
  optimizer: optax.GradientTransformation | None,
) -> Callable[[jax.Array], tuple[Any, Any, Any]]:
  """`key -> (trees, side, rest)` of all parts of a fresh branch, `[n, ...]`."""

  def split(key):
    params, stats, side = whole.init(key)
    if cut.units and jax.tree.leaves(side):
      raise ValueError(
        f"objective={whole.name} has a state of its own that "
        f"mesh.subnet={cut.parts} cannot cut; use end-to-end training"
      )
    flat = cut.flat({"params": params, "stats": stats})
    form = jax.eval_shape(part.init, key)
    like = {"params": form[0], "stats": form[1]}
    parts = [
      cut.grow(
        cutting.take(
          cut, flat, {u: t[i] for u, t in cutting.home(cut).items()}
        ),
        like,
      )
      for i in range(cut.parts)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    side = jax.tree.map(lambda x: jnp.stack([x] * cut.parts), side)
    if optimizer:
      flat |= cut.flat({"opt": optimizer.init(params)})
    return stacked, side, cutting.left_behind(cut, flat)

  return split


def tested(
  objective: Objective, branch: networks.Branch, statistics: str
) -> Objective:
  """How the merged branch gets the statistics that it is tested with.

  Args:
    objective: of the whole branch.
    branch: the same that `objective` was made of.
    statistics: `running`, those that the subnets have gathered, which are not
      the merged net's behind its first layer; `batch`, the test batch's own,
      as in the paper, so that a prediction depends on its company;
      `collected`, one pass of training samples through the merged net.

  Raises:
    ValueError: for others.
  """
  _check("statistics", statistics, STATISTICS)
  if statistics == "batch":
    return objective._replace(
      predict=lambda p, s, x: branch.apply(p, s, x, True)[0],
      features=lambda p, s, x: branch.features(p, s, x, True)[0],
    )
  if statistics == "collected":

    def collect(params, stats, images):
      # From zero, a training step leaves a tenth of the batch's statistics.
      blank = jax.tree.map(jnp.zeros_like, stats)
      moved = branch.apply(params, blank, images, True)[1]
      return jax.tree.map(lambda x: 10 * x, moved)

    return objective._replace(collect=collect)
  return objective


def _check(field: str, value: str, known: Sequence[str]) -> None:
  if value not in known:
    raise ValueError(
      f"subnets.{field}={value!r} is not known; use one of {', '.join(known)}"
    )
