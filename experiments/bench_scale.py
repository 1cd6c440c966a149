"""Suite `scale`: 64 to 1,024 heads, as the compiler counts them.

(a) a head a device, (b) what one task costs at 1,000 tasks, (c) inference.
Programs are compiled and never run; see `lowering`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import lowering, measure, setups
from mhil import losses, scoring

P = jax.P
HEADS = (64, 256, 1024)
TASKS = 1000
# A head of ten classes, as most protocols have.
TEN = setups.CONVNET._replace(each=10)
IMAGES = 256
FLAT = {
  "flops": "FLOPs",
  "accessed": "bytes accessed",
  "temporary": "temporary memory",
  "state": "state",
}
LOWERED = (
  "The training step itself (`programs.train_step`) was lowered on a "
  "`jax.sharding.AbstractMesh`, which has no devices, with shapes for "
  "arguments, and compiled by XLA:CPU for as many simulated devices as the "
  "mesh has places; it was not run."
)


def apart(
  setup: setups.Setup = setups.CONVNET, counts: Sequence[int] = HEADS
) -> measure.Table:
  """(a) One head a device, with each loss."""
  rows: list[dict[str, Any]] = []
  for kind, loss in setups.KINDS.items():
    for n in counts:
      row = {"loss": kind, "heads": n}
      rows.append(row | _step(setups.parts(setup, n, loss), n))
  columns = {
    **{"loss": "loss", "heads": "heads = devices", "flops": "MFLOP"},
    **{"accessed": "MB accessed", "temporary": "temporary MiB"},
    **{"state": "bytes of state", "tables": "bytes of tables"},
    **{"collectives": "collectives over `head`"},
    "traffic": "bytes over `head`",
  }
  note = (
    f"{_about(setup)}, all heads open and training. {LOWERED} All numbers are "
    "**per device** and step. State: parameters, statistics, optimiser. "
    "Tables: what the running task says of every class. Training images, "
    "which every device has beside that, are as many with any number of heads "
    "here and not counted. Bytes over `head` are what collectives leave on a "
    "device; what crosses a link depends on their algorithm."
  )
  reading = _read_apart(rows)
  return measure.Table("One head a device", note, columns, rows, reading)


def _step(parts: setups.Parts, devices: int) -> dict[str, Any]:
  """What a step costs a device, and what the device keeps."""
  given = lowering.given(parts, lowering.abstract_mesh(devices))
  samples = given.samples
  return lowering.cost(lowering.step(parts, devices), devices) | {
    "state": lowering.on_a_device(given.state),
    "tables": lowering.on_a_device(
      (given.task.counts, given.task.valid, samples.owners, samples.columns)
    ),
  }


def _read_apart(rows: list[dict[str, Any]]) -> list[str]:
  of = {
    kind: [r for r in rows if r["loss"] == kind]
    for kind in dict.fromkeys(r["loss"] for r in rows)
  }
  dce, shared, central = of.values()
  first, last = dce[0], dce[-1]
  flat = "; ".join(
    f"{name} {measure.verdict([r[key] for r in dce])}"
    for key, name in FLAT.items()
  )
  table = (last["tables"] - first["tables"]) / (last["heads"] - first["heads"])
  return [
    f"D-CE, a device's cost from {first['heads']:,} to {last['heads']:,} "
    "heads, and how far the largest lies above the smallest: "
    f"{flat}. Over `head` {sum(r['traffic'] for r in dce)} bytes in "
    f"{sum(r['collectives'] for r in dce)} collectives.",
    "What does grow on a device is what it knows of the classes of others: "
    f"{table:.0f} bytes a task, for the prior correction and to find a "
    "sample's head.",
    f"Distributed CE moves {shared[-1]['traffic']:,} bytes to each device in "
    f"{shared[-1]['collectives']} collectives, "
    f"{measure.verdict([r['traffic'] for r in shared])}; all "
    f"{last['heads']:,} devices wait for each other in every one. Centralised "
    f"CE moves {central[-1]['traffic']:,} bytes to each of "
    f"{last['heads']:,} devices, "
    f"{central[-1]['traffic'] / central[0]['traffic']:.0f} times as many as of "
    f"{first['heads']:,}.",
  ]


def one_task(
  setup: setups.Setup = setups.CONVNET, tasks: int = TASKS
) -> measure.Table:
  """(b) One step at `tasks` tasks, and what one task more would add."""
  rows: list[dict[str, Any]] = []
  for devices in (tasks, 1):
    for kind, loss in setups.KINDS.items():
      row = {"loss": kind, "devices": devices}
      row |= _step(setups.parts(setup, tasks, loss), devices)
      rows.append(row | _one_more(setup, loss, tasks, devices, row))
    _work(rows[-len(setups.KINDS) :], tasks)
  columns = {
    **{"loss": "loss", "devices": "devices", "state": "bytes of state"},
    **{"flops": "MFLOP of a turn", "accessed": "MB accessed"},
    **{"temporary": "temporary MiB", "traffic": "bytes over `head`"},
    **{"all": "GFLOP, `all`", "new": "GFLOP, `new`"},
    **{"more_state": "one more: state", "more_traffic": "one more: traffic"},
  }
  note = (
    f"{_about(setup)}; {tasks:,} heads, on as many devices and all on one. "
    "Lowered and compiled as above. State, memory, traffic and a turn are "
    "**per device**; a turn is one head's, for the compiler counts the body "
    "of the loop over a device's heads once. GFLOP are those of the whole "
    "network in one step, worked out from turns: with D-CE every training "
    "head takes one, and an old head under `train_heads=new` none; the "
    "coupled losses run every open head forwards before that, whose cost is "
    "their turn less that of D-CE. The last two columns are the bytes that "
    "one task more, on a device of its own or on the one device, adds to each "
    "device that was there."
  )
  reading = _read_task(rows, tasks)
  return measure.Table("One task", note, columns, rows, reading)


def _one_more(
  setup: setups.Setup,
  loss: losses.Loss,
  tasks: int,
  devices: int,
  row: dict[str, Any],
) -> dict[str, Any]:
  parts = setups.parts(setup, tasks + 1, loss)
  more = _step(parts, 1 if devices == 1 else devices + 1)
  return {f"more_{key}": more[key] - row[key] for key in ("state", "traffic")}


def _work(rows: list[dict[str, Any]], tasks: int) -> None:
  """Adds the operations of the whole network, in 10^9, from one turn's."""
  turn = rows[0]["flops"]
  for row in rows:
    forward = row["flops"] - turn
    row["all"] = tasks * row["flops"] / 1e9
    row["new"] = (turn + tasks * forward) / 1e9


