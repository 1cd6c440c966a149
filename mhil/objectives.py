"""The objective seam: how one branch turns a batch into a gradient.

An objective knows one branch and nothing of other heads. The criterion that
it is handed says what the logits `[b, c+1]` of that head cost a sample, so
every objective works with every loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mhil import manual, networks

Tree = Any
Criterion = Callable[[Float[Array, "b k"]], Float[Array, " b"]]


class Batch(NamedTuple):
  """What every head sees in a step.

  Attributes:
    images: `[b, ...]` float32, normalised and augmented.
    owners: `[b]` int32, the head that owns each sample's class.
    columns: `[b]` int32, the column of that class in its head.
    weight: `[b]` float32; sums to one over the whole mesh, 0 for padding.
    number: `[b]` int32, the rows of the training set that they are; None
      where nobody knows.
  """

  images: Float[Array, "b ..."]
  owners: Int[Array, " b"]
  columns: Int[Array, " b"]
  weight: Float[Array, " b"]
  number: Int[Array, " b"] | None = None


class Step(NamedTuple):
  """What an objective returns for one head and one batch.

  Attributes:
    loss: the quantity minimised, summed over this device's samples.
    grads: like the parameters; summed over the whole batch.
    stats: new normalisation statistics.
    side: new side state.
  """

  loss: Float[Array, ""]
  grads: Tree
  stats: Tree
  side: Tree


class Stage(NamedTuple):
  """A stretch of a branch that learns apart, from what reaches it.

  Attributes:
    names: of the pieces that it owns, a part of the branch's parameters.
    step: as `Objective.step`, of its own pieces; `side` is a `Crossing`, of
      which it replaces what leaves.
    arrives: shapes of what reaches it, a tree of those of one sample; `{}`
      for the first, which reads the batch's images.
    images: whether it, or a stage behind it, reads the images; every first
      one has them.
  """

  names: tuple[str, ...]
  step: Callable[..., Step]
  arrives: Tree
  images: bool


class Crossing(NamedTuple):
  """What reaches a stage and what leaves it, `[b, ...]` each, of one head."""

  arrived: Tree
  leaves: Tree


class Objective(NamedTuple):
  """A way to train one branch.

  Attributes:
    name: for messages and tables.
    init: `key -> (params, stats, side)`: the branch's and the method's own.
    step: `(params, stats, side, batch, criterion, key) -> Step`.
    predict: `(params, stats, images) -> logits [b, c+1]`, at inference.
    features: `(params, stats, images) -> [b, f]`, before the last layer.
    trained: as `predict`, the logits that `step` hands to the criterion, where
      they are others: batch norm by the statistics of the batch.
    collect: `(params, stats, images) -> stats`: normalisation statistics of
      these images for a test; None where those of training serve.
    settle: `(params, stats, images) -> stats`: statistics moved towards those
      of the network that is tested, where training collects those of another;
      None where they are the same.
    spread: `(run, mesh) -> run`, how its parts lie along `stage`; see
      `stages`. None where they cannot.
    probe: `(params, stats, images) -> {name: [b, ...]}`, what more is to be
      measured on test images: logits `[b, c+1]`, or a number a sample.
    facts: of the method, for tables; JSON-safe.
  """

  name: str
  init: Callable[[Array], tuple[Tree, Tree, Tree]]
  step: Callable[..., Step]
  predict: Callable[[Tree, Tree, Array], Float[Array, "b k"]]
  features: Callable[[Tree, Tree, Array], Float[Array, "b f"]]
  trained: Callable[[Tree, Tree, Array], Float[Array, "b k"]] | None = None
  collect: Callable[[Tree, Tree, Array], Tree] | None = None
  settle: Callable[[Tree, Tree, Array], Tree] | None = None
  spread: Callable[..., Any] | None = None
  probe: Callable[[Tree, Tree, Array], dict[str, Array]] | None = None
  facts: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def end_to_end(branch: networks.Branch) -> Objective:
  """Ordinary back-propagation through the whole branch."""

  def init(key):
    params, stats = branch.init(key)
    return params, stats, {}

  def loss(params, stats, batch, criterion):
    logits, stats = branch.apply(params, stats, batch.images, True)
    return jnp.sum(batch.weight * criterion(logits)), stats

  def step(params, stats, side, batch, criterion, key):
    del key
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
      params, stats, batch, criterion
    )
    return Step(value, grads, stats, side)

  def predict(params, stats, images):
    return branch.apply(params, stats, images, False)[0]

  def features(params, stats, images):
    return branch.features(params, stats, images, False)[0]

  def trained(params, stats, images):
    return branch.apply(params, stats, images, True)[0]

  return Objective("end_to_end", init, step, predict, features, trained)


def agreed(out: Step, joint: bool = False) -> Step:
  """Makes alike what samples elsewhere made different; in `shard_map`.

  Every step passes here, whatever it trains. Over `data` the loss is summed
  and statistics are averaged; gradients are sums already, since parameters are
  alike along it.

  Args:
    out: of this device's samples.
    joint: over `subnet` as well, where parameters are copies, whose gradients
      are sums of their own samples only.
  """
  if joint:
    out = _over_copies(out)
  loss = lax.psum(out.loss, "data")
  stats = jax.tree.map(_mean_over_data, out.stats)
  return out._replace(loss=loss, stats=stats)


def _over_copies(out: Step) -> Step:
  def vary(tree):
    return jax.tree.map(lambda x: manual.vary(x, "subnet"), tree)

  loss, grads = lax.psum(vary((out.loss, out.grads)), "subnet")
  stats = lax.pmean(vary(out.stats), "subnet")
  return vary(out._replace(loss=loss, grads=grads, stats=stats))


def _mean_over_data(x):
  return lax.pmean(x, "data") if "data" in manual.varying(x) else x


def settling(objective: Objective) -> Objective:
  """Moves the statistics by `settle` and learns nothing."""

  def step(params, stats, side, batch, criterion, key):
    del criterion, key
    stats = objective.settle(params, stats, batch.images)
    loss = jnp.zeros_like(jnp.sum(batch.weight))
    return Step(loss, jax.tree.map(jnp.zeros_like, params), stats, side)

  return objective._replace(name="settling", step=step)


def readout(objective: Objective) -> Objective:
  """Train only the last layer; the features are frozen at inference form.

  It costs one forward pass: nothing is differentiated below the readout.
  """

  def loss(last, params, stats, batch, criterion):
    logits = objective.predict({**params, "readout": last}, stats, batch.images)
    return jnp.sum(batch.weight * criterion(logits))

  def step(params, stats, side, batch, criterion, key):
    del key
    value, last = jax.value_and_grad(loss)(
      params["readout"], params, stats, batch, criterion
    )
    grads = jax.tree.map(jnp.zeros_like, params)
    return Step(value, {**grads, "readout": last}, stats, side)

  return objective._replace(name="readout", step=step)
