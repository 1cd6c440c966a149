"""The batch transform seam: a batch and a memory to a batch and a memory.

A transform sees a mini-batch before augmentation, under `shard_map` over
`data`, and may add samples to it. What it remembers is state of the loop. It
knows neither heads nor losses.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

Tree = Any
Numbers = Int[np.ndarray, " n"]


class Batch(NamedTuple):
  """A worker's samples.

  Attributes:
    rows: `[b, ...]` as stored: neither normalised nor augmented.
    label: `[b]` their classes.
    position: `[b]` place in the batch of all workers: what the randomness of
      an augmentation depends on.
    weight: `[b]` 1, or 0 for a sample that does not count.
    number: `[b]` rows of the training set.
  """

  rows: Any
  label: Any
  position: Any
  weight: Any
  number: Any


class Everyone(NamedTuple):
  """What each worker knows of the samples of all: the order of the epoch.

  Attributes:
    label: `[w, b]` classes.
    number: `[w, b]` rows of the training set.
    fresh: `[w, b]` False for padding, and for samples that are not new.
  """

  label: Any
  number: Any
  fresh: Any


class Hosted(NamedTuple):
  """What the host does for a memory whose rows it holds.

  Attributes:
    shown: `state -> state` as a step takes it, for its shapes.
    server: `read -> serve`, of a run; `read` is `numbers -> rows` of the
      training set, and `serve` is `(state, Everyone, key) -> (state, done)`:
      the state that a step gets, and what makes of the state that it returns
      the next one. `Everyone` and key lie on the host.
  """

  shown: Callable[[Tree], Tree]
  server: Callable[[Callable], Callable]


class Transform(NamedTuple):
  """A memory that changes every mini-batch.

  Attributes:
    added: samples that it adds to a batch, over the whole mesh.
    size: samples that it can hold, over the whole mesh.
    spec: partition specs of its state.
    init: `() -> state`, on the devices.
    apply: `(state, Batch, Everyone, key) -> (state, Batch)`; in `shard_map`.
    expected: `state -> [classes]`, how many of each class `apply` adds on
      average; in `shard_map`, without traffic.
    held: `state -> [n]`, numbers of the rows that it holds; on the host.
    keep: `(state, {class: numbers}, read) -> state` replaces what is held of
      these classes by their best samples, given best first; on the host. None
      for a memory that keeps what passes.
    refit: `(saved, like) -> state`: a state saved on another mesh.
    facts: what it can hold, where and how; JSON-safe.
    hosted: the host's part in a step; None if there is none.
  """

  added: int
  size: int
  spec: Tree
  init: Callable[[], Tree]
  apply: Callable[[Tree, Batch, Everyone, Array], tuple[Tree, Batch]]
  expected: Callable[[Tree], Array]
  held: Callable[[Tree], Numbers]
  keep: Callable[[Tree, Mapping[int, Numbers], Callable], Tree] | None
  refit: Callable[[Tree, Tree], Tree]
  facts: dict[str, Any]
  hosted: Hosted | None = None


def none(classes: int) -> Transform:
  """No memory: every batch stays as it is.

  Args:
    classes: of the whole stream.
  """
  return Transform(
    added=0,
    size=0,
    spec=(),
    init=tuple,
    apply=lambda state, batch, everyone, key: (state, batch),
    expected=lambda state: jnp.zeros(classes),
    held=lambda state: np.zeros(0, np.int32),
    keep=None,
    refit=lambda saved, like: saved,
    facts={"samples": 0, "bytes": 0, "bytes_per_device": 0, "kind": "none"},
  )


def join(batch: Batch, more: Batch) -> Batch:
  """Both, with samples of `batch` in place of those of weight zero in `more`.

  Args:
    batch: `[b]` samples.
    more: `[r]` samples; of weight zero, they may hold anything, which batch
      statistics must not see.
  """
  there = more.weight > 0
  stand_in = jnp.arange(there.size) % batch.label.size

  def pick(old, new):
    shape = there.size, *(1 for _ in new.shape[1:])
    new = jnp.where(there.reshape(shape), new, old[stand_in])
    return jnp.concatenate([old, new])

  return Batch(
    pick(batch.rows, more.rows),
    pick(batch.label, more.label),
    jnp.concatenate([batch.position, more.position]),
    jnp.concatenate([batch.weight, more.weight]),
    pick(batch.number, more.number),
  )
