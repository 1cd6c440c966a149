r"""PAPER 1: the bank of heads, trained without exchange (D-CE-Train).

Dai, Kong, Zhong, Zhang, Wang, "A Fully Distributed Training for Class
Incremental Learning in Multihead Networks", IEEE INFOCOM Workshops 2023.

  task t arrives with classes C_t:  open head t on its device
    each mini-batch, on every training head m at once:
      loss_m = loss(branch_m(x), y, C_m);  theta_m <- opt(theta_m, grad loss_m)
  inference: each head sends its |C_m| scores; arg-max over all

Mesh axis: `head`; samples may be cut over `data`. Collectives in a step:
none over `head` with D-CE; over `data` the gradients of the device's heads.

What is ours: the loop over the open heads of a device. The paper's abstract
has one head a node. Here heads are entries of arrays `[l, h, ...]`, which
`bank.numbers` names: dealt in turn, so that a young stream uses every device.
The loop's bound is dynamic: one compiled program serves any number of heads,
a closed head costs nothing, and temporary memory is that of one head, its state
included. This is legal because D-CE is separable.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from mhil import bank as bank_lib
from mhil import losses, manual, objectives
from mhil.bank import SPEC, Bank, Task

P = jax.P
Tree = Any
TRAIN_HEADS = ("all", "readout", "new")


def initializer(
  objective: objectives.Objective,
  optimizer: optax.GradientTransformation,
  numbers: np.ndarray,
  mesh: Mesh | AbstractMesh,
) -> Callable[[jax.Array], Bank]:
  """`key -> Bank` of fresh heads, born on their devices; to be jitted.

  Head `i` depends on `fold_in(key, i)` alone, not on the mesh.

  Args:
    objective, optimizer: of every head.
    numbers: `[l, h]` of the heads, as `bank.numbers` has them.
    mesh: where they lie.
  """

  def one(key):
    params, stats, side = objective.init(key)
    blank = jnp.zeros(()), jnp.full((), -1, jnp.int32)
    return Bank(params, stats, optimizer.init(params), side, *blank)

  def local(key):
    index = jnp.asarray(numbers)[:, lax.axis_index("head")]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    return _rows(lax.map(one, keys))

  return jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=SPEC)


def each(
  function: Callable[[Tree], Tree],
  mesh: Mesh,
  layout: bank_lib.Layout = bank_lib.WHOLE,
) -> Callable[[Tree], Tree]:
  """Lifts a function of one head's tree to every head; to be jitted."""

  def local(tree):
    rows = jax.tree.map(lambda x: x[:, 0], layout.enter(tree))
    return layout.leave(_rows(lax.map(function, rows)))

  spec = layout.spec
  return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)


def update(
  bank: Bank,
  task: Task,
  prior: jax.Array,
  batch: objectives.Batch,
  step: jax.Array,
  key: jax.Array,
  *,
  objective: objectives.Objective | objectives.Stage,
  loss: losses.Loss,
  optimizer: optax.GradientTransformation,
  rate: Callable[[jax.Array, Task], jax.Array],
  train_heads: str,
  joint: bool = False,
) -> Bank:
  """One step of every training head of this device; runs in `shard_map`.

  Args:
    bank: this device's rows, `[l, 1, ...]`.
    task: the running task, its tables cut like the bank.
    prior: `[l, c+1]` the loss's prior correction.
    batch: this device's samples, `[b, ...]`.
    step: `[]` global step.
    key: this step's key; head `i` gets `fold_in(key, i)`.
    objective: turns a batch into a gradient; a stage that of its own pieces.
    loss: the cross-entropy; see `losses`.
    optimizer: of unit learning rate.
    rate: `(step, task) -> learning rate`.
    train_heads: `all`, `readout` (old heads train their last layer) or `new`
      (old heads are frozen and, with D-CE, not even evaluated).
    joint: see `bank.Layout`.
  """
  shared = _share(bank, task, prior, batch, objective, loss, train_heads)
  scale = rate(step, task)

  def train(part, head, criterion):
    def learn(method, moving):
      def run(part):
        out = method.step(
          part.params,
          part.stats,
          part.side,
          batch,
          criterion,
          jax.random.fold_in(key, head),
        )
        out = objectives.agreed(out, joint)
        return _move(part, out, optimizer, scale, step, moving)

      return run

    everything = learn(objective, tuple(part.params))
    if train_heads == "readout":
      assert isinstance(objective, objectives.Objective)
      last = learn(objectives.readout(objective), ("readout",))
      return lax.cond(head == task.opened - 1, everything, last, part)
    # Always true, but XLA cannot know: else it would copy the whole bank.
    return lax.cond(head < task.opened, everything, lambda part: part, part)

  how = {"loss": loss, "train_heads": train_heads, "shared": shared}
  return visit(bank, task, prior, batch, train, **how)


