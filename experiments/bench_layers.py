"""Suite `layers`: how much sooner a layer-parallel step ends.

With data Td, forwards and backwards Tf and Tb, the networks that guess t_f and
t_b, and corrections t_psi, K balanced stages are to be faster by

  rho(K) = (Td + Tf + Tb) / (Td + t_psi + t_f + t_b + (Tf + Tb) / K)

(a) two stages on two devices, each part measured; (b) up to 16 stages, the
longest way through a step counted in the compiled programs.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measure
from mhil import (
  abreast,
  auxnet,
  chain,
  coupling,
  data,
  guessing,
  layer_parallel,
  losses,
  networks,
  objectives,
  optimizers,
  prepare,
  sharding,
  staged,
  streams,
)
from mhil import run as run_lib
from mhil.recipe import Recipe

SHAPE = 16, 16, 2
HIDDEN = 512
BATCH = 256
METHOD = coupling.Method(beta=0.01, eta=100.0)


def branch_of(layers: int) -> networks.Branch:
  """A stack of equal dense layers, so that stages come out equal."""
  return networks.mlp(math.prod(SHAPE), 11, (HIDDEN,) * layers, norm="layer")


def objective_of(
  branch: networks.Branch, stages: int, method: coupling.Method = METHOD
) -> tuple[objectives.Objective, chain.Chain, guessing.Guesser]:
  """Layer-parallel training with networks of at most a tenth of the cost."""
  cut = chain.chain(branch, SHAPE, stages)
  guesser = guessing.by_network(auxnet.auxnet(cut), cut)
  objective = layer_parallel.layer_parallel(cut, guesser, method)
  spread = functools.partial(
    abreast.spread, chain=cut, guesser=guesser, method=method
  )
  return objective._replace(spread=spread), cut, guesser


def build(objective: objectives.Objective, stages: int) -> run_lib.Run:
  """A run over noise in ten classes, one head."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (4 * BATCH, *SHAPE), dtype=np.uint8)
  labels = np.arange(len(images), dtype=np.int32) % 10
  dataset = data.Dataset(
    *("noise", images, labels, images[:10], labels[:10], 10),
    *(255.0, (0.5,) * SHAPE[2], (0.5,) * SHAPE[2], 0, False),
  )
  return prepare.build(
    sharding.make_mesh(stage=stages),
    streams.class_incremental(10, increment=10, order_seed=None),
    dataset,
    objective,
    losses.dce("none"),
    Recipe(batch=BATCH, optimizer=optimizers.sgd(), epochs=100),
    seed=0,
  )


def two_devices(layers: int = 12, repetitions: int = 41) -> measure.Table:
  """(a) Serial and parallel steps in turn, and the parts of the model."""
  branch = branch_of(layers)
  objective, cut, guesser = objective_of(branch, 2)
  serial = build(objectives.end_to_end(branch), 1)
  parallel = build(objective, 2)
  calls: dict[str, Callable[[], None]] = {
    "serial step": measure.Stepper(serial, 0),
    "parallel step": measure.Stepper(parallel, 0),
    **parts(serial, cut, guesser),
  }
  walls, _ = measure.turns(list(calls.values()), repetitions)
  rows = [
    {"what": what, "ms": statistics.median(each), "walls": each}
    for what, each in zip(calls, walls, strict=True)
  ]
  columns = {"what": "what", "ms": "ms"}
  note = (
    f"{layers} dense layers of {HIDDEN}, batch {BATCH}, SGD; two stages of "
    f"{cut.costs[0]:,} and {cut.costs[1]:,} multiply-adds a sample, the "
    f"network that guesses {guesser.costs[0]:,}; one thread a device. Medians "
    f"of {repetitions} repetitions taken in turn."
  )
  reading = _read_two(rows, parallel, cut)
  return measure.Table("Two devices", note, columns, rows, reading)


def parts(
  run: run_lib.Run, cut: chain.Chain, guesser: guessing.Guesser
) -> dict[str, Callable[[], None]]:
  """What the model asks for, each as a program of its own."""
  objective = layer_parallel.layer_parallel(cut, guesser, METHOD)
  params, _, _ = jax.jit(objective.init)(jax.random.key(0))
  state = jnp.ones((BATCH, *cut.shapes[1]))
  images = jnp.ones((BATCH, *SHAPE))
  batch = _batch(images)
  optimizer = optimizers.sgd()

  def learn(params, batch, state):
    grads = guesser.learn(params, batch, guessing.Guess([state], [None]))
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    return jax.tree.map(lambda g, u: g - 0.1 * u, grads, updates)

  stepper = measure.Stepper(run, 0)
  begin = jax.jit(staged.on_home(run, staged.beginning(run)))
  given = stepper.given()
  correct = functools.partial(coupling.correct, multiplier=None, method=METHOD)
  return {
    "data, Td": _timed(begin, *given),
    "guess, t_f": _timed(jax.jit(guesser.states), params, images),
    "learn to guess, t_f + t_b": _timed(jax.jit(learn), params, batch, state),
    "correct, t_psi": _timed(jax.jit(correct), state, state, state),
  }


