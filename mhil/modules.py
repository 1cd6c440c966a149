"""PAPER 3: a branch in gradient-isolated modules, and what stands between.

The maths is in `local`; this file decides which nets exist, and builds them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mhil import auxiliary, networks, pieces
from mhil import cuts as cuts_lib

Tree = dict[str, Any]
Weights = tuple[float, float]
# Rn: interface j reads the last min(n, j+1) inputs of modules, the oldest of
# which is the image; E: it reads the image, and R1E min(1, j) inputs besides.
OUT = -1  # What left the module before, among numbers of modules.
MODES = ("R0", "E", "R1", "R1E", "R2", "R4", "R8", "R16")
CHOICES = {
  "mode": MODES,
  "classifier": auxiliary.CLASSIFIERS,
  "loss": ("softmax", "contrast"),
}


class Method(NamedTuple):
  """How modules learn.

  Attributes:
    mode: the context they get.
    classifier: how many convolutions and dense layers an auxiliary one has.
    loss: of the classifiers: `softmax`, which is the head's own loss, or
      `contrast` of all classes in the batch.
    restore, task: weights of the two losses at the first and at the last cut,
      linear in between. InfoPro restores; ContSup may, DGL does not.
    pixels: `(mean, std)` that undo the normalisation, to pixels in [0, 1];
      asked for where something is restored.
    isolated: False trains the same network, encoders included, end to end:
      the control for what encoders add by their size alone.
    hidden: units of a classifier's hidden layers, and features contrasted.
  """

  mode: str = "R0"
  classifier: str = "1c2f"
  loss: str = "softmax"
  restore: Weights = (0.0, 0.0)
  task: Weights = (1.0, 1.0)
  pixels: tuple[Sequence[float], Sequence[float]] | None = None
  isolated: bool = True
  hidden: int = 128


GREEDY = Method(classifier="0c1f")
DGL = Method(classifier="1c2f")


class Split(NamedTuple):
  """A branch in modules.

  Attributes:
    branch: the whole.
    modules: names of each module's pieces; the last owns the readout too.
    nets: `enc{j}`, `resenc{j}_{r}`, `aux{j}`, `decoder{j}` of interface j.
    contexts: for each module, the encoders before it and the module whose
      input each of them reads.
    weights: for each interface, `(restore, task)`.
    method: as handed in.
  """

  branch: networks.Branch
  modules: cuts_lib.Modules
  nets: pieces.Pieces
  contexts: tuple[tuple[tuple[str, int], ...], ...]
  weights: tuple[Weights, ...]
  method: Method


def split(
  branch: networks.Branch,
  shape: Sequence[int],
  cuts: int | Sequence[str],
  method: Method = DGL,
) -> Split:
  """Cuts a branch and builds the nets of its interfaces.

  Args:
    branch: with feature maps at the cuts; dense features allow no context and
      classifiers without convolutions.
    shape: of one image.
    cuts: see `cuts.modules`.
    method: how the modules learn.

  Raises:
    ValueError: names the field, its value and the fix.
  """
  modules = cuts_lib.modules(branch, cuts)
  _check(method, modules)
  shapes = cuts_lib.interfaces(branch, shape, modules)
  n = len(modules) - 1
  contexts = ((), *(_contexts(j, method.mode) for j in range(n)))
  weights = tuple(_weights(j, n, method) for j in range(n))
  _check_interfaces(method, branch.name, shapes[1:-2], weights)
  nets = pieces.build(_makers(branch, shapes, contexts, weights, method))
  return Split(branch, modules, nets, contexts, weights, method)


def owned(cut: Split, group: Sequence[int]) -> list[str]:
  """Names of the parameters of some modules and of the nets that they train."""
  names = []
  for j in group:
    names += [name for name, _ in cut.contexts[j]] + list(cut.modules[j])
    names += [n for n in (f"aux{j}", f"decoder{j}") if n in cut.nets.names]
    names += ["readout"] if j == len(cut.modules) - 1 else []
  return names


def used(cut: Split, params: Tree) -> Tree:
  """The parameters that predict, without classifiers and decoders."""
  aside = [n for n in cut.nets.names if n.startswith(("aux", "decoder"))]
  return {name: part for name, part in params.items() if name not in aside}


def check_stages(cut: Split, count: int) -> None:
  """Raises ValueError for modules that do not fit `count` devices."""
  if not cut.method.isolated:
    raise ValueError(
      f"local.isolated=false sends gradients back, and mesh.stage={count} only "
      "features forward; use mesh.stage=1"
    )
  if count > len(cut.modules):
    raise ValueError(
      f"mesh.stage={count} is more than the {len(cut.modules)} modules of the "
      f"branch; use mesh.stage={len(cut.modules)} or less, or more modules"
    )


def crossings(cut: Split, shape: Sequence[int]) -> tuple[dict[int, Any], ...]:
  """What reaches each module, but the image: shapes of one sample.

  Under `OUT` what left the module before, under its number the input of an
  earlier module that an encoder from here on reads. None reaches the first.
  """
  _, *reached = cuts_lib.interfaces(cut.branch, shape, cut.modules)
  dtype = cut.branch.numerics.dtype

  def input_of(i):
    return jax.ShapeDtypeStruct(reached[i - 1], dtype)

  found: list[dict[int, Any]] = [{}]
  for j in range(1, len(cut.modules)):
    later = (source for c in cut.contexts[j:] for _, source in c)
    used = sorted({source for source in later if 0 < source < j})
    found.append({OUT: input_of(j)} | {i: input_of(i) for i in used})
  return tuple(found)


def sees_image(cut: Split, j: int) -> bool:
  """Whether module `j` reads the image, for its encoder or its decoder."""
  encoded = any(source == 0 for _, source in cut.contexts[j])
  return encoded or f"decoder{j}" in cut.nets.names


def _reach(mode):
  return int(mode.strip("RE") or 0)


def _contexts(j, mode):
  """Encoders of interface j; the image is the input of module 0."""
  sees_image = mode.endswith("E")
  image = [(f"enc{j}", 0)] if sees_image else []
  # An encoder of the image makes a second way to it superfluous.
  back = range(min(_reach(mode), j if sees_image else j + 1))
  return (*image, *((f"resenc{j}_{r}", j - r) for r in back))


def _weights(j, count, method):
  if not method.isolated:
    return (0.0, 0.0)
  share = j / (count - 1) if count > 1 else 0.0
  ends = method.restore, method.task
  return tuple((1 - share) * first + share * last for first, last in ends)


def _makers(branch, shapes, contexts, weights, method):
  """What builds each net that something uses."""
  image, *interfaces, last, (outputs,) = shapes
  out = outputs if method.loss == "softmax" else method.hidden
  classifier = out, method.classifier, last[-1], method.hidden
  makers = {}

  def add(name, net, *arguments):
    makers[name] = lambda rngs: net(*arguments, branch.numerics, rngs=rngs)

  for j, (shape, (restore, task)) in enumerate(zip(interfaces, weights)):
    for name, source in contexts[j + 1]:
      k = 3 if name.startswith("enc") else 1
      add(name, auxiliary.Encoder, shapes[source][-1], shape, k)
    if task:
      add(f"aux{j}", auxiliary.Classifier, shape[-1], *classifier)
    if restore:
      add(f"decoder{j}", auxiliary.Decoder, shape[-1], image)
  return makers


def _check(method, modules):
  for field, known in CHOICES.items():
    value = getattr(method, field)
    if value not in known:
      raise ValueError(
        f"local.{field}={value!r} is not known; use one of {', '.join(known)}"
      )
  k = len(modules)
  fits = [mode for mode in MODES if _fits(mode, k)]
  if method.mode not in fits:
    raise ValueError(
      f"local.mode={method.mode} asks for more context than {k} modules have; "
      f"use {' or '.join(fits)}"
    )


def _fits(mode, k):
  """Whether the last of `k` modules has all the context that a mode names."""
  if mode == "R0":
    return True
  # K - 1 inputs lie before it, and R1E counts none that is the image.
  before = k - 2 if _reach(mode) and mode.endswith("E") else k - 1
  # The release has R4 in 4 modules, R8 in 8 and R16 in 16, where the oldest
  # input that they ask for is missing everywhere.
  return k > 1 and (_reach(mode) <= before or _reach(mode) == k >= 4)


def _check_interfaces(method, name, interfaces, weights):
  plain = method.mode == "R0" and not any(method.restore)
  flat = any(len(shape) == 1 for shape in interfaces)
  if flat and not (plain and method.classifier.startswith("0")):
    raise ValueError(
      f"local.mode={method.mode} with local.classifier={method.classifier} "
      f"needs feature maps, and {name} has none at a cut; use R0 with 0c1f or "
      "0c2f, and restore nothing"
    )
  if method.isolated and any(method.restore) and method.pixels is None:
    raise ValueError(
      f"local.restore={method.restore} asks for pixels, and pixels=None does "
      "not say how images were normalised; use pixels=(mean, std)"
    )
  if method.isolated and (0, 0) in weights:
    raise ValueError(
      f"local.task={method.task} leaves module {weights.index((0, 0))} without "
      "a loss; use weights above 0, or local.restore"
    )
