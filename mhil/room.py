"""Whether a rehearsal buffer's numbers fit, and its rows the memory."""

import os

import jax
from jax.sharding import Mesh

from mhil.buffer import Layout

SCOPES = ("global", "local")
SELECTIONS = ("stream", "herding")
PLACES = ("device", "host")


def check(
  layout: Layout,
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
    raise ValueError(
      f"memory.draws={draws} rows are not 1 to {layout.size}, those of "
      f"memory.size; use memory.draws={max(1, min(draws, layout.size))}"
    )
  for name, number in ("draws", draws), ("candidates", candidates):
    if number % w:
      raise ValueError(
        f"memory.{name}={number} does not divide by mesh.data={w}; use "
        f"{max(1, round(number / w)) * w}"
      )
  if selection == "herding" and layout.policy == "reservoir":
    raise ValueError(
      "memory.selection=herding keeps the best of each class, which "
      "memory.policy=reservoir does not know; use memory.policy=balanced"
    )


def check_room(layout: Layout, row_bytes: int, room: int, place: str) -> None:
  """Raises ValueError if the rows of a device need more than `room` bytes.

  Args:
    layout: whose slots.
    row_bytes: of one row.
    room: free bytes of each device, or the host's share for it.
    place: `device` or `host`.
  """
  asked = layout.slots * row_bytes
  if asked > room:
    fits = room // row_bytes * layout.workers
    where = {"device": "on each", "host": "in the host's memory for each"}
    raise ValueError(
      f"memory.size={layout.size} rows of {row_bytes:,} bytes ask for "
      f"{asked:,} bytes {where[place]} of {layout.workers} devices along "
      f"mesh.data, where {room:,} are available; use memory.size={fits} or "
      f"less, or mesh.data={-(-layout.workers * asked // max(room, 1))} or more"
    )


def available(mesh: Mesh, place: str) -> int:
  """Free bytes for a device's rows; simulated devices share the host's."""
  if place == "device":
    stats = mesh.local_mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" in stats:
      return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if place == "host":  # Where heads repeat the workers, rows lie there once.
    return free // mesh.local_mesh.shape["data"]
  return free // len(mesh.local_mesh.devices.flat)
