"""Suite `subnets`: what n subnets on n devices hold, compute, move and take.

(a) memory, operations and bytes of wide nets, from the compiled programs; (b)
steps of n subnets on n simulated devices beside the whole net on one.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import measure
from mhil import (
  cutting,
  data,
  losses,
  networks,
  objectives,
  optimizers,
  parting,
  partitions,
  prepare,
  sharding,
  streams,
  subnets,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

DEVICES = (1, 2, 4, 8)
CLASSES, PIXELS = 10, 784
WIDE, TIMED = (4096, 4096), (1024, 1024)
EACH = 32
ROUND = 20  # steps
REPETITIONS = 21


def build(hidden: Sequence[int], n: int, each: int = EACH) -> run_lib.Run:
  """A run of one task: `hidden` cut into n, or whole for n = 1.

  Args:
    hidden: units of each layer.
    n: devices.
    each: samples of a step, of each subnet.
  """
  mesh = sharding.make_mesh(subnet=n)
  stream = streams.class_incremental(CLASSES, increment=CLASSES)
  partition = partitions.NONE
  if n > 1:
    part = objectives.end_to_end(_net([width // n for width in hidden]))
    cut = subnets.neurons(hidden, n)
    partition = subnets.partition(cut, part, every=ROUND)
  recipe = Recipe(
    optimizer=optimizers.sgd(0.0),
    rate=optimizers.constant(0.01),
    epochs=1000,
    batch=each * n,
  )
  objective = objectives.end_to_end(_net(hidden))
  loss = losses.dce("none")  # of one head, plain cross-entropy
  given = mesh, stream, _blobs(), objective, loss, recipe, 0
  return prepare.build(*given, None, partition)


def _net(hidden: Sequence[int]) -> networks.Branch:
  how: dict[str, Any] = {"norm": "batch", "output_norm": True, "axis": "data"}
  return networks.mlp(PIXELS, CLASSES + 1, hidden, **how)


@functools.cache
def _blobs() -> data.Dataset:
  rng = np.random.default_rng(0)
  labels = np.arange(600, dtype=np.int32) % CLASSES
  centres = rng.integers(64, 192, (CLASSES, 28, 28, 1))
  noise = rng.integers(-64, 64, (600, 28, 28, 1))
  images = (centres[labels] + noise).astype(np.uint8)
  split = images, labels
  how = 255.0, (0.5,), (0.25,), 0, False
  return data.Dataset("blobs", *split, *split, CLASSES, *how)  # type: ignore


def held(
  hidden: Sequence[int] = WIDE, devices: Sequence[int] = DEVICES
) -> measure.Table:
  """(a) Memory, operations and bytes of a device, from the compiler."""
  rows: list[dict[str, Any]] = []
  for n in devices:
    run = build(hidden, n)
    step, cost = run.step.memory_analysis(), measure.cost(run)
    rows.append(
      {
        "n": n,
        "held": _bytes(run),
        "step": step.argument_size_in_bytes + step.temp_size_in_bytes,
        "exchange": _exchange_bytes(run),
        "flops": cost["flops"],
        "moved": sharding.bytes_over(run.exchanged, "subnet"),
        "formula": formula(hidden, n) if n > 1 else 0,
        "silent": "yes" if not run.traffic else "NO",
      }
    )
  for row in rows:
    first = rows[0]
    row["share"] = row["n"] * row["held"] / first["held"]
    row["work"] = row["n"] * row["flops"] / first["flops"]
  columns = {
    **{"n": "devices", "held": "bytes held", "share": "times n / whole"},
    **{"step": "bytes in a step", "exchange": "bytes in an exchange"},
    **{"flops": "operations a step", "work": "times n / whole's"},
    **{"silent": "step without collectives"},
    **{"moved": "bytes of an exchange", "formula": "by the formula"},
  }
  note = (
    f"{PIXELS}-{'-'.join(map(str, hidden))}-{CLASSES + 1}, batch norm, plain "
    f"SGD without momentum, {EACH} samples a subnet; one device holds the "
    "whole net. Held are weights, statistics and the blocks that no subnet "
    "trains; in a step and in an exchange, arguments and temporary memory of "
    "the compiled program, the training images among them. All for a device."
  )
  return measure.Table(
    "What a device holds", note, columns, rows, _read_held(rows)
  )


def _bytes(run: run_lib.Run) -> int:
  leaves = jax.tree.leaves(run_lib.start(run).bank)
  return sum(x.addressable_shards[0].data.nbytes for x in leaves)


def _exchange_bytes(run: run_lib.Run) -> int:
  if run.partition is partitions.NONE:
    return 0
  usage = parting.program(run, run_lib.start(run).bank, True).memory_analysis()
  return usage.argument_size_in_bytes + usage.temp_size_in_bytes


def formula(hidden: Sequence[int], n: int) -> int:
  """Bytes of an exchange by `cutting.traffic`, from the shapes alone."""
  cut = subnets.neurons(hidden, n)
  part = _net([width // n for width in hidden])
  shapes = jax.eval_shape(part.init, jax.random.key(0))
  trees = dict(zip(("params", "stats"), shapes))
  return cutting.traffic(cut, cut.flat(trees))


def _read_held(rows: list[dict[str, Any]]) -> list[str]:
  whole, last = rows[0], rows[-1]
  right = all(row["moved"] == row["formula"] for row in rows)
  most = max(last["step"], last["exchange"])
  return [
    f"On {last['n']} devices each holds {last['held']:,} bytes, the whole net "
    f"takes {whole['held']:,}: {whole['held'] / last['held']:.1f} times less.",
    f"With {most:,} bytes a device the net trains on {last['n']} devices; a "
    f"step of the whole net on one takes {whole['step']:,}.",
    f"Every exchange has the bytes of the formula: {'yes' if right else 'NO'}.",
  ]


def paced(
  hidden: Sequence[int] = TIMED,
  devices: Sequence[int] = DEVICES,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(b) Steps of subnets beside those of the whole net, taken in turn."""
  runs = [build(hidden, n) for n in devices]
  cases: list[measure.Case] = [
    ({"n": n}, run, 0) for n, run in zip(devices, runs)
  ]
  rows = measure.compare(cases, repetitions)
  walls, _ = measure.turns([exchanger(run) for run in runs], repetitions)
  for row, times in zip(rows, walls):
    row["growth"] = measure.ratio(row, rows[0])
    row["exchange_ms"] = statistics.median(times) if row["n"] > 1 else 0.0
  columns = {
    **{"n": "devices", "ms": "ms a step", "growth": "to the whole net's"},
    **{"flops": "operations a device", "exchange_ms": "ms an exchange"},
  }
  note = (
    f"{PIXELS}-{'-'.join(map(str, hidden))}-{CLASSES + 1}, {EACH} samples a "
    f"subnet and for the whole net; medians of {repetitions} steps taken in "
    f"turn on {measure.cores()} cores, which the devices share."
  )
  last = rows[-1]
  reading = [
    f"{last['n']} subnets take {last['growth']:.2f} times as long for a step "
    f"as the whole net on one device, with {last['n']} times the samples; "
    f"each computes {last['flops'] / rows[0]['flops']:.3f} of its operations."
  ]
  return measure.Table("Steps side by side", note, columns, rows, reading)


def exchanger(run: run_lib.Run) -> Callable[[], Any]:
  """Exchanges round after round, each with its own permutation.

  The permutation follows from the steps done: exchanged again at the same
  step, every unit would go where it is.
  """
  state, done = run_lib.start(run), itertools.count(ROUND, ROUND)

  def exchange():
    nonlocal state
    state = jax.block_until_ready(run.exchange(state, next(done)))
    return state

  return exchange


SUITE = measure.Suite(max(DEVICES), (held, paced))
