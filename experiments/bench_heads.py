"""Suite `heads`: what a further head costs the others.

(a) a head a device, (b) all heads on one device with the old ones frozen,
(c) closed heads on one device.
"""

from collections.abc import Sequence
from typing import Any

import jax

from experiments import measure, setups
from mhil import compiling

HEADS = (1, 2, 4, 8, 16)
TASKS = (1, 5, 10, 20)
REPETITIONS = 11
FLAT = {
  "flops": "FLOPs",
  "accessed": "bytes accessed",
  "temporary": "temporary memory",
}
TIME = {"growth": "time", "cpu_ms": "CPU time"}
COST = {
  "flops": "MFLOP",
  "accessed": "MB accessed",
  "temporary": "temporary MiB",
  "arguments": "arguments MiB",
}


def apart(
  setup: setups.Setup = setups.CONVNET,
  counts: Sequence[int] = HEADS,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(a) One head a device, with each loss."""
  counts = [n for n in counts if n <= len(jax.devices())]
  cases = [
    (
      {"loss": kind, "heads": n},
      setups.build(setup, n, devices=n, loss=loss),
      n - 1,
    )
    for kind, loss in setups.KINDS.items()
    for n in counts
  ]
  rows = measure.compare(cases, repetitions)
  for row in rows:
    row["shared_ms"] = row["ms"] / _sharing(row["heads"])
    row["device_cpu_ms"] = row["cpu_ms"] / row["heads"]
  columns = {
    **{"loss": "loss", "heads": "heads = devices"},
    **COST,
    **{"traffic": "bytes over `head`", "collectives": "collectives"},
    **{"ms": "ms a step", "shared_ms": "ms / devices a core"},
    "device_cpu_ms": "CPU ms a device",
  }
  note = (
    f"{_about(setup)}, all heads open and training, one head on each device. "
    "FLOPs, bytes, memory, traffic and collectives are **per device** and "
    "step, from the compiled program; the times are of the whole step, all "
    f"devices together, medians of {repetitions} repetitions taken in turn."
  )
  reading = _read_apart(rows)
  return measure.Table("One head a device", note, columns, rows, reading)


def _read_apart(rows: list[dict[str, Any]]) -> list[str]:
  of = {
    kind: [r for r in rows if r["loss"] == kind]
    for kind in dict.fromkeys(r["loss"] for r in rows)
  }
  dce, shared, central = of.values()
  last = dce[-1]["heads"]
  flat = "; ".join(
    f"{name} {measure.verdict([r[key] for r in dce])}"
    for key, name in FLAT.items()
  )
  second = central[-1]["flops"] / dce[-1]["flops"]
  lines = [
    f"D-CE, a device's cost from {dce[0]['heads']} to {last} heads, and how "
    f"far the largest lies above the smallest: {flat}. Over `head` "
    f"{sum(r['traffic'] for r in dce)} bytes in "
    f"{sum(r['collectives'] for r in dce)} collectives.",
    f"With {last} heads centralised CE moves {central[-1]['traffic']:,} bytes "
    "a step to each device, in proportion to the heads; distributed CE "
    f"{shared[-1]['traffic']:,} bytes with any number, in "
    f"{shared[-1]['collectives']} collectives that every device waits for.",
    f"Both pay {second:.2f} times the FLOPs of D-CE, which is our doing: a "
    "device loops over its heads, so their logits are needed in a forward "
    "pass of its own before any gradient. Code that keeps the activations of "
    "all its heads alive would pay no second pass.",
  ]
  if _sharing(last) > 1:
    lines.append(
      f"These are simulated devices: {last} of them share "
      f"{measure.cores()} cores, so the time of a step must grow, and says "
      "nothing of real devices. In processor time, summed over threads, D-CE "
      f"takes {_list('device_cpu_ms', dce)} ms a device. Wall time divided by "
      f"the devices that share a core is {_list('shared_ms', dce)} ms; what "
      "it has more is waiting for a core, also for other programs."
    )
  return lines


def together(
  networks: Sequence[setups.Setup] = (setups.CONVNET, setups.MLP),
  counts: Sequence[int] = TASKS,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(b) Every head on one device, at the last task of longer streams."""
  rows = []
  for setup in networks:
    # Short steps, whose time is to be compared within a few per cent.
    rows += _stream_lengths(setup, "new", counts, 5 * repetitions)
    rows += _stream_lengths(setup, "all", counts, repetitions)
  columns = {
    **{"network": "network", "train_heads": "`train_heads`"},
    **{"tasks": "tasks = heads", **COST, "ms": "ms a step"},
    **{"cpu_ms": "CPU ms", "growth": f"time against {counts[0]}"},
  }
  note = (
    f"D-CE; {'; '.join(map(_about, networks))}; at the last task, with every "
    f"head open. Medians of {repetitions} repetitions taken in turn, "
    f"{5 * repetitions} for `new`; ratios within a repetition. The compiler's "
    "FLOPs and bytes count the body of the loop over heads **once**, so they "
    "are those of one trained head; how often it runs shows in the time. "
    "Arguments hold the state of all heads, and the images."
  )
  reading = _read_together(rows)
  return measure.Table("All heads on one device", note, columns, rows, reading)


def _stream_lengths(
  setup: setups.Setup, kind: str, counts: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
  cases = []
  for n in counts:
    labels = {"network": setup.name, "train_heads": kind, "tasks": n}
    cases.append((labels, setups.build(setup, n, train_heads=kind), n - 1))
  rows = measure.compare(cases, repetitions)
  for row in rows:
    row["growth"] = measure.ratio(row, rows[0])
  return rows


def _read_together(rows: list[dict[str, Any]]) -> list[str]:
  lines = []
  for network in dict.fromkeys(r["network"] for r in rows):
    mine = [r for r in rows if r["network"] == network]
    new = [r for r in mine if r["train_heads"] == "new"]
    later = new[1]["tasks"]
    flat = "; ".join(
      f"{name} {measure.verdict([r[key] for r in new])}, from {later} tasks on "
      f"{100 * measure.spread([r[key] for r in new[1:]]):.1f} %"
      for key, name in (TIME | FLAT).items()
    )
    lines.append(
      f"{network}, `new`, {new[0]['tasks']} to {new[-1]['tasks']} tasks: "
      f"{flat}. The control `all` takes {mine[-1]['growth']:.1f} times as long "
      f"at {mine[-1]['tasks']} tasks as at {new[0]['tasks']}."
    )
  lines.append(
    "A bank of several heads hands the loop's body a copy of one head's "
    "state, which the compiler saves in a bank of one head. That is the "
    "difference between the first row and the second; it does not grow "
    "further, and shows only where a head has much state and little work."
  )
  return lines


def closed(
  setup: setups.Setup = setups.CONVNET,
  held: int = 8,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(c) One device holds `held` heads, few or all of them open."""
  one, many = setups.build(setup, 1), setups.build(setup, held)
  cases: list[measure.Case] = [({"held": 1, "open": 1}, one, 0)]
  for n in sorted({1, held // 4, held}):
    cases.append(({"held": held, "open": n}, many, n - 1))
  before = compiling.count()
  rows = measure.compare(cases, repetitions)
  for row in rows:
    row["growth"] = measure.ratio(row, rows[-1])
  columns = {"held": "heads held", "open": "open", **COST, "ms": "ms a step"}
  columns |= {"cpu_ms": "CPU ms", "growth": f"time against {held} open"}
  note = (
    f"D-CE; {_about(setup)}; one device, `train_heads=all`. The rows with "
    f"{held} heads held are one and the same compiled program; medians of "
    f"{repetitions} repetitions taken in turn. FLOPs and bytes count the "
    "loop's body once."
  )
  reading = _read_closed(rows, compiling.count() - before)
  return measure.Table("Closed heads", note, columns, rows, reading)


def _read_closed(rows: list[dict[str, Any]], compiled: int) -> list[str]:
  alone, *some, full = rows
  memory = full["temporary"] / alone["temporary"]
  shares = ", ".join(
    f"{r['growth']:.2f} with {r['open']} of {r['held']} open (share of open "
    f"heads {r['open'] / r['held']:.2f})"
    for r in some
  )
  return [
    f"Time against all {full['held']} open: {shares}. With 1 open the "
    f"{full['held'] - 1} closed heads change the step from {alone['ms']:.1f} "
    f"to {some[0]['ms']:.1f} ms.",
    f"Temporary memory with {full['held']} heads held is {memory:.3f} times "
    "that with one held.",
    f"Compilations while heads opened: {compiled}.",
  ]


def _sharing(devices: int) -> float:
  """Devices that share a core; 1 on devices with cores of their own."""
  simulated = jax.devices()[0].platform == "cpu"
  return max(1.0, devices / measure.cores()) if simulated else 1.0


def _about(setup: setups.Setup) -> str:
  run = f"{setup.name} on {setup.side}x{setup.side}x3 noise"
  return f"{run}, batch {setup.batch}, Adam, no augmentation"


def _list(key: str, rows: Sequence[dict[str, Any]]) -> str:
  return ", ".join(f"{r[key]:.1f}" for r in rows)


SUITE = measure.Suite(max(HEADS), (apart, together, closed))
