"""Whether a rehearsal buffer's numbers fit, and its rows the memory."""

import bisect
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from mhil import buffer

SCOPES = ("global", "local")
SELECTIONS = ("stream", "herding")
PLACES = ("device", "host")
# So many along `data` are not proposed to anybody.
DEVICES = 256


def check(
  layout: buffer.Layout,
  batch: int,
  draws: int,
  candidates: int,
  selection: str,
  scope: str,
  place: str,
) -> None:
  """Raises ValueError for what does not fit; see `rehearsal.transform`."""
  w = layout.workers
  for field, value, known in (
    ("memory.scope", scope, SCOPES),
    ("memory.selection", selection, SELECTIONS),
    ("memory.place", place, PLACES),
  ):
    if value not in known:
      raise ValueError(
        f"{field}={value!r} is not known; use {' or '.join(known)}"
      )
  if place == "host" and jax.process_count() > 1:
    raise ValueError(
      "memory.place=host needs all workers in one process, of which there are "
      f"{jax.process_count()}; use memory.place=device"
    )
  if not 0 <= candidates <= batch:
    raise ValueError(
      f"memory.candidates={candidates} are not 0 to {batch}, the new samples "
      f"of train.batch; use memory.candidates={batch // 4 // w * w}"
    )
  if not 1 <= draws <= layout.size:
    fits = max(min(draws, layout.size) // w, 1) * w
    raise ValueError(
      f"memory.draws={draws} rows are not 1 to {layout.size}, those of "
      f"memory.size; use memory.draws={fits}"
    )
  limits = ("draws", draws, layout.size), ("candidates", candidates, batch)
  for name, number, most in limits:
    if number % w:
      near = min(max(1, round(number / w)), max(most // w, 1)) * w
      raise ValueError(
        f"memory.{name}={number} does not divide by mesh.data={w}; use {near}"
      )
  if selection == "herding" and layout.policy == "reservoir":
    raise ValueError(
      "memory.selection=herding keeps the best of each class, which "
      "memory.policy=reservoir does not know; use memory.policy=balanced"
    )


def check_room(
  layout: buffer.Layout, row_bytes: int, room: int, where: str
) -> None:
  """Raises ValueError if the rows need more than `room` bytes.

  Args:
    layout: whose slots.
    row_bytes: of one row.
    room: free bytes; of one device, or of the host for all.
    where: `device`, or `host`: all rows lie in the host's memory, as those of
      simulated devices do.
  """
  w = layout.workers
  asked = layout.slots * row_bytes * (w if where == "host" else 1)
  if asked <= room:
    return
  fixes = _fixes(layout, room // (asked // layout.slots), where)
  fix = ", or ".join(fixes or ("smaller images", "memory.size=0 for none"))
  place = "the host" if where == "host" else f"each of {w} devices"
  raise ValueError(
    f"memory.size={layout.size} rows of {row_bytes:,} bytes ask for "
    f"{asked:,} bytes on {place}, where {room:,} are available; use {fix}"
  )


def _fixes(layout: buffer.Layout, most: int, where: str) -> list[str]:
  """What leaves at most so many slots a worker; rows do not deal evenly."""
  policy, w, classes = layout.policy, layout.workers, layout.classes

  def slots(size: int, workers: int) -> int:
    return buffer.slots_for(policy, size, classes, workers)

  sizes = range(layout.groups, layout.size)
  smaller = bisect.bisect_right(sizes, most, key=lambda size: slots(size, w))
  fixes = [f"memory.size={sizes[smaller - 1]} or less"] if smaller else []
  workers = range(w + 1, DEVICES + 1) if where == "device" else range(0)
  more = bisect.bisect_left(
    workers, -most, key=lambda count: -slots(layout.size, count)
  )
  if more < len(workers):
    fixes.append(f"mesh.data={workers[more]} or more")
  return fixes


def check_heads(
  mesh: Mesh,
  objective: Any,
  optimizer: Any,
  heads: int,
  told: str,
  room: tuple[int, str] | None = None,
) -> None:
  """Raises ValueError if parameters and optimiser cannot have the room.

  It is the least that they take: a stage, or a subnet, is taken for its share
  of a branch.

  Args:
    mesh: where they lie.
    objective: whose branch.
    optimizer: of optax.
    heads: of the run.
    told: the field that makes them so large, and its value.
    room: free bytes, and of what, as `available` has it; None asks.
  """
  held = jax.eval_shape(objective.init, jax.random.key(0))[0]
  trees = held, jax.eval_shape(optimizer.init, held)
  each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))
  stats = mesh.local_mesh.devices.flat[0].memory_stats() or {}
  if room is None:
    limit = stats.get("bytes_limit")
    room = (_free(), "host") if limit is None else (limit, "device")
  free, where = room
  if where == "host":
    # Simulated devices share its memory.
    asked = each * heads * mesh.shape["data"]
  else:
    parts = mesh.shape["stage"] * mesh.shape["subnet"]
    asked = each * -(-heads // mesh.shape["head"]) // parts
  if asked > free:
    place = "the host" if where == "host" else "each device"
    raise ValueError(
      f"{told} makes heads of {each:,} bytes with their optimiser, which ask "
      f"for {asked:,} bytes on {place}, where {free:,} are available; use a "
      "smaller network, or more devices along mesh.head"
    )


def available(mesh: Mesh, place: str) -> tuple[int, str]:
  """Free bytes for rows, and where: see `check_room`.

  A save of rows on the host copies them first, so that half of its memory is
  all that they may take. Simulated devices share the host's memory too, and
  each head has a copy of its worker's rows there.
  """
  if place == "host":
    return _free() // 2, "host"
  local = mesh.local_mesh
  stats = local.devices.flat[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0), "device"
  return _free() * local.shape["data"] // local.size, "host"


def _free() -> int:
  """The host's memory that programs can still have, as far as it is known."""
  try:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
      if line.startswith("MemAvailable:"):
        return int(line.split()[1]) * 1024
  except OSError:
    pass
  # Not Linux: whoever asks for too much is told by the system.
  return sys.maxsize