def _read_task(rows: list[dict[str, Any]], tasks: int) -> list[str]:
  dce, shared, central, alone = rows[:4]
  return [
    f"At {tasks:,} tasks with old heads frozen a step of D-CE takes "
    f"{dce['new']:.2f} GFLOP, of distributed and of centralised CE "
    f"{shared['new']:.0f} and {central['new']:.0f}: {shared['new']:,.2f} / "
    f"{dce['new']:.2f} = {shared['new'] / dce['new']:.0f} times as many, since "
    "their normaliser needs the logits of every head. With D-CE only the "
    "device of the new head then works. With all heads training "
    f"the factor is {shared['all'] / dce['all']:.2f}, the price of the forward "
    "pass that our loop over heads takes before any gradient.",
    f"One task more costs D-CE {alone['more_state']:,} bytes of state where it "
    f"lies and each other device {dce['more_state']:,} bytes and "
    f"{dce['more_traffic']:,} bytes a step; centralised CE sends each device "
    f"{central['more_traffic']:,} bytes a step more, distributed CE "
    f"{shared['more_traffic']:,}, and both wait for one device more.",
    f"All devices together receive {central['traffic'] * tasks:,} bytes in a "
    f"step of centralised CE, {shared['traffic'] * tasks:,} of distributed CE, "
    f"{dce['traffic'] * tasks:,} of D-CE.",
  ]


def inference(
  setup: setups.Setup = TEN,
  counts: Sequence[int] = HEADS,
  images: int = IMAGES,
) -> measure.Table:
  """(c) What heads send for the predictions of a batch."""
  rows: list[dict[str, Any]] = []
  for name, way in WAYS.items():
    for n in counts:
      parts = setups.parts(setup, n, losses.dce())
      row: dict[str, Any] = {"way": name, "heads": n}
      row |= lowering.cost(lowering.inference(parts, n, way, images), n)
      rows.append(row | {"image": row["traffic"] // images})
  columns = {
    **{"way": "what is sent", "heads": "heads = devices", "flops": "MFLOP"},
    **{"accessed": "MB accessed", "temporary": "temporary MiB"},
    **{"collectives": "collectives", "traffic": "bytes over `head`"},
    "image": "bytes an image",
  }
  note = (
    f"{setup.name} with {setup.each} classes a head, {images} images at once, "
    "D-CE, one head on each device; per device. Lowered and compiled as above. "
    "`scoring.class_scores` gathers whole scores, which the counts of a test "
    "need; predictions come from `scoring.winner`. The top one of each head "
    "is a score and its class."
  )
  reading = _read_inference(rows, setup.each)
  return measure.Table("Inference", note, columns, rows, reading)


def _read_inference(rows: list[dict[str, Any]], each: int) -> list[str]:
  of = {
    name: [r for r in rows if r["way"] == name]
    for name in dict.fromkeys(r["way"] for r in rows)
  }
  whole, top, winner = (found[-1] for found in of.values())
  _, [few, *_], winners = of.values()
  grown = top["traffic"] / few["traffic"]
  flat = measure.verdict([r["traffic"] for r in winners])
  return [
    f"With {whole['heads']:,} heads of {each} classes whole scores are "
    f"{whole['traffic']:,} bytes on each device, the top one of each head "
    f"{top['traffic']:,}, which is {whole['traffic'] / top['traffic']:.1f} "
    f"times less; it grows {grown:.0f} times from {few['heads']:,} heads on.",
    f"The winner alone takes {winner['traffic']:,} bytes in "
    f"{winner['collectives']} collectives: {flat} in the number of heads.",
  ]


def top_ones(*parts: Any) -> Callable[..., Any]:
  """`(bank, task, images) -> (score, column) [b, l, h]`, of each head."""

  def top(table):
    return jnp.max(table, axis=3), jnp.argmax(table, axis=3)

  return scoring.of_scores(top, P("data", None, "head"), *parts)


WAYS = {
  "every score": scoring.class_scores,
  "the top one of each head": top_ones,
  "the winner": scoring.winner,
}


def _about(setup: setups.Setup) -> str:
  run = f"{setup.name} on {setup.side}x{setup.side}x3 images"
  return f"{run}, {setup.each} classes a head, batch {setup.batch}, Adam"


SUITE = measure.Suite(max(*HEADS, TASKS + 1), (apart, one_task, inference))
