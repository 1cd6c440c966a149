"""Where a branch is cut into modules: published lists, and shapes.

A cut is the name of the piece after which a module ends.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mhil import networks, sharding

Modules = tuple[tuple[str, ...], ...]
Shape = tuple[int, ...]

# Of the released code of ContSup (arXiv 2312.07636), as stage.block; 0.0 is
# the stem. Balanced: for equal memory in every module, not for equal depth.
PUBLISHED = {
  "resnet32": {
    2: "2.1",
    4: "1.2 2.1 3.0",
    8: "1.0 1.2 1.4 2.1 2.3 3.0 3.2",
    16: "0.0 1.0 1.1 1.2 1.3 1.4 2.0 2.1 2.2 2.3 2.4 3.0 3.1 3.2 3.3",
  },
  "resnet110": {
    2: "2.8",
    4: "1.11 2.7 3.3",
    8: "1.4 1.11 2.0 2.7 2.14 3.3 3.10",
    16: "1.1 1.4 1.7 1.10 1.13 1.16 2.1 2.4 2.7 2.11 2.15 3.1 3.5 3.9 3.13",
  },
}
BALANCED = {
  "resnet32": {2: "1.3", 4: "1.2 1.4 2.2", 8: "1.1 1.2 1.3 2.1 2.2 3.1 3.2"},
  "resnet110": {2: "1.14", 3: "1.9 2.2", 4: "1.6 1.14 2.8"},
}


def published(name: str, k: int, balanced: bool = False) -> tuple[str, ...]:
  """The released list that cuts the branch `name` into `k` modules.

  Args:
    name: of a branch.
    k: number of modules; 1 has no cut.
    balanced: the list for equal memory.

  Raises:
    ValueError: where there is no list.
  """
  if k == 1:
    return ()
  lists = (BALANCED if balanced else PUBLISHED).get(name, {})
  if k not in lists:
    known = ", ".join(map(str, [1, *lists]))
    kind = "balanced" if balanced else "published"
    raise ValueError(
      f"local.modules={k} has no {kind} list for {name}; use one of {known}, "
      "local.lists=measured, or name the pieces in local.cuts"
    )
  places = [place.split(".") for place in lists[k].split()]
  return tuple(
    "stem" if stage == "0" else f"stage{stage}.block{block}"
    for stage, block in places
  )


def modules(branch: networks.Branch, cuts: int | Sequence[str]) -> Modules:
  """The names of each module's pieces, without the readout.

  Args:
    branch: what is cut.
    cuts: names of the pieces after which a module ends, or a number of
      modules with a published list.

  Raises:
    ValueError: for a cut outside the branch, twice, or out of order.
  """
  trunk = branch.pieces[:-1]
  if isinstance(cuts, int):
    cuts = published(branch.name, cuts)
  for cut in cuts:
    if cut not in trunk:
      raise ValueError(
        f"local.cuts={cut!r} is not inside {branch.name}; use some of "
        + ", ".join(trunk)
      )
  ends = [trunk.index(cut) + 1 for cut in cuts]
  if ends != sorted(set(ends)):
    raise ValueError(
      f"local.cuts={tuple(cuts)} repeats a piece or is out of order; use each "
      "piece once, in the order of the branch"
    )
  ends = [0, *ends, len(trunk)]
  return tuple(trunk[a:b] for a, b in itertools.pairwise(ends))


def interfaces(
  branch: networks.Branch, shape: Sequence[int], modules: Modules
) -> list[Shape]:
  """Shapes of one sample, of it after each module, and of its logits."""
  params, stats = jax.eval_shape(branch.init, jax.random.key(0))
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  shapes = [tuple(shape)]
  for module in (*modules, branch.pieces[-1:]):
    for name in module:
      run = partial(_evaluate, branch, name)
      x, _ = jax.eval_shape(run, params[name], stats[name], x)
    shapes.append(x.shape[1:])
  return shapes


def measured(
  branch: networks.Branch, shape: Sequence[int], k: int, batch: int = 32
) -> tuple[str, ...]:
  """Cuts that make the largest memory of a module as small as can be.

  What a module holds is taken for the sum of what its pieces hold, and that is
  read from a compiled gradient of each.

  Args:
    branch: any.
    shape: of one image.
    k: number of modules.
    batch: samples of the gradient.

  Raises:
    ValueError: for more modules than pieces.
  """
  trunk = branch.pieces[:-1]
  if k > len(trunk):
    raise ValueError(
      f"local.modules={k} is more than the {len(trunk)} pieces of "
      f"{branch.name}; use local.modules={len(trunk)} or less"
    )
  if k == 1:
    return ()  # Nothing to compile for.
  begins = balance(memory(branch, shape, batch), k)
  return tuple(trunk[i - 1] for i in begins)


def memory(
  branch: networks.Branch, shape: Sequence[int], batch: int
) -> list[int]:
  """Bytes that the gradient of each piece but the readout needs besides."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params, stats = jax.eval_shape(branch.init, jax.random.key(0))
  x: Any = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
  known: dict[str, int] = {}
  found = []
  for name in branch.pieces[:-1]:
    given = params[name], stats[name], x
    # Most pieces of a deep branch are alike.
    if (like := str(given)) not in known:
      known[like] = _temporary(partial(branch.piece, name), given, mesh)
    found.append(known[like])
    x, _ = jax.eval_shape(partial(_evaluate, branch, name), *given)
  return found


def _temporary(piece, given, mesh):
  def total(params, x, stats):
    y, stats = piece(params, stats, x, True)
    return jnp.sum(jnp.square(y.astype(jnp.float32))), stats

  def gradient(params, stats, x):
    grads, _ = jax.grad(total, (0, 1), has_aux=True)(params, x, stats)
    return grads

  # Normalisation may be over the mesh.
  spread = jax.shard_map(
    gradient,
    mesh=mesh,
    in_specs=(jax.P(), jax.P(), jax.P("data")),
    out_specs=(jax.P(), jax.P("data")),
  )
  params, stats, x = given
  x = jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P("data"))
  )
  compiled = jax.jit(spread).lower(params, stats, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def _evaluate(branch, name, params, stats, x):
  return branch.piece(name, params, stats, x, False)


def balance(costs: Sequence[int], parts: int) -> tuple[int, ...]:
  """Where to cut a row of costs, its dearest part as cheap as can be.

  Args:
    costs: of each element of the row.
    parts: how many, none empty.

  Returns:
    The index at which each part but the first begins.
  """
  n = len(costs)
  best: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {
    (i, 1): (sum(costs[:i]), ()) for i in range(1, n + 1)
  }
  for k in range(2, parts + 1):
    for i in range(k, n + 1):
      best[i, k] = min(
        (max(best[a, k - 1][0], sum(costs[a:i])), (*best[a, k - 1][1], a))
        for a in range(k - 1, i)
      )
  return best[n, parts][1]
