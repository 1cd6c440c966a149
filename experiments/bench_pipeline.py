"""Suite `pipeline`: samples a second, and the share of the time spent waiting.

(a) batches alone, as a training step gets them; (b) with training.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import measure, setups
from mhil import bank as bank_lib
from mhil import (
  data,
  inputs,
  losses,
  objectives,
  phases,
  prepare,
  programs,
  sharding,
  streams,
  trainer,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

IMAGES, BATCH, REPETITIONS = 20_000, 128, 3
P = jax.P


class Source(NamedTuple):
  """Where the images of a row come from."""

  name: str
  dataset: data.Dataset
  streamed: bool


def noise(images: int, classes: int = 10, mapped: bool = False) -> data.Dataset:
  """The shape and the augmentation of CIFAR-10, from memory or a file."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
  if mapped:
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
      np.save(file, pixels)
      file.flush()
      pixels = np.load(file.name, mmap_mode="r")
  labels = np.arange(images, dtype=np.int32) % classes
  sets = pixels, labels, pixels[:256], labels[:256]
  return data.Dataset(
    "noise", *sets, classes, 255.0, (0.5,) * 3, (0.3,) * 3, 4, True
  )


def sources(images: int, folder: str | None) -> list[Source]:
  """The rows of both tables; `folder` holds TFDS sets."""
  found = [
    Source("in memory", noise(images), False),
    Source("streamed: a mapped file", noise(images, mapped=True), True),
  ]
  if folder:
    cifar = data.load(
      "tfds:cifar100", folder=folder, limit=images // 100, stream=True
    )
    found.append(Source("streamed: tfds:cifar100, PNG", cifar, True))
  return found


def build(
  source: Source, setup: setups.Setup, batch: int, epochs: int
) -> run_lib.Run:
  """A run of one task with all classes."""
  classes = source.dataset.classes
  return prepare.build(
    sharding.make_mesh(),
    streams.class_incremental(classes, sizes=(classes,), order_seed=None),
    source.dataset,
    objectives.end_to_end(setup.branch(classes + 1)),
    losses.dce(),
    Recipe(epochs=epochs, batch=batch, streamed=source.streamed),
    seed=0,
  )


def alone(
  images: int = IMAGES,
  batch: int = BATCH,
  folder: str | None = None,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(a) A pass over the images: shuffled, gathered or read, augmented."""
  found = sources(images, folder)
  runs = [build(s, setups.CONVNET, batch, 1) for s in found]
  passes = [functools.partial(_pass, run, _fetch(run)) for run in runs]
  rows: list[dict[str, Any]] = [{"source": s.name} for s in found]
  for row, times in zip(rows, _in_turn(passes, repetitions), strict=True):
    row["rate"] = images / statistics.median(times)
    row["seconds"] = times
  note = (
    f"{images:,} images of 32x32x3 in batches of {batch}; reflect pad 4, "
    f"crop, flip, normalise; one device, no training. Medians of {repetitions} "
    "passes taken in turn. A mapped file is in the system's cache."
  )
  columns = {"source": "source", "rate": "images a second"}
  return measure.Table("Batches alone", note, columns, rows, [])


def training(
  images: int = IMAGES,
  batch: int = BATCH,
  folder: str | None = None,
  setup: setups.Setup = setups.CONVNET,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(b) The loop of `trainer.fit` on the same images."""
  found = sources(images, folder)
  runs = [build(s, setup, batch, 1) for s in found]
  ends: list[list[trainer.Result]] = [[] for _ in found]

  def fit(i: int) -> None:
    ends[i].append(trainer.fit(runs[i]))

  jobs = [functools.partial(fit, i) for i in range(len(found))]
  _in_turn(jobs, repetitions)
  rows: list[dict[str, Any]] = [{"source": s.name} for s in found]
  for row, done in zip(rows, ends, strict=True):
    spans = [r.progress.waited + r.progress.stepped for r in done[1:]]
    row["rate"] = images / statistics.median(spans)
    shares = [r.metrics["waiting_share"] for r in done[1:]]
    row["waiting"] = 100 * statistics.median(shares)
    row["most"] = 100 * max(shares)
  columns = {
    "source": "source",
    "rate": "images a second",
    "waiting": "% waiting",
    "most": "% at most",
  }
  note = (
    f"The same images; {setup.name}, D-CE, Adam, one head on one device. The "
    "share of the steps' time in which the loop waited for its next batch; "
    f"median and largest of {repetitions} passes."
  )
  return measure.Table("With training", note, columns, rows, _read(rows))


def _read(rows: list[dict[str, Any]]) -> list[str]:
  memory = rows[0]
  word = "under" if memory["most"] < 2 else "NOT under"
  return [
    f"In memory the loop waits {word} 2 % of the time ({memory['most']:.2f} % "
    "at most).",
    *(
      f"{row['source']}: {row['rate'] / memory['rate']:.2f} of the rate in "
      "memory."
      for row in rows[1:]
    ),
  ]


def _fetch(run: run_lib.Run) -> Callable[..., jax.Array]:
  """What a training step does before it trains."""

  def local(step, epoch, task, samples):
    key = jax.random.fold_in(samples.key, step)
    batch, _ = programs.take(step, epoch, task, samples, run.recipe.streamed)
    return programs.inputs_of(batch, samples, key, run.dataset).images

  specs = (
    P(),
    P(),
    bank_lib.TASK_SPEC,
    programs.samples_spec(run.recipe.streamed),
  )
  cut = jax.shard_map(local, mesh=run.mesh, in_specs=specs, out_specs=P("data"))
  return jax.jit(cut)


def _pass(run: run_lib.Run, fetch: Callable[..., jax.Array]) -> None:
  feed = phases.open_phase(run, run.phases[0])
  batches: list[jax.Array] = []
  for step, (epoch, samples) in enumerate(inputs.steps(run, feed, 0)):
    now = run_lib.scalar(step, run.mesh)
    batches.append(fetch(now, epoch, feed.task, samples))
    # As in training, the host is at most two steps ahead.
    if len(batches) > 2:
      batches.pop(0).block_until_ready()
  jax.block_until_ready(batches)


def _in_turn(
  jobs: Sequence[Callable[[], None]], repetitions: int
) -> list[list[float]]:
  """Seconds of each job, after one to warm up."""
  seconds: list[list[float]] = [[] for _ in jobs]
  for repetition in range(-1, repetitions):
    for job, times in zip(jobs, seconds):
      start = time.perf_counter()
      job()
      if repetition >= 0:
        times.append(time.perf_counter() - start)
  return seconds


def _folder() -> str | None:
  return flags.FLAGS.folder


SUITE = measure.Suite(
  1, (lambda: alone(folder=_folder()), lambda: training(folder=_folder()))
)
