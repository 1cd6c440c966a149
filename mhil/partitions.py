"""The partition seam: a branch falls into parts that are trained apart.

A part is a branch of its own: it takes its own samples and its own steps. Now
and then the parts exchange what they have learnt and are cut anew. Parts lie
over the mesh's `subnet` axis, and the bank's leaves are `[l, h, n, ...]`. A
test sees the whole branch, merged from its parts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from mhil import across, heads, objectives
from mhil import bank as bank_lib
from mhil.bank import Bank

P = jax.P
Tree = Any
Index = dict[str, Any]


class Apart(NamedTuple):
  """What parts need besides their weights.

  Attributes:
    index: `{units: [n, m]}`, the units that each part holds; of every head
      alike, on each device.
    rest: `{name: [l, h, n, ...]}`, what no part trains in this round; each
      device keeps an n-th of it.
  """

  index: Any
  rest: Any


class Parted(NamedTuple):
  """What the state of a run holds of heads whose branches are in parts.

  Attributes:
    bank: the parts, `[l, h, n, ...]`.
    apart: what they need besides.
  """

  bank: Any
  apart: Any


class Partition(NamedTuple):
  """A way to train a branch in parts; the functions see one head.

  Attributes:
    name: for messages and tables.
    parts: n, the size of the mesh's `subnet` axis.
    every: steps between two exchanges; 0 for none.
    layout: of the bank.
    units: `{name: number}` of units that are dealt to the parts.
    part: how a part learns, in `shard_map`; None where it is the branch.
    split: `(objective, optimizer) -> (key -> (trees, side, rest))`, all parts
      `[n, ...]` of a fresh branch, each with its units in order.
    exchange: `(trees, rest, old index, new index) -> (trees, rest)` of this
      device, in `shard_map`; all traffic over `subnet` is here.
    merge: `objective -> ((trees [n, ...], rest [n, ...], index) -> trees)` of
      the branch.
    renew: draw other units for each round.
    deal: the optimiser's state moves with the weights, or is reset.
    pairs: names of units that are wired to each other.
  """

  name: str
  parts: int
  every: int
  layout: bank_lib.Layout
  units: dict[str, int]
  part: objectives.Objective | None
  split: Callable[..., Callable[[jax.Array], tuple[Tree, Tree, Tree]]]
  exchange: Callable[..., tuple[Tree, Tree]]
  merge: Callable[[objectives.Objective], Callable[..., Tree]]
  renew: bool = True
  deal: bool = False
  pairs: tuple[tuple[str, str], ...] = ()


# A branch in one piece, `bank.WHOLE`.
NONE = Partition(
  "none",
  1,
  0,
  bank_lib.WHOLE,
  {},
  None,
  lambda objective, optimizer: lambda key: ({}, {}, {}),
  lambda trees, rest, old, new: (trees, rest),
  lambda objective: lambda trees, rest, index: trees,
)


def spec(partition: Partition) -> Tree:
  """How the heads lie on the mesh."""
  whole = partition.layout.spec
  return whole if partition is NONE else Parted(whole, Apart(P(), whole))


def bank_of(held: Any) -> Bank:
  """The bank in what a state holds of heads."""
  return held.bank if isinstance(held, Parted) else held


def with_bank(held: Any, bank: Bank) -> Any:
  """The same with another bank."""
  return held._replace(bank=bank) if isinstance(held, Parted) else bank


def trees(bank: Bank, deal: bool) -> dict[str, Tree]:
  """What is dealt of a bank or of one of its heads."""
  held = {"params": bank.params, "stats": bank.stats}
  return held | ({"opt": bank.opt} if deal else {})


def fresh(
  partition: Partition,
  objective: objectives.Objective,
  optimizer: optax.GradientTransformation,
  numbers: np.ndarray,
  mesh: Mesh,
) -> Callable[[jax.Array], Any]:
  """`key -> Parted` of fresh heads; a `Bank` for `NONE`.

  A branch is drawn on the host and each device gets its part, for no device
  may have room for all. Parts hold their units in order, until a first
  exchange deals them.

  Args:
    partition: how they are cut.
    objective: of whole branches.
    optimizer: of unit learning rate.
    numbers: `[l, h]` of the heads; see `bank.numbers`.
    mesh: where they lie.
  """
  if partition is NONE:
    return jax.jit(heads.initializer(objective, optimizer, numbers, mesh))
  l, h = numbers.shape
  n, layout = partition.parts, partition.layout
  host = jax.local_devices(backend="cpu")[0]
  split = jax.jit(partition.split(objective, optimizer))
  opened = jax.jit(heads.each(optimizer.init, mesh, layout))

  def place(tree):
    return across.put(tree, NamedSharding(mesh, layout.spec))

  def make(key):
    data = across.fetch(jax.random.key_data(key))
    key = jax.random.wrap_key_data(jax.device_put(data, host))
    rows = [split(jax.random.fold_in(key, i)) for i in numbers.flat]
    trees, side, rest = jax.tree.map(
      lambda *x: place(np.stack(x).reshape(l, h, *x[0].shape)), *rows
    )
    index = {
      name: np.arange(units, dtype=np.int32).reshape(n, -1)
      for name, units in partition.units.items()
    }
    params, blank = trees["params"], np.zeros((l, h, n), np.float32)
    bad = np.full((l, h, n), -1, np.int32)
    state = params, trees["stats"], opened(params), side
    apart = Apart(across.put(index, NamedSharding(mesh, P())), rest)
    return Parted(Bank(*state, place(blank), place(bad)), apart)

  return make


def exchange(
  partition: Partition,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  renew: bool,
) -> Callable[..., Parted]:
  """`(Parted, key) -> Parted` of the next round; to be jitted."""
  layout, deal = partition.layout, partition.deal

  def local(parted, key):
    bank, apart = parted
    new = draw(key, apart.index) if renew else apart.index

    def one(bank, rest):
      held, rest = partition.exchange(trees(bank, deal), rest, apart.index, new)
      opt = held["opt"] if deal else optimizer.init(held["params"])
      return bank._replace(**held | {"opt": opt}), rest

    rows = jax.tree.map(lambda x: x[:, 0], layout.enter((bank, apart.rest)))
    out = jax.tree.map(lambda x: x[:, None], jax.vmap(one)(*rows))
    bank, rest = layout.leave(out)
    return Parted(bank, Apart(new, rest))

  held = spec(partition)
  return jax.shard_map(local, mesh=mesh, in_specs=(held, P()), out_specs=held)


def draw(key: jax.Array, index: Index) -> Index:
  """Other units for every part: a uniform permutation, cut into n.

  In a part the order of units means nothing, so it is theirs in the branch:
  with one part the branch stays as it is.
  """
  new = {}
  for i, (name, table) in enumerate(sorted(index.items())):
    order = jax.random.permutation(jax.random.fold_in(key, i), table.size)
    new[name] = jnp.sort(order.astype(jnp.int32).reshape(table.shape), axis=1)
  return new


def whole(
  partition: Partition, objective: objectives.Objective, mesh: Mesh
) -> Callable[..., Bank]:
  """`Parted -> bank` of whole branches, `bank.WHOLE`; to be jitted.

  Every device of a head gets all of it, as a test needs. Optimiser and side
  state are left out.
  """
  where = NamedSharding(mesh, bank_lib.SPEC)

  join = partition.merge(objective)

  def one(bank, rest, index):
    held = join(trees(bank, False), rest, index)
    loss, bad = bank.loss.mean(0), bank.bad_step.max(0)
    return Bank(held["params"], held["stats"], (), (), loss, bad)

  def local(bank, rest, index):
    rows = jax.tree.map(lambda x: x[:, 0], (bank, rest))
    out = jax.vmap(one, (0, 0, None))(*rows, index)
    return bank_lib.WHOLE.leave(jax.tree.map(lambda x: x[:, None], out))

  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(bank_lib.SPEC, bank_lib.SPEC, P()),
    out_specs=bank_lib.SPEC,
  )

  def merge(parted):
    bank, apart = parted
    held = bank._replace(opt=(), side=()), apart.rest
    return spread(*jax.reshard(held, where), apart.index)

  return merge


def renewed(held: Any, init: Callable[[Tree], Tree]) -> Any:
  """Heads as a new task finds them: with new optimiser state."""
  bank = bank_of(held)
  new = with_bank(held, bank._replace(opt=init(bank.params)))
  if not isinstance(held, Parted):
    return new
  rest = {
    name: _blank(x) if name.startswith("opt") else x
    for name, x in held.apart.rest.items()
  }
  return new._replace(apart=held.apart._replace(rest=rest))


@jax.jit
def _blank(x):
  # Not zeros_like: under jax 0.12 that forgets how `x` lies on the mesh.
  return jnp.where(True, 0.0, x)


def coverage(partition: Partition, indices: list[Index], weights: int) -> float:
  """Share of a branch's weights that have ever been trained.

  A weight between two units is trained only in rounds in which one part holds
  both; every other one is trained in all rounds.

  Args:
    partition: how the branch is cut.
    indices: the tables of the rounds so far, one at least.
    weights: the branch's, all of them.
  """
  apart = 0
  for before, after in partition.pairs:
    shape = partition.units[before], partition.units[after]
    seen = np.zeros(shape, bool)
    for index in indices:
      for rows, columns in zip(index[before], index[after]):
        seen[np.ix_(rows, columns)] = True
    apart += int(seen.size - seen.sum())
  return 1 - apart / weights
