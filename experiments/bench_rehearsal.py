"""Suite `rehearsal`: what drawing and storing cost, alone and in a step.

(a) draws and stores alone, by devices and size of the buffer; (b) a training
step that rehearses, beside one that finds as many samples in memory.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import jax

from experiments import measure
from experiments import rehearsal_steps as steps
from experiments.rehearsal_steps import CLASSES, WIDTHS, Case, Setup
from mhil import sharding

DEVICES = (1, 2, 4, 8)
REPETITIONS = 21
SETUPS = Setup(32), Setup(32, 128, 32, 128), Setup(224), Setup(224, 56, 14, 56)
# All buffers of a side are held at once. 100,000 rows of 224x224x3 are 15 GB.
MOST_BYTES = 2**32
SIZES = {32: (1_000, 10_000, 100_000), 224: (1_000, 5_000, 20_000)}
# With 56 rows of 224x224 a step on eight simulated devices takes half a minute
# and 9 GB; a quarter of the rows has the same shares of each.
WHOLE_STEPS = (Setup(32), 41), (Setup(224, 16, 4, 2), 11)


def alone(
  setups: Sequence[Setup] = SETUPS,
  devices: Sequence[int] = DEVICES,
  sizes: dict[int, Sequence[int]] | None = None,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(a) A draw and a store by themselves."""
  rows: list[dict[str, Any]] = []
  for setup in setups:
    for n in (n for n in devices if n <= len(jax.devices())):
      cases = [Case(setup, size, n) for size in (sizes or SIZES)[setup.side]]
      rows += _alone(cases, n, repetitions)
  columns = {
    **{"side": "pixels", "bcr": "b/c/r", "devices": "devices"},
    **{"size": "rows", "draw_ms": "ms a draw", "store_ms": "ms a store"},
    **{"growth": "draw, ratio", "grown": "store, ratio"},
    **{"temporary": "temporary MiB", "all_to_all": "all-to-all"},
    **{"chunk": "chunk", "moved": "bytes moved"},
    **{"wanted": "bytes wanted", "padding": "bytes of padding"},
  }
  note = (
    f"Policy `per_class`, {CLASSES} classes, uint8 rows of side x side x 3; "
    "b, c, r for each device, the size of the buffer over all of them, and "
    "full. Times are of all devices together, medians of "
    f"{repetitions} repetitions taken in turn; ratios, within a repetition, to "
    "the smallest buffer with as large an exchange. Temporary memory of the "
    "larger program and bytes of one exchange are per device, from the "
    "compiled programs. At 224x224 what is held at once stays within "
    f"{MOST_BYTES / 2**30:.0f} GiB, so that buffer ends at "
    f"{SIZES[224][-1]:,} rows."
  )
  title = "Draws and stores alone"
  return measure.Table(title, note, columns, rows, _read_alone(rows))


def _alone(cases: list[Case], n: int, repetitions: int) -> list[dict[str, Any]]:
  pairs = [(case.drawer(), case.storer()) for case in cases]
  steppers = [program[0] for pair in pairs for program in pair]
  walls, _ = measure.turns(steppers, repetitions)
  rows = []
  for i, (case, pair) in enumerate(zip(cases, pairs)):
    found = sharding.collectives(pair[0][1], case.mesh)
    usage = [program.memory_analysis() for _, program in pair]
    draws, stores = walls[2 * i : 2 * i + 2]
    rows.append(
      case.setup.labels(n)
      | {"size": case.size, "chunk": case.chunk or "-", "walls": draws}
      | {"draw_ms": statistics.median(draws)}
      | {"store_ms": statistics.median(stores)}
      | {"temporary": max(use.temp_size_in_bytes for use in usage if use)}
      | {"all_to_all": len(found), "moved": sum(c.bytes for c in found)}
      | case.traffic()._asdict()
      | {"stores": stores}
    )
  for row in rows:
    # A worker of few slots can send few rows, so its exchange is smaller.
    first = next(one for one in rows if one["moved"] == row["moved"])
    row["growth"] = measure.ratio(row, first)
    row["grown"] = measure.ratio(
      {"walls": row.pop("stores")}, {"walls": walls[1]}
    )
  return rows


def _read_alone(rows: list[dict[str, Any]]) -> list[str]:
  lines = []
  for side in dict.fromkeys(row["side"] for row in rows):
    mine = [row for row in rows if row["side"] == side]
    large = [row for row in mine if row["size"] == mine[-1]["size"]]
    draws, stores = ([row[key] for row in large] for key in ("growth", "grown"))
    lines.append(
      f"{side}x{side}, {mine[-1]['size']:,} rows: a draw takes "
      f"{min(draws):.2f} to {max(draws):.2f} times as long as from the "
      "smallest buffer with as large an exchange, a store "
      f"{min(stores):.2f} to {max(stores):.2f} times; their temporary memory "
      f"differs by {_apart(mine):,} bytes at most."
    )
  moved = [row for row in rows if row["all_to_all"]]
  right = sum(row["moved"] == row["wanted"] + row["padding"] for row in moved)
  lines.append(
    f"Of {len(moved)} programs on several devices {right} move what is "
    "stated, in "
    f"{max((row['all_to_all'] for row in moved), default=0)} all-to-all."
  )
  return lines


