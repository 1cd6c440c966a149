r"""PAPER 5, residual form: residual blocks dealt to subnets (ResIST).

Dun, Wolfe, Jermaine, Kyrillidis, "ResIST: Layer-wise Decomposition of ResNets
for Distributed Training", UAI 2022, arXiv 2107.00961.

  a round:  permute the blocks of a section, deal them to n subnets
            subnet = stem, strided blocks, its own blocks, classifier
            J steps on its own samples; copy its blocks back
            average what all have: stem, strided blocks, classifier
  test:     x + y / n in place of x + y in every dealt block

Mesh axis: `subnet`. Collectives over it: none in a step; an exchange has one
all-to-all of the dealt blocks of a section and an all-reduce of the rest.

The paper's: the above, and to deal the longest section only. Ours: where n
does not divide the blocks of a section, its first ones are shared like its
strided one; statistics of dealt blocks move with them, those of shared layers
are averaged.
"""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp

from mhil import cutting, layers
from mhil.cutting import Cut
from mhil.networks import Branch

Tree = Any
DEALT = ("longest", "all")
_BLOCK = re.compile(r"(stage\d+)\.block(\d+)")


def sections(branch: Branch, parts: int, dealt: str = "longest") -> Cut:
  """Cuts the sections of a residual network between their blocks.

  Args:
    branch: `networks.resnet_cifar` or `networks.resnet18`.
    parts: n.
    dealt: the `longest` section alone, or `all`. Strided blocks make a section
      longer though they are not dealt.

  Raises:
    ValueError: for another `dealt`, or if no section has n blocks of one shape.
  """
  chosen = _chosen(branch, parts, dealt)
  counts = {name: len(found) for name, found in chosen.items()}
  first = {name: found[0] for name, found in chosen.items()}

  def place(path):
    """The stacked leaf's name, and the block's place in it if it is dealt."""
    name = cutting.name_of(path)
    found = _BLOCK.search(name)
    if not found or found[1] not in first:
      return name, None
    i = int(found[2]) - first[found[1]]
    return (name, None) if i < 0 else (_BLOCK.sub(r"\1", name), i)

  def flat(trees):
    leaves: dict[str, Any] = {}
    stacks: dict[str, dict[int, Any]] = {}
    for path, x in jax.tree.leaves_with_path(trees):
      name, i = place(path)
      if i is None:
        leaves[name] = x
      else:
        stacks.setdefault(name, {})[i] = x
    for name, each in stacks.items():
      leaves[name] = jnp.stack([each[i] for i in sorted(each)])
    return leaves

  def grow(leaves, like):
    def leaf(path, _):
      name, i = place(path)
      return leaves[name] if i is None else leaves[name][i]

    return jax.tree_util.tree_map_with_path(leaf, like)

  def axes(name):
    section = name.rpartition("|")[2].partition(".")[0]
    dealt = section in counts and not _BLOCK.search(name)
    return (section,) if dealt else ()

  return Cut(parts, counts, axes, flat, grow)


def _chosen(branch: Branch, parts: int, dealt: str) -> dict[str, list[int]]:
  """`{section: its last blocks}` that are dealt."""
  if dealt not in DEALT:
    raise ValueError(
      f"subnets.dealt={dealt!r} is not known; use one of {', '.join(DEALT)}"
    )
  alike = _alike(branch)
  if not alike:
    raise ValueError(
      f"{branch.name} has nothing to cut into mesh.subnet={parts}: no residual "
      "blocks; use network.name=resnet20, or subnets.neurons for an mlp"
    )
  if dealt == "longest":
    found = filter(None, map(_BLOCK.fullmatch, branch.pieces))
    blocks = collections.Counter(match[1] for match in found)
    longest = max(alike, key=lambda name: (blocks[name], len(alike[name])))
    alike = {longest: alike[longest]}
  most = max(map(len, alike.values()))
  if most < parts:
    raise ValueError(
      f"mesh.subnet={parts} is more than the {most} blocks of one shape "
      f"in a section of {branch.name}; use mesh.subnet={most} or less"
    )
  return {
    name: found[len(found) % parts :]
    for name, found in alike.items()
    if len(found) >= parts
  }


def subnet(branch: Branch, cut: Cut) -> Branch:
  """The branch of one part: all shared pieces, an n-th of the dealt ones."""
  held = list(branch.pieces)
  for name, found in _alike(branch).items():
    if name in cut.units:
      gone = cut.units[name] - cut.units[name] // cut.parts
      for i in found[len(found) - gone :]:
        held.remove(f"{name}.block{i}")
  return _chain(branch, tuple(held))


def _chain(branch: Branch, pieces: tuple[str, ...]) -> Branch:
  """Some pieces of a branch, in their order."""

  def init(key):
    trees = branch.init(key)
    params, stats = ({name: tree[name] for name in pieces} for tree in trees)
    return params, stats

  def features(params, stats, x, train):
    stats = dict(stats)
    for name in pieces[:-1]:
      of = params[name], stats[name]
      x, stats[name] = branch.piece(name, *of, x, train)
    return layers.global_mean(jnp.asarray(x)), stats

  def apply(params, stats, x, train):
    x, stats = features(params, stats, x, train)
    last = params["readout"], stats["readout"], x, train
    logits, stats["readout"] = branch.piece("readout", *last)
    return logits, stats

  return branch._replace(
    name=f"{len(pieces)} pieces of {branch.name}",
    pieces=pieces,
    init=init,
    apply=apply,
    features=features,
  )


def scaled(branch: Branch, cut: Cut) -> Branch:
  """The branch with every dealt block's residual divided by n.

  A block ends with `norm2`, whose scale and shift are divided.
  """
  first = {
    name: found[len(found) - cut.units[name]]
    for name, found in _alike(branch).items()
    if name in cut.units
  }

  def divided(params):
    def leaf(path, x):
      found = _BLOCK.fullmatch(path[0].key)
      dealt = found and int(found[2]) >= first.get(found[1], 10**9)
      return x / cut.parts if dealt and path[1].key == "norm2" else x

    return jax.tree_util.tree_map_with_path(leaf, params)

  return branch._replace(
    name=f"{branch.name}, residuals / {cut.parts}",
    apply=lambda p, s, x, t: branch.apply(divided(p), s, x, t),
    features=lambda p, s, x, t: branch.features(divided(p), s, x, t),
  )


def _alike(branch: Branch) -> dict[str, list[int]]:
  """`{section: its last blocks}` that have one shape."""
  params, stats = jax.eval_shape(branch.init, jax.random.key(0))
  found: dict[str, list[int]] = {}
  for piece in reversed(branch.pieces):
    if not (match := _BLOCK.fullmatch(piece)):
      continue
    section, i = match[1], int(match[2])
    last = found.setdefault(section, [i])
    form, wanted = (
      jax.tree.map(lambda x: x.shape, (params[name], stats[name]))
      for name in (piece, f"{section}.block{last[-1]}")
    )
    if i != last[-1] and form == wanted:
      last.insert(0, i)
  return {name: blocks for name, blocks in reversed(found.items())}
