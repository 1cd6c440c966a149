"""What suite `rehearsal` measures: draws, stores and whole training steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mhil import (
  augment,
  buffer,
  drawing,
  exchange,
  networks,
  objectives,
  populate,
  rehearsal,
  sharding,
)

CLASSES = 100
WIDTHS = 16, 32
P = jax.P
Program = tuple[Callable[[], None], jax.stages.Compiled]


class Setup(NamedTuple):
  """Sizes of one worker's part; b/c/r as in the paper; what it trains."""

  side: int
  b: int = 56
  c: int = 14
  r: int = 7
  network: str = "convnet"

  @property
  def row(self) -> tuple[int, int, int]:
    """Shape of a row, in bytes too."""
    return self.side, self.side, 3

  def labels(self, devices: int) -> dict[str, Any]:
    """The cells that name a line."""
    numbers = f"{self.b}/{self.c}/{self.r}"
    return {"side": self.side, "bcr": numbers, "devices": devices}


class Case:
  """A full buffer on a mesh, and what works on it."""

  def __init__(self, setup: Setup, size: int, devices: int):
    """Fills a buffer of `size` rows and makes a mini-batch to offer."""
    self.setup, self.size = setup, size
    self.mesh = sharding.make_mesh(data=devices)
    self.layout = buffer.layout("per_class", size, CLASSES, devices)
    self.row_bytes = int(np.prod(setup.row))
    self.chunk = exchange.chunk_for(
      setup.r, self.layout.slots, devices, self.row_bytes
    )
    self.buffer = self._full()
    self.offer = self._offer()
    self._step = 0

  def _full(self) -> buffer.Buffer:
    blank = buffer.init(self.layout, (), np.uint8, self.mesh)
    rank = np.arange(CLASSES)
    fill = buffer.portions(self.size, rank, CLASSES, self.layout.workers)
    shape = *blank.rows.shape, *self.setup.row
    # Written, so that the first use of a page is not what is measured.
    rows = jnp.full(shape, 7, np.uint8, device=blank.rows.sharding)
    full = blank._replace(rows=rows, fill=fill.astype(np.int32))
    return buffer.place(full, self.mesh)

  def _offer(self) -> populate.Offer:
    rng = np.random.default_rng(0)
    shape = self.layout.workers, self.setup.b
    rows = rng.integers(0, 256, (shape[0] * shape[1], *self.setup.row))
    parts = populate.Offer(
      rows.astype(np.uint8),
      rng.integers(0, CLASSES, shape, dtype=np.int32),
      np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape),
      np.ones(shape, bool),
    )
    placed = (
      sharding.place(x, self.mesh, s) for x, s in zip(parts, populate.SPEC)
    )
    return populate.Offer(*placed)

  def draw(self, held: buffer.Buffer, key: jax.Array) -> drawing.Drawn:
    """One draw, on the mesh."""
    return drawing.draw(
      self.layout, held, key, count=self.setup.r, chunk=self.chunk
    )

  def traffic(self) -> drawing.Traffic:
    """What it is said to move."""
    return drawing.traffic(
      self.layout, self.row_bytes, count=self.setup.r, chunk=self.chunk
    )

  def key(self) -> jax.Array:
    """Another one each time."""
    self._step += 1
    return jax.random.key(self._step)

  def drawer(self) -> Program:
    """Draws once at each call."""
    f = _on(self, self.draw, (buffer.SPEC, P()), drawing.SPEC)
    program = jax.jit(f).lower(self.buffer, self.key()).compile()

    def once():
      jax.block_until_ready(program(self.buffer, self.key()))

    return once, program

  def storer(self) -> Program:
    """Stores of one mini-batch at each call."""

    def store(held, offer, key):
      c = self.setup.c
      return populate.store(self.layout, held, offer, key, candidates=c)

    f = _on(self, store, (buffer.SPEC, populate.SPEC, P()), buffer.SPEC)
    arguments = self.buffer, self.offer, self.key()
    program = jax.jit(f, donate_argnums=0).lower(*arguments).compile()

    def once():
      self.buffer = program(self.buffer, self.offer, self.key())
      jax.block_until_ready(self.buffer)

    return once, program


