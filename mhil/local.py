r"""PAPER 3: greedy local learning with context supply (ContSup).

Yu, Zhang, Ma, Wang, Li, "Go beyond End-to-End Training: Boosting Greedy Local
Learning with Context Supply", arXiv 2312.07636.

A branch is cut into K modules. With x_j the input of module j, x_0 the image,
h_j what leaves it, sg the stop of gradients:

  loss_j  = task_j l(aux_j(h_j), y) + restore_j BCE(decoder_j(h_j), image)
  x_{j+1} = sg(h_j) + [E] enc_j(x_0) + [Rn] sum_{r<m} resenc_{j,r}(sg(x_{j-r}))
  params <- opt(params, grad sum_j loss_j),  loss_{K-1} = l(logits, y)

with m = min(n, j+1), the inputs that there are; in R1E m = min(1, j), where the
image has an encoder already and is no earlier input. So an encoder learns from
the module behind it, and every other parameter from its own. Encoders are part
of the network that predicts; auxiliary classifiers and decoders are not.

Mesh axis: `stage`, modules in a row on each device along it, or none, all on
the device of their head. Collectives in a step: over `head` and `stage` none,
over `data` the gradients, and with contrast the features of the batch. Between
stages features go forward and nothing comes back; see `relay`.

From the released code: the shapes of all nets, the cuts, what trains an
encoder. Ours: l is the loss of the head that the branch carries, D-CE
included, on its c+1 outputs; the gradient of a module is taken before the next
module runs, so that memory is that of the largest; nets that nothing uses do
not exist; any branch.

Greedy learning (Belilovsky et al. 2019), DGL (2020, as ContSup runs it) and
InfoPro (Wang et al., ICLR 2021) are settings in `modules.Method`.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mhil import auxiliary, cuts, layers, modules, networks, objectives
from mhil.modules import OUT

Tree = dict[str, Any]


class Flow(NamedTuple):
  """What goes from module to module.

  Attributes:
    out: `[b, ...]` what left the last module; the images at first.
    inputs: by number of the module, context included; those that encoders may
      still read, at least.
  """

  out: Array
  inputs: dict[int, Array]


def local(cut: modules.Split) -> objectives.Objective:
  """Trains each module on its own loss; predicts with all of them."""
  together = range(len(cut.modules))

  def init(key):
    params, stats = cut.branch.init(key)
    for name in cut.nets.names:
      # By name, so that a net starts alike whatever other nets exist.
      own = jax.random.fold_in(key, zlib.crc32(name.encode()))
      params[name], stats[name] = cut.nets.init(name, own)
    return params, stats, {}

  def step(params, stats, side, batch, criterion, key):
    del key
    x = Flow(batch.images, {})
    out, _ = _learn(cut, together, params, stats, x, batch, criterion)
    return out._replace(side=side)

  def features(params, stats, images):
    return interfaces(cut)(params, stats, images)[-1]

  def predict(params, stats, images):
    return cut.branch.readout(params, features(params, stats, images))

  def trained(params, stats, images):
    run, x = _runner(cut, params, dict(stats), True), Flow(images, {})
    for j in together:
      x = _through(cut, j, run, x)
    return cut.branch.readout(params, layers.global_mean(x.out))

  return objectives.Objective("local", init, step, predict, features, trained)


def interfaces(cut: modules.Split) -> Callable[..., list[Array]]:
  """`(params, stats, images) -> [b, f]` of each module: what leaves it, pooled.

  At inference; the last is what the readout sees.
  """

  def run(params, stats, images):
    piece, x = _runner(cut, params, dict(stats), False), Flow(images, {})
    found = []
    for j in range(len(cut.modules)):
      x = _through(cut, j, piece, x)
      found.append(layers.global_mean(x.out))
    return found

  return run


def stages(
  cut: modules.Split, shape: Sequence[int], count: int
) -> tuple[objectives.Stage, ...]:
  """The modules on `count` devices, the dearest as cheap as can be.

  Args:
    cut: the modules.
    shape: of one image.
    count: of stages; each has at least one module.

  Raises:
    ValueError: for more stages than modules, or modules that are not apart.
  """
  modules.check_stages(cut, count)
  crossings = modules.crossings(cut, shape)
  ends = [0, *cuts.balance(costs(cut, shape), count), len(cut.modules)]
  parts = [range(a, b) for a, b in itertools.pairwise(ends)]
  last = len(cut.modules)
  return tuple(
    objectives.Stage(
      tuple(modules.owned(cut, part)),
      _stage_step(cut, part, crossings),
      crossings[part.start],
      any(modules.sees_image(cut, j) for j in range(part.start, last)),
    )
    for part in parts
  )


def costs(cut: modules.Split, shape: Sequence[int]) -> tuple[int, ...]:
  """Multiply-adds of each module forwards, for one image, with its nets."""
  params, stats, _ = jax.eval_shape(local(cut).init, jax.random.key(0))
  image: Any = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  x = Flow(image, {})
  found: list[int] = []
  for j in range(len(cut.modules)):

    def forward(params, stats, x, j=j):
      run = _runner(cut, params, dict(stats), False)
      x = _through(cut, j, run, x)
      # Normalisation by the batch would need a mesh, and counts the same.
      for name in modules.owned(cut, [j])[len(cut.contexts[j]) :]:
        if name not in cut.modules[j]:
          of = cut.branch.piece if name == "readout" else cut.nets.run
          of(name, params[name], stats[name], x.out, False)
      return x

    found.append(networks.multiply_adds(forward, params, stats, x))
    x = jax.eval_shape(forward, params, stats, x)
  return tuple(found)


def _stage_step(cut, part, crossings):
  def step(params, stats, side, batch, criterion, key):
    del key
    if part.start:
      inputs = {j: x for j, x in side.arrived.items() if j != OUT}
      x = Flow(side.arrived[OUT], {0: batch.images} | inputs)
    else:
      x = Flow(batch.images, {})
    out, x = _learn(cut, part, params, stats, x, batch, criterion)
    leaves = {}
    if part.stop < len(cut.modules):
      names = crossings[part.stop]
      leaves = {j: x.out if j == OUT else x.inputs[j] for j in names}
    return out._replace(side=objectives.Crossing(side.arrived, leaves))

  return step


def _learn(cut, part, params, stats, x, batch, criterion):
  """`Step` without side, and `Flow`: modules in a row, each on its own loss."""
  losses, grads = [], {}
  learn = jax.value_and_grad(advance, has_aux=True)
  for group in [[j] for j in part] if cut.method.isolated else [part]:
    own = {name: params[name] for name in modules.owned(cut, group)}
    (loss, (x, stats)), grad = learn(
      own, stats, x, cut, group, batch, criterion
    )
    x = _after(grad, x)
    losses.append(loss)
    grads |= grad
  total = sum(losses[1:], losses[0])
  return objectives.Step(total, grads, stats, ()), x


def advance(
  params: Tree,
  stats: Tree,
  x: Flow,
  cut: modules.Split,
  group: Sequence[int],
  batch: objectives.Batch,
  criterion: objectives.Criterion,
) -> tuple[Float[Array, ""], tuple[Flow, Tree]]:
  """Runs modules in training; no gradient leaves the first of them.

  Args:
    params: those that the modules own, at least.
    stats: of the whole branch.
    x: what reaches the first module.
    cut: all modules.
    group: which run, in order; the last one has the loss.
    batch: for labels and weights.
    criterion: the loss of the head.

  Returns:
    The loss, summed over this device's samples; then what leaves the last
    module, at the end of the branch the logits, and the new statistics.
  """
  x, stats = lax.stop_gradient(x), dict(stats)
  run = _runner(cut, params, stats, True)
  for j in group:
    x = _through(cut, j, run, x)
  if j < len(cut.modules) - 1:
    return _interface_loss(cut, j, x.out, run, batch, criterion), (x, stats)
  logits = cut.branch.readout(params, layers.global_mean(x.out))
  loss = jnp.sum(batch.weight * criterion(logits))
  return loss, (x._replace(out=logits), stats)


def _runner(cut, params, stats, train):
  """`(name, x) -> y`, which writes new statistics into `stats`."""

  def run(name, x):
    of = cut.nets.run if name in cut.nets.names else cut.branch.piece
    y, stats[name] = of(name, params[name], stats[name], x, train)
    return y

  return run


def _through(cut, j, run, x):
  out, inputs = x
  for name, source in cut.contexts[j]:
    out = out + run(name, inputs[source])
  inputs = {**inputs, j: out}
  for name in cut.modules[j]:
    out = run(name, out)
  return Flow(out, inputs)


def _interface_loss(cut, j, x, run, batch, criterion):
  method, (restore, task) = cut.method, cut.weights[j]
  loss = jnp.zeros(())
  if task:
    out = run(f"aux{j}", x)
    if method.loss == "softmax":
      each = criterion(out)
    else:
      each = auxiliary.contrast(out, batch, cut.branch.numerics.axis)
    loss = loss + task * jnp.sum(batch.weight * each)
  if restore:
    guess = run(f"decoder{j}", x)
    each = auxiliary.restoration(guess, batch.images, method.pixels)
    loss = loss + restore * jnp.sum(batch.weight * each)
  return loss


def _after(grads, x):
  """`x`, but not before `grads` are known.

  XLA may otherwise run every module forward before any backward, and hold
  what all of them need for it.
  """
  token = sum(leaf.reshape(-1)[0] for leaf in jax.tree.leaves(grads))
  zero = jnp.minimum(jnp.abs(token), 0)
  return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), x)
