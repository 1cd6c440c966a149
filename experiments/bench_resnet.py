"""Suite `resnet`: images a second of ResNet-32, beside PyTorch, on one device.

Meant for a GPU. Each image is counted once, however many heads learn from it.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import bench_pipeline, measure, torch_resnet
from mhil import (
  losses,
  networks,
  objectives,
  optimizers,
  prepare,
  sharding,
  streams,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

HEADS, BATCH, STEPS, REPETITIONS = (1, 10), 128, 100, 5


def resnet(
  heads: tuple[int, ...] = HEADS,
  *,
  depth: int = 32,
  batch: int = BATCH,
  steps: int = STEPS,
  repetitions: int = REPETITIONS,
  bf16: bool = True,
  peak: float | None = None,
) -> measure.Table:
  """Steps of 1 and of 10 heads of ten classes, all of them training.

  Args:
    heads: numbers of heads.
    depth, batch: of the network, and images in a step.
    steps: in a repetition, sent off without waiting.
    repetitions: the two libraries in turn.
    bf16: compute in bfloat16.
    peak: the card's 10^12 operations a second, by its data sheet.
  """
  rows: list[dict[str, Any]] = []
  for count in heads:
    stepper = measure.Stepper(build(depth, count, batch, bf16), count - 1)
    _rate(stepper, batch, 5)
    ours, theirs = [], []
    for _ in range(repetitions):
      ours.append(_rate(stepper, batch, steps))
      if torch_resnet.torch is not None:
        theirs.append(
          torch_resnet.rate(depth, 11, batch, steps, count, bf16=bf16)
        )
    rows.append(_row("mhil", count, ours, depth, peak))
    if theirs:
      rows.append(_row("PyTorch", count, theirs, depth, peak))
  columns = {"library": "library", "heads": "heads", "rate": "images a second"}
  columns |= {"tflops": "10^12 operations a second", "share": "% of the peak"}
  kind = "bfloat16" if bf16 else "float32"
  note = (
    f"ResNet-{depth}, 32x32x3, batch {batch}, {kind}, SGD; every head learns "
    "from every image. mhil gathers, crops, flips and normalises in the step "
    "and trains with D-CE; PyTorch (torch.compile, channels last) is handed "
    f"the same normalised batch and trains with CE. Medians of {repetitions} "
    "repetitions in turn. An operation is a multiplication or an addition of "
    "a convolution or matrix product, forward and twice that backward."
  )
  return measure.Table(f"ResNet-{depth}", note, columns, rows, _read(rows))


def build(depth: int, heads: int, batch: int, bf16: bool) -> run_lib.Run:
  """A run over `heads` tasks of ten classes of noise; every sample is kept."""
  dtype = "bfloat16" if bf16 else "float32"
  branch = networks.resnet_cifar(depth, 11, dtype=dtype, axis="data")
  classes = 10 * heads
  return prepare.build(
    sharding.make_mesh(),
    streams.class_incremental(classes, increment=10, order_seed=None),
    bench_pipeline.noise(20 * classes + batch, classes),
    objectives.end_to_end(branch),
    losses.dce(),
    Recipe(
      optimizer=optimizers.sgd(0.9, 5e-4),
      rate=optimizers.constant(0.1),
      batch=batch,
      cumulative=True,
    ),
    seed=0,
  )


def _rate(stepper: measure.Stepper, batch: int, steps: int) -> float:
  start = time.perf_counter()
  for _ in range(steps):
    stepper.step()
  stepper.wait()
  return steps * batch / (time.perf_counter() - start)


def _row(
  library: str, heads: int, rates: list[float], depth: int, peak: float | None
) -> dict[str, Any]:
  branch = networks.resnet_cifar(depth, 11)
  params, stats = jax.eval_shape(branch.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  once = networks.multiply_adds(
    lambda p, s, x: branch.apply(p, s, x, True)[0], params, stats, image
  )
  rate = statistics.median(rates)
  done = 2 * 3 * once * heads * rate / 1e12
  share = 100 * done / peak if peak else None
  row = {"library": library, "heads": heads, "rate": rate, "rates": rates}
  return row | {"tflops": done, "share": share}


def _read(rows: list[dict[str, Any]]) -> list[str]:
  by_name = {(row["library"], row["heads"]): row["rate"] for row in rows}
  lines = [
    f"heads={heads}: mhil takes {rate / by_name['PyTorch', heads]:.2f} times "
    "the images of PyTorch."
    for (library, heads), rate in by_name.items()
    if library == "mhil" and ("PyTorch", heads) in by_name
  ]
  return lines or ["PyTorch is not installed, so its rows are missing."]


def _suite() -> measure.Table:
  return resnet(peak=flags.FLAGS.peak)


SUITE = measure.Suite(1, (_suite,))
