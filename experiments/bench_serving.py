"""Suite `serving`: what an answer costs at 1, 10 and 100 heads.

(a) the run's own mesh, heads over devices, where only the best score of each
device is compared; (b) the exported network, on one device.
"""

import pathlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import measure, setups
from mhil import phases, serving
from mhil import run as run_lib

HEADS, REPETITIONS, AT_ONCE = (1, 10, 100), 7, 64
DEVICES = 2
# So that a task of the longest stream fills a batch.
SETUP = setups.CONVNET._replace(samples=setups.CONVNET.batch * HEADS[-1])


class Answer(NamedTuple):
  """One way to ask a network.

  Attributes:
    heads, devices: how many, and over how many they lie.
    how: in words.
    ask: `images -> classes`, waits.
  """

  heads: int
  devices: int
  how: str
  ask: Callable[[np.ndarray], Any]


def answers(
  setup: setups.Setup = SETUP,
  counts: Sequence[int] = HEADS,
  repetitions: int = REPETITIONS,
  at_once: int = AT_ONCE,
) -> measure.Table:
  """Milliseconds for one image, and images a second of many at once."""
  with tempfile.TemporaryDirectory() as folder:
    found = [
      answer for n in counts for answer in _of(setup, n, pathlib.Path(folder))
    ]
  shape = setup.side, setup.side, 3
  images = np.zeros((at_once, *shape), np.uint8)
  rows = []
  for size in (1, at_once):
    labels: list[dict[str, Any]] = [{} for _ in found]
    asked = [lambda a=a, n=size: a.ask(images[:n]) for a in found]
    rows.append(measure.timed(labels, asked, repetitions))
  table = [
    {
      **{"how": a.how, "heads": a.heads, "devices": a.devices},
      **{"ms": one["ms"], "worst": max(one["walls"])},
      "rate": round(1e3 * at_once / many["ms"]),
      "head_ms": many["ms"] / at_once / a.heads,
    }
    for a, one, many in zip(found, *rows)
  ]
  columns = {
    **{"how": "network", "heads": "heads", "devices": "devices"},
    **{"ms": "ms for one image", "worst": "slowest of them"},
    "rate": f"images a second, {at_once} at once",
    "head_ms": "ms an image and head",
  }
  note = (
    f"{setup.name} on {setup.side}x{setup.side}x3 images, {setup.each} classes "
    "a head, all heads open, float32. The times are of the whole answer, "
    "images from the host and classes back to it, medians of "
    f"{repetitions} repetitions taken in turn."
  )
  return measure.Table(
    "An answer", note, columns, table, _read(table, counts[-1])
  )


def _of(setup, heads, folder) -> list[Answer]:
  most = min(DEVICES, len(jax.devices()), heads)
  made = []
  for devices in dict.fromkeys((1, most)):
    run = setups.build(setup, heads, devices=devices)
    state = run_lib.start(run)
    ask = phases.predictor(run, state, heads - 1)
    made.append(Answer(heads, devices, "of the run", ask))
  path = folder / str(heads)
  serving.save(path, run, state)
  exported, _ = serving.load(path)
  made.append(Answer(heads, 1, "exported", lambda x: exported(x)[0]))
  return made


def _read(rows: list[dict[str, Any]], last: int) -> list[str]:
  lines = []
  for how in dict.fromkeys(row["how"] for row in rows):
    alone = [r for r in rows if r["how"] == how and r["devices"] == 1]
    few, many = alone[0], alone[-1]
    lines.append(
      f"Network {how}, one device: from {few['heads']} to {many['heads']} "
      f"heads an image alone takes {many['ms'] / few['ms']:.1f} times as long, "
      f"and many at once {few['rate'] / many['rate']:.1f} times: every head is "
      "asked."
    )
  of = {
    r["devices"]: r for r in rows if r["heads"] == last and "run" in r["how"]
  }
  if len(of) > 1:
    one, more = of[min(of)], of[max(of)]
    lines.append(
      f"{last} heads over {more['devices']} simulated devices, which share the "
      f"same {measure.cores()} cores, answer {more['rate'] / one['rate']:.2f} "
      "times as many images a second as on one."
    )
  ratio = statistics.median(
    row["head_ms"] for row in rows if row["heads"] == last
  )
  return [
    *lines,
    f"At {last} heads an image costs {1e3 * ratio:.1f} us a head.",
  ]


SUITE = measure.Suite(DEVICES, (answers,))