def _apart(rows: list[dict[str, Any]]) -> int:
  """How much temporary memory differs where the exchange does not."""
  kinds: dict[tuple, list[int]] = {}
  for row in rows:
    kind = row["bcr"], row["devices"], row["moved"]
    kinds.setdefault(kind, []).append(row["temporary"])
  return max(max(found) - min(found) for found in kinds.values())


def whole(
  setups: Sequence[tuple[Setup, int]] = WHOLE_STEPS,
  devices: Sequence[int] = DEVICES,
  size: int = 1_000,
) -> measure.Table:
  """(b) A training step with b + r samples, from memory or rehearsed.

  Args:
    setups: each with its number of repetitions.
    devices: how many.
    size: rows of the buffer.
  """
  rows = []
  for setup, repetitions in setups:
    for n in (n for n in devices if n <= len(jax.devices())):
      case = Case(setup, size, n)
      both = [steps.plain(case), steps.rehearsing(case)]
      walls, _ = measure.turns(both, repetitions)
      plain, ours = ({"walls": each} for each in walls)
      rows.append(
        setup.labels(n)
        | {"repetitions": repetitions}
        | {"plain_ms": statistics.median(walls[0])}
        | {"ms": statistics.median(walls[1]), "walls": walls[1]}
        | {"growth": measure.ratio(ours, plain)}
      )
  columns = {
    **{"side": "pixels", "bcr": "b/c/r", "devices": "devices"},
    "repetitions": "repetitions",
    **{"plain_ms": "ms, b + r from memory", "ms": "ms, rehearsing"},
    "growth": "ratio",
  }
  note = (
    f"Convnet {WIDTHS[0]}-{WIDTHS[1]}, plain SGD, gradients summed over the "
    f"devices; a buffer of {size:,} rows. Both steps train on b + r samples a "
    "device. One gathers all of them from samples in memory; the other gathers "
    "b, takes r that the step before drew, draws for the next and stores of "
    "its own. Medians of repetitions taken in turn; the ratio is the median "
    "within a repetition."
  )
  most = max(row["growth"] for row in rows)
  reading = [f"Rehearsal costs {100 * (most - 1):.1f} % of a step at most."]
  return measure.Table("Share of a step", note, columns, rows, reading)


def overlap(
  setup: Setup | None = None,
  size: int = 15_000,
  repetitions: int = 50,
  folder: str = "runs/rehearsal_trace",
) -> measure.Table:
  """(c) ResNet-18 on accelerators: with the buffer, and a profile of it.

  The exchange shows in the profile where there are several devices.

  Args:
    setup: None for ResNet-18 on 32x32, where there is an accelerator.
    size: rows of the buffer.
    repetitions: steps.
    folder: where the profile of five steps goes, for TensorBoard or Perfetto.
  """
  columns = {
    **{"bcr": "b/c/r", "devices": "devices"},
    **{"alone": "images/s, b alone", "plain": "images/s, b + r from memory"},
    **{
      "ours": "images/s, rehearsing",
      "growth": "ratio of the last two's times",
    },
  }
  title = "ResNet-18"
  if setup is None and jax.devices()[0].platform == "cpu":
    reading = ["Not measured here: it needs an accelerator."]
    return measure.Table(title, "", columns, [], reading)
  setup = setup or Setup(32, network="resnet18")
  case = Case(setup, size, len(jax.devices()))
  ways = [steps.plain(case, 0), steps.plain(case), steps.rehearsing(case)]
  walls, _ = measure.turns(ways, repetitions)
  with jax.profiler.trace(folder):
    for _ in range(5):
      ways[-1]()
  n = len(jax.devices())
  alone, plain, ours = map(statistics.median, walls)
  row = setup.labels(n) | {"alone": 1e3 * n * setup.b / alone}
  seen = 1e3 * n * (setup.b + setup.r)
  row |= {"plain": seen / plain, "ours": seen / ours}
  row["growth"] = measure.ratio({"walls": walls[2]}, {"walls": walls[1]})
  note = (
    f"{setup.network}, {setup.side}x{setup.side}, a buffer of {size:,} rows, "
    f"medians of {repetitions} steps taken in turn; a profile of five "
    f"rehearsing steps is in {folder}."
  )
  reading = [f"Rehearsal costs {100 * (row['growth'] - 1):.1f} % of a step."]
  return measure.Table(title, note, columns, [row], reading)


SUITE = measure.Suite(max(DEVICES), (alone, whole, overlap))