def visit(
  bank: Tree,
  task: Task,
  prior: jax.Array,
  batch: objectives.Batch,
  function: Callable[[Tree, jax.Array, objectives.Criterion], Tree],
  *,
  loss: losses.Loss,
  train_heads: str,
  shared: Any = None,
) -> Tree:
  """Does something to each training head of this device; in `shard_map`.

  Args:
    bank: rows `[l, 1, ...]` of any tree.
    task, prior, batch, loss, train_heads: as in `update`; shared: of a loss.
    function: `(a head's part, its number, criterion) -> new part`.
  """
  numbers = task.heads[:, 0]
  stop = _count(task)
  # The newest head is the last open one of its device, if it is here at all.
  old = jnp.sum(numbers < task.opened - 1, dtype=jnp.int32)
  start = old if train_heads == "new" else jnp.zeros_like(stop)

  def one(i, bank):
    head, rest = numbers[i], task.valid.shape[-1]
    targets = jnp.where(batch.owners == head, batch.columns, rest)

    def criterion(logits):
      tables = prior[i], task.valid[i, 0]
      return loss.value(logits, targets, *tables, shared)

    new = function(jax.tree.map(lambda x: x[i, 0], bank), head, criterion)
    return jax.tree.map(lambda x, y: x.at[i, 0].set(y), bank, new)

  return lax.fori_loop(start, stop, one, bank)


def _move(part: Bank, out, optimizer, scale, step, moving) -> Bank:
  """One head after its step; only the layers in `moving` may change."""
  changes, opt = optimizer.update(out.grads, part.opt, part.params)

  def moved(name):
    if name not in moving:  # not even by weight decay
      return part.params[name]
    return jax.tree.map(
      lambda p, u: (p - scale * u).astype(p.dtype),
      part.params[name],
      changes[name],
    )

  bad = (part.bad_step < 0) & ~jnp.isfinite(out.loss)
  return Bank(
    {name: moved(name) for name in part.params},
    out.stats,
    opt,
    out.side,
    part.loss + out.loss,
    jnp.where(bad, step.astype(jnp.int32), part.bad_step),
  )


def scores(
  bank: Bank,
  task: Task,
  images: jax.Array,
  *,
  objective: objectives.Objective,
  loss: losses.Loss,
) -> jax.Array:
  """Scores `[b, l, 1, c]` of this device's heads; runs in `shard_map`.

  No collective: the caller gathers `c` floats a head and sample. Closed
  heads and padded classes score `losses.MASKED`.
  """
  logits = _forward(bank, task, images, lambda _, *x: objective.predict(*x))
  valid = task.valid[:, 0]
  return jnp.moveaxis(jax.vmap(loss.scores)(logits, valid), 0, 1)[:, :, None]


def features(
  bank: Bank, row: jax.Array, images: jax.Array, *, objective: Any
) -> jax.Array:
  """Features `[1, b, f]` in one head, or a neighbour; in `shard_map`.

  Args:
    bank: this device's rows.
    row: place of the head in the flat bank.
    images: of all devices alike.
    objective: whose features.
  """
  return _of_head(bank, row, images, objective.features)[None]


def probe(
  bank: Bank, row: jax.Array, images: jax.Array, *, objective: Any
) -> dict[str, jax.Array]:
  """What the objective measures of images, `[1, b, ...]`; as `features`."""
  found = _of_head(bank, row, images, objective.probe)
  return jax.tree.map(lambda x: x[None], found)


def _of_head(bank, row, images, function):
  i = row // lax.axis_size("head")
  own = jax.tree.map(lambda x: x[i, 0], (bank.params, bank.stats))
  return function(*own, images)


def _count(task):
  # Open heads of this device; they come first.
  return jnp.sum(task.heads[:, 0] < task.opened, dtype=jnp.int32)


def _forward(bank, task, images, run):
  """Logits `[l, b, c+1]` of this device's open heads; zero for closed."""

  def one(i, logits):
    params, stats = jax.tree.map(lambda x: x[i, 0], (bank.params, bank.stats))
    return logits.at[i].set(run(task.heads[i, 0], params, stats, images))

  shape = bank.loss.shape[0], images.shape[0], task.valid.shape[-1] + 1
  blank = jnp.zeros(shape)
  blank = manual.vary(blank, "head", *manual.varying(images))
  return lax.fori_loop(0, _count(task), one, blank)


def _share(bank, task, prior, batch, objective, loss, train_heads):
  """What the heads tell each other before a step; None for D-CE."""
  if loss.share is None:
    return None

  def run(head, *given):
    # Of each head the logits on which it learns, or at which it stays.
    learns = objective.trained or objective.predict
    if train_heads == "all":
      return learns(*given)
    newest = head == task.opened - 1
    return lax.cond(newest, learns, objective.predict, *given)

  logits = _forward(bank, task, batch.images, run)
  return loss.share(logits, prior, task.valid[:, 0], "head")


def _rows(tree):
  # `[l, ...]` of this device to its part `[l, 1, ...]` of `[l, h, ...]`.
  return jax.tree.map(lambda x: manual.vary(x, "head")[:, None], tree)
