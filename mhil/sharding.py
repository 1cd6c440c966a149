"""The device mesh, placement on it, and an audit of compiled programs.

One mesh with four axes, always all four: an unused axis has size 1, so that
every partition spec is valid everywhere. What a program moves between devices
is read from the HLO that XLA compiled, by `collectives`.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mhil import across

AXES = ("data", "head", "stage", "subnet")


def make_mesh(
  *,
  data: int = 1,
  head: int = 1,
  stage: int = 1,
  subnet: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Builds the mesh over the first `data * head * stage * subnet` devices.

  Args:
    data, head, stage, subnet: devices that share the samples, the heads, the
      depth, the width.
    devices: what to build from, in order; `jax.devices()` if None.

  Returns:
    A mesh with the four explicit axes `AXES`, also those of size 1.

  Raises:
    ValueError: a size is not a positive whole number, or the sizes ask for
      more devices than there are.
  """
  sizes = dict(zip(AXES, (data, head, stage, subnet)))
  for axis, size in sizes.items():
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise ValueError(
        f"mesh.{axis}={size!r} is not a positive whole number; use "
        f"mesh.{axis}=1 to leave this axis unused"
      )
  wanted = math.prod(sizes.values())
  found = list(across.devices(wanted, stage) if devices is None else devices)
  if wanted > len(found):
    raise ValueError(_too_few(sizes, found))
  return jax.sharding.Mesh(
    np.array(found[:wanted]).reshape(tuple(sizes.values())),
    AXES,
    axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES),
  )


def _too_few(sizes: dict[str, int], found: list[jax.Device]) -> str:
  wanted = math.prod(sizes.values())
  asked = " x ".join(f"mesh.{a}={n}" for a, n in sizes.items() if n > 1)
  platform = found[0].platform if found else "usable"
  fix = "simulate devices with JAX_PLATFORMS=cpu"
  if platform == "cpu":
    fix = f"set XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
  return (
    f"{asked or 'mesh'} asks for {wanted} devices, {len(found)} {platform} "
    f"devices are there; use a smaller axis or {fix}"
  )


def simulate(devices: int) -> None:
  """Asks for at least so many simulated CPU devices in this process.

  Comes before the first use of jax. More devices asked for by `XLA_FLAGS` or
  by an earlier call stay; an accelerator stays the default platform.

  Args:
    devices: of this process; with several processes, each one's own share.

  Raises:
    ValueError: `devices` is not positive.
    RuntimeError: jax has started already, on the CPU, with too few devices.
  """
  if devices < 1:
    raise ValueError(f"devices={devices} is not positive; use devices=1")
  # jax lets its own option win over the flag, so a larger flag is carried over.
  flags = os.environ.get("XLA_FLAGS", "")
  known = re.findall(r"host_platform_device_count=(\d+)", flags)[-1:]
  option = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  wanted = max(devices, option, *map(int, known))
  try:
    jax.config.update("jax_num_cpu_devices", wanted)
  except RuntimeError:
    found = jax.local_device_count()
    if jax.default_backend() == "cpu" and found < devices:
      raise RuntimeError(
        f"devices={devices}, but jax has started with {found}; simulate before "
        "the first use of jax, or set "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
      ) from None