def plain(case: Case, more: int | None = None) -> Callable[[], None]:
  """Steps that find `b + more` samples in memory, `b + r` if not given."""
  images, weights = _pool(case), _initial(case)
  b = case.setup.b + (case.setup.r if more is None else more)

  def step(weights, pool, key):
    x, label = _taken(pool, key, b)
    return _learn(case, weights, x, label, jnp.ones(b))

  f = _on(case, step, (P(), P(), P()), P())
  program = jax.jit(f, donate_argnums=0)
  state = [weights]

  def once():
    state[0] = program(state[0], images, case.key())
    jax.block_until_ready(state[0])

  return once


def rehearsing(case: Case) -> Callable[[], None]:
  """Steps that draw some of their samples, and store."""
  setup, pool = case.setup, _pool(case)

  def step(state, pool, offer, key):
    weights, held, drawn = state
    x, label = _taken(pool, key, setup.b)
    held, later = rehearsal.rehearse(
      *(case.layout, held, offer._replace(rows=x), key),
      candidates=setup.c,
      count=setup.r,
      chunk=case.chunk,
    )
    weight = jnp.concatenate([jnp.ones(setup.b), drawn.weight])
    x = jnp.concatenate([x, drawn.rows])
    label = jnp.concatenate([label, drawn.label])
    return _learn(case, weights, x, label, weight), held, later

  specs = P(), buffer.SPEC, drawing.SPEC
  f = _on(case, step, (specs, P(), populate.SPEC, P()), specs)
  program = jax.jit(f, donate_argnums=0)
  first = jax.jit(_on(case, case.draw, (buffer.SPEC, P()), specs[2]))
  state = [(_initial(case), case.buffer, first(case.buffer, case.key()))]

  def once():
    state[0] = program(state[0], pool, case.offer, case.key())
    jax.block_until_ready(state[0])

  return once


def _on(case: Case, f: Callable, ins: Any, out: Any) -> Callable:
  return jax.shard_map(f, mesh=case.mesh, in_specs=ins, out_specs=out)


def _pool(case: Case) -> jax.Array:
  """Samples `[256, ...]` on every device."""
  rng = np.random.default_rng(1)
  rows = rng.integers(0, 256, (256, *case.setup.row), dtype=np.uint8)
  return sharding.replicated(rows, case.mesh)


def _taken(pool: jax.Array, key: jax.Array, b: int) -> tuple[Any, Any]:
  """A device's own samples and labels `[b]`, other ones in each step."""
  key = jax.random.fold_in(key, lax.axis_index("data"))
  row = jax.random.randint(key, (b,), 0, len(pool))
  return pool[row], row % CLASSES


@functools.cache
def _objective(side: int, network: str) -> objectives.Objective:
  shape = side, side, 3
  if network == "convnet":
    branch = networks.convnet(shape, CLASSES, WIDTHS, axis="data")
  else:
    branch = networks.resnet18(CLASSES, axis="data", dtype=jnp.bfloat16)
  return objectives.end_to_end(branch)


def _initial(case: Case) -> Any:
  params, stats, _ = _objective(case.setup.side, case.setup.network).init(
    jax.random.key(0)
  )
  return sharding.replicated((params, stats), case.mesh)


def _learn(case: Case, weights: Any, x: Any, label: Any, weight: Any) -> Any:
  """One step of gradient descent."""
  params, stats = weights

  def criterion(logits):
    scores = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(scores, label[:, None], axis=1)[:, 0]

  x = augment.normalise(x, scale=255.0, mean=(0.5,) * 3, std=(0.5,) * 3)
  weight = weight / lax.psum(jnp.sum(weight), "data")
  batch = objectives.Batch(x, 0 * label, label, weight)
  out = _objective(case.setup.side, case.setup.network).step(
    params, stats, {}, batch, criterion, jax.random.key(0)
  )
  params = jax.tree.map(lambda p, g: p - 0.01 * g, params, out.grads)
  return params, out.stats
