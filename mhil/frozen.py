"""A task that tells whether credit arrives: a classifier that helps nobody.

With a classifier that can learn, a network without any credit from it does
well: digits reach 96 % on features that nothing ever taught. Frozen, and
reading a few features only, it must be the layers below that bring what it
needs there.
"""

import jax
import jax.numpy as jnp

from mhil import layers, networks


def frozen(branch: networks.Branch, reads: int) -> networks.Branch:
  """The branch with a frozen readout that reads its first features.

  Args:
    branch: any.
    reads: how many features; 0 leaves the branch as it is.

  Raises:
    ValueError: for more features than there are, or a readout with statistics.
  """
  if not reads:
    return branch
  shapes, stats = jax.eval_shape(branch.init, jax.random.key(0))
  if jax.tree.leaves(stats.get("readout", {})):
    raise ValueError(
      f"network.reads={reads} freezes a classifier whose logits "
      "network.output_norm=true normalises by batch; use "
      "network.output_norm=false"
    )
  width = shapes["readout"]["dense"]["kernel"].shape[0]
  if not 0 < reads < width:
    raise ValueError(
      f"network.reads={reads} is not fewer than the {width} features of "
      f"{branch.name}; use network.reads={width // 2}"
    )
  # As large as if the features that are read were all.
  mask = (jnp.arange(width) < reads) * (width / reads) ** 0.5

  def piece(name, params, stats, x, train):
    if name == "readout":
      params = jax.lax.stop_gradient(params)
      # Less one, for a ReLU's outputs are on one side of zero only.
      x = (layers.global_mean(jnp.asarray(x)) - 1) * mask
    return branch.piece(name, params, stats, x, train)

  def readout(params, x):
    return piece("readout", params["readout"], {}, x, False)[0]

  def apply(params, stats, x, train):
    x, stats = branch.features(params, stats, x, train)
    return readout(params, x), stats

  return branch._replace(piece=piece, readout=readout, apply=apply)