def place(tree: Any, mesh: jax.sharding.Mesh, spec: jax.P) -> Any:
  """Puts every array of `tree` on `mesh`, all with the same `spec`."""
  return across.put(tree, jax.NamedSharding(mesh, spec))


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Puts a copy of every array of `tree` on each device of `mesh`."""
  return place(tree, mesh, jax.P())


class Collective(NamedTuple):
  """One collective instruction of a compiled program.

  Attributes:
    kind: all-reduce, all-gather, reduce-scatter, all-to-all,
      ragged-all-to-all, collective-permute or collective-broadcast, whether
      synchronous or not.
    bytes: size of the instruction's result on one device for one execution.
      All-reduce: the reduced arrays. All-gather: the gathered ones, so group
      size times what a device gives. Reduce-scatter: the piece that a device
      keeps. The others: what a device holds afterwards, with its own part.
      Not what crosses a link: that depends on the algorithm.
    axes: mesh axes, in the mesh's order, along which devices that exchange
      something differ.
  """

  kind: str
  bytes: int
  axes: tuple[str, ...]


def collectives(
  compiled: jax.stages.Compiled | str, mesh: jax.sharding.Mesh
) -> list[Collective]:
  """Lists what a compiled program moves between the devices of its mesh.

  Every instruction counts once: one inside a loop's body too, however often
  the loop runs, and one in a branch too, even if it is never taken. A
  collective in which no device has a partner moves nothing and is left out.
  Sends, receives and custom calls are not seen.

  Args:
    compiled: `jax.jit(f).lower(...).compile()`, or its `as_text()`.
    mesh: the mesh that the program was compiled for.

  Returns:
    The collectives in the order of the text, which is not that of execution.

  Raises:
    ValueError: the program is not for this mesh, or its text is not understood.
  """
  text = compiled if isinstance(compiled, str) else (compiled.as_text() or "")
  _check_size(text.partition("\n")[0], mesh)
  found = []
  for line in text.splitlines():
    match = _INSTRUCTION.match(line)
    if match is None:
      continue
    shape, kind, start, rest = match.groups()
    if axes := _axes(_groups(kind, rest, mesh.size), mesh):
      size = _bytes(_result(kind, shape, started=start is not None))
      found.append(Collective(kind, size, axes))
  return found


def bytes_over(found: Iterable[Collective], axis: str) -> int:
  """Sums the bytes of the collectives that span `axis`, alone or with others.

  Raises:
    ValueError: `axis` is none of `AXES`.
  """
  if axis not in AXES:
    raise ValueError(f"axis={axis!r} is no mesh axis; use one of {AXES}")
  return sum(c.bytes for c in found if axis in c.axes)


# `name = shape opcode(operands), attributes`. A shape has no quotes, so an
# opcode's name inside the metadata's strings cannot match.
_INSTRUCTION = re.compile(
  r'\s*(?:ROOT\s+)?%?[\w.\-]+\s*=\s*(?P<shape>[^"%]+?)\s+'
  r"(?P<kind>all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|"
  r"collective-(?:permute|broadcast))(?P<start>-start)?\((?P<rest>.*)"
)
_WRONG_MESH = (
  "mesh has {} devices, the program has {}; pass the mesh it is compiled for"
)
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(
  r"mesh\[([^\]]*)\](?:,\s*device_ids=\(((?:[^()]|\([^()]*\))*)\))?"
  r"\s*\{([^}]*)\}"
)


def _check_size(header: str, mesh: jax.sharding.Mesh) -> None:
  sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
  if sizes and math.prod(map(int, sizes)) != mesh.size:
    raise ValueError(_WRONG_MESH.format(mesh.size, " x ".join(sizes)))


def _result(kind: str, shape: str, *, started: bool) -> str:
  shape = re.sub(r"\{[^{}]*\}", "", shape)  # layouts
  if not started or not shape.startswith("("):
    return shape
  parts = _split(shape[1:-1])
  # Only all-reduce-start has the shape of its result, which is a tuple where
  # several are combined. The others have (operands, results, contexts...).
  if kind == "all-reduce" and not parts[0].startswith("("):
    return shape
  return parts[1]


def _split(shapes: str) -> list[str]:
  parts, depth = [""], 0
  for char in shapes:
    depth += (char in "([") - (char in ")]")
    if char == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += char
  return [part.strip() for part in parts]


def _bytes(shape: str) -> int:
  total = 0
  for dtype, sizes in re.findall(r"(\w+)\[([^\]]*)\]", shape):
    # The first number of a type's name is its width: bf16, f8e4m3fn, s4, c64.
    width = re.match(r"(?:bf|[fsuc])(\d+)", dtype)
    if width is None and dtype not in ("pred", "token"):
      raise ValueError(f"dtype={dtype!r} of {shape} is unknown; teach _bytes")
    bits = int(width[1]) if width else 8 * (dtype == "pred")
    total += -(-math.prod(map(int, re.findall(r"\d+", sizes))) * bits // 8)
  return total


def _groups(kind: str, rest: str, size: int) -> list[np.ndarray]:
  """Groups of positions in the mesh's flat order that exchange something."""
  name = "source_target_pairs" if "permute" in kind else "replica_groups"
  _, _, value = rest.partition(name + "=")
  if listed := re.match(r"\{((?:\s*\{[\d,\s]*\},?)*)\s*\}", value):
    groups = [_ints(g) for g in re.findall(r"\{([^}]*)\}", listed[1])]
    if not groups and name == "replica_groups":
      groups = [np.arange(size)]
  elif iota := _IOTA.match(value):
    groups = list(_iota(iota).reshape(_ints(iota[1])))
  elif named := _MESH.match(value):
    groups = _named(*named.groups())
  else:
    raise ValueError(f"{name} of {kind}({rest[:200]} is not understood")
  _check_cover(kind, groups, size)
  return groups


def _check_cover(kind: str, groups: list[np.ndarray], size: int) -> None:
  ids = sorted(int(i) for group in groups for i in group)
  partial = kind in ("collective-permute", "collective-broadcast")
  if max(ids, default=0) >= size or not (partial or ids == list(range(size))):
    raise ValueError(_WRONG_MESH.format(size, f"{kind} over {len(set(ids))}"))


def _ints(text: str) -> np.ndarray:
  return np.array(re.findall(r"\d+", text), int)


def _iota(match: re.Match[str]) -> np.ndarray:
  dims = _ints(match[2] or match[1])
  order = _ints(match[3]) if match[3] else np.arange(len(dims))
  return np.arange(math.prod(dims)).reshape(dims).transpose(order).ravel()


def _named(axes: str, devices: str | None, grouped: str) -> list[np.ndarray]:
  """Groups of XLA's own mesh, whose axes need not be those of ours."""
  sizes = {a: int(n) for a, n in re.findall(r"(\w+)'?=(\d+)", axes)}
  coords = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
  # `a` is a whole axis; `a:(p)n` the part of n after major parts of product p.
  for axis, before, part in re.findall(
    r"([A-Za-z_]\w*)'?(?::\((\d+)\)(\d+))?", grouped
  ):
    count = int(part or sizes[axis])
    step = sizes[axis] // (int(before or 1) * count)
    row = coords[list(sizes).index(axis)]
    row -= row // step % count * step
  ids = np.arange(coords.shape[1])
  if devices:
    iota = _IOTA.match(devices)
    ids = _iota(iota) if iota else _ints(devices)
  # What is left of the coordinates is what a group has in common.
  _, label = np.unique(coords, axis=1, return_inverse=True)
  return [ids[label.ravel() == i] for i in np.unique(label)]


def _axes(groups: list[np.ndarray], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  coords = np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1)
  spans = [any(np.ptp(along[g]) for g in groups) for along in coords]
  return tuple(a for a, spanned in zip(mesh.axis_names, spans) if spanned)