def _batch(images: jax.Array) -> objectives.Batch:
  zeros = jnp.zeros(BATCH, jnp.int32)
  return objectives.Batch(images, zeros, zeros, jnp.full(BATCH, 1 / BATCH))


def _timed(function: Callable[..., Any], *given: Any) -> Callable[[], None]:
  return lambda: jax.block_until_ready(function(*given))


def _read_two(rows, run, cut) -> list[str]:
  of = {row["what"]: row["ms"] for row in rows}
  serial, data_ms = of["serial step"], of["data, Td"]
  both = serial - data_ms
  # Learning runs the network forwards again: t_f is in it once more.
  extra = of["guess, t_f"] + of["learn to guess, t_f + t_b"]
  extra += of["correct, t_psi"]
  largest = max(cut.costs) / sum(cut.costs)
  predicted = serial / (data_ms + extra + both * largest)
  measured = 1 / measure.ratio(rows[1], rows[0])
  moved = abreast.exchanged(cut, BATCH)[0]
  between = sum("stage" in c.axes for c in run.traffic)
  return [
    f"The model predicts {predicted:.2f} from the parts, measured is "
    f"{measured:.2f}: {100 * (measured / predicted - 1):+.0f} %.",
    f"The programs of the stages hold {between} collectives over `stage` "
    f"({len(run.traffic)} of any kind); the interface exchanges {moved:,} "
    "bytes a step.",
  ]


def many_stages(
  counts: Sequence[int] = (1, 2, 4, 8, 16), layers: int = 16
) -> measure.Table:
  """(b) The longest way through a step, in FLOPs of the compiled programs."""
  branch = branch_of(layers)
  rows: list[dict[str, Any]] = []
  for k in counts:
    longest, aux = _counted(branch, k)
    rows.append({"stages": k, "longest": longest, "aux": aux})
    rows[-1]["rho"] = rows[0]["longest"] / longest
    ideal = (rows[0]["longest"] / k + aux) if k > 1 else longest
    rows[-1]["model"] = rows[0]["longest"] / ideal
  columns = {
    "stages": "stages",
    "longest": "MFLOP, longest stage",
    "aux": "of it, guess, learn, correct",
    "rho": "sooner, counted",
    "model": "by the model, equal stages",
  }
  for row in rows:
    row["longest"], row["aux"] = row["longest"] / 1e6, row["aux"] / 1e6
  note = (
    f"{layers} dense layers of {HIDDEN}, batch {BATCH}; one correction; FLOPs "
    "by XLA's cost analysis of the compiled programs of each stage. Networks "
    "that guess have a tenth of the branch's multiply-adds in all. Data and "
    "exchange are left out."
  )
  best = max(rows, key=lambda row: row["rho"])
  reading = [
    f"{best['stages']} stages end a step {best['rho']:.1f} times sooner by "
    "this count."
  ]
  return measure.Table("More stages", note, columns, rows, reading)


def _counted(branch: networks.Branch, k: int) -> tuple[float, float]:
  """FLOPs of the stage that takes longest, with its network; of that alone."""
  _, cut, guesser = objective_of(branch, k)
  objective = layer_parallel.layer_parallel(cut, guesser, METHOD)
  params, stats, _ = jax.jit(objective.init)(jax.random.key(0))
  states = [jnp.ones((BATCH, *shape)) for shape in cut.shapes]
  batch = _batch(states[0])
  totals = []
  for i in range(k):
    last = i == k - 1
    target = None if last else (states[i + 1], None)
    run = functools.partial(_stage, cut, i)
    cost = flops(run, params, stats, states[i], target, batch)
    beside = 0.0
    if i:
      one = guesser.at(i)  # type: ignore[misc]
      beside = flops(one.states, params, states[0])
      beside += flops(_learn(one), params, batch, states[i])
      correct = functools.partial(
        coupling.correct, multiplier=None, method=METHOD
      )
      beside += flops(correct, states[i], states[i], states[i])
    totals.append((cost + beside, beside))
  return max(totals)


def _stage(cut, k, params, stats, state, target, batch):
  params, stats = ({n: t[n] for n in cut.stages[k]} for t in (params, stats))

  def criterion(logits):
    return -jax.nn.log_softmax(logits)[:, 0]

  out = coupling.stage(
    cut, k, params, stats, state, target, METHOD, batch, criterion
  )
  return out.value, out.grads, out.adjoint, out.stats


def _learn(guesser):
  return lambda params, batch, state: guesser.learn(
    params, batch, guessing.Guess([state], [None])
  )


def flops(function: Callable[..., Any], *given: Any) -> float:
  """Operations of a compiled program, by XLA's count."""
  counted: Any = jax.jit(function).lower(*given).compile().cost_analysis()
  return counted["flops"]


SUITE = measure.Suite(2, (two_devices, many_stages))
