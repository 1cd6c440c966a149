"""Accuracy of parts that are trained apart, against what it took.

  python -m experiments.curves --suite=subnets_digits --seeds=3

Trains the rows of a suite of `experiments.compare` of one task each, tests the
merged branch on the way, and writes OUT.md, OUT.csv and one
figure for each kind of network: accuracy against samples, bytes received by a
device, and modelled time on links of 1 and 10 Gbit/s (`curves_page`).
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import build, cli, compare, curves_page, suites, workdir
from mhil import config as config_lib
from mhil import (
  dealing,
  inputs,
  networks,
  partitions,
  phases,
  plan,
  prepare,
  sharding,
  subnets,
)
from mhil import run as run_lib


class Cost(NamedTuple):
  """What a run asks of one device.

  Attributes:
    flops: operations of a step.
    deal: bytes that a device receives before the first step.
    step: bytes that it receives in a step.
    exchange: bytes that it receives in an exchange.
  """

  flops: float
  deal: float
  step: float
  exchange: float


class Done(NamedTuple):
  """How far a run has come.

  Attributes:
    steps: taken.
    state: after them, and after an exchange that was due.
    exchanges: so far, without the first deal.
    again: of them, those with an all-to-all that was made more than once.
    indices: tables of the rounds that have had a step.
  """

  steps: int
  state: Any
  exchanges: int
  again: int
  indices: list[dict[str, np.ndarray]]


def main() -> None:
  """Trains what is missing and writes page, table and figures."""
  name = flags.FLAGS.suite
  rows = suites.SUITES[name]
  seeds, folder = range(flags.FLAGS.seeds), flags.FLAGS.data_folder
  configs = {
    row.label: [compare.configure(row, seed, folder) for seed in seeds]
    for row in rows
  }
  most = max(build.devices(cs[0].mesh) for cs in configs.values())
  workdir.enable_compilation_cache()
  with cli.checking():
    sharding.simulate(most)
  out = pathlib.Path(flags.FLAGS.out or f"docs/results/{name}")
  place = pathlib.Path(flags.FLAGS.runs) / "curves" / name
  done: dict[str, list[dict[str, Any]]] = {}
  for seed in seeds:
    for row in rows:
      path = place / f"{compare.slug(row, seed)}.json"
      found = finish(configs[row.label][seed], flags.FLAGS.tests, path)
      done.setdefault(row.label, []).append(found)
      print(f"{row.label:<40} seed {seed}  {found['tested']}", flush=True)
    curves_page.write(out, name, done)


def finish(
  config: config_lib.Config, tests: int, path: pathlib.Path
) -> dict[str, Any]:
  """A configuration's curve, which is trained if the file is not there.

  Args:
    config: of one task.
    tests: points of the curve.
    path: file that keeps it.

  Raises:
    UserError: if the file's curve is of another configuration.
  """
  asked = _asked(config, tests)
  if not path.exists():
    found = {"asked": asked, **trained(config, tests)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
  found = json.loads(path.read_text())
  old = found.get("asked", {})
  for field, value in asked.items():
    if old.get(field) != value:
      raise cli.UserError(
        f"{path} holds a curve with {field}={old.get(field)!r}, not {value!r}; "
        "remove it, or use another --runs"
      )
  return found


def _asked(config: config_lib.Config, tests: int) -> dict[str, Any]:
  """What a curve is of, as JSON gives it back."""
  asked = config_lib.flatten(json.loads(config_lib.to_json(config)))
  # Where the data lie on this machine is nobody's business.
  del asked["data.folder"]
  return asked | {"tests": tests}


def trained(config: config_lib.Config, tests: int) -> dict[str, Any]:
  """Trains a configuration of one task; its curve of so many `tests`."""
  with cli.checking():
    parts = build.parts(config)
    if len(parts.stream.tasks) > 1:
      raise cli.UserError(
        f"stream has {len(parts.stream.tasks)} tasks; curves are of one task, "
        "use stream.increment of all classes"
      )
  mesh, stream, dataset, objective, loss, recipe, transform, partition = parts
  given = mesh, stream, dataset, objective, loss, recipe, config.seed
  run = prepare.build(*given, transform, partition)
  cost, curve, feed = cost_of(run), [], phases.open_phase(run, run.phases[0])
  steps = len(feed.phase.steps)
  marks = {round(i * steps / tests) for i in range(1, tests + 1)}
  for done in walk(run, feed):
    if done.steps in marks:
      curve.append(point(run, feed, cost, done))
  sizes = {"whole": len(dataset.test_labels), "32": 32}
  return {
    "curve": curve,
    "cost": cost._asdict(),
    "exchanges": done.exchanges,
    "again": done.again,
    "tested": {"configured": curve[-1]["accuracy"]}
    | {
      f"batch of {name}": batch_accuracy(run, done.state, config, size)
      for name, size in sizes.items()
      if config.network.name == "mlp" and config.network.norm == "batch"
    },
  }


def walk(run: run_lib.Run, feed: inputs.Feed) -> Iterator[Done]:
  """Trains the first phase of a run, step by step."""
  state, exchanges, again = run_lib.start(run), 0, 0
  index = _index(state)
  indices: list[dict[str, np.ndarray]] = []
  given = inputs.steps(run, feed, feed.phase.steps.start)
  for steps, (batches, samples) in enumerate(given, 1):
    if not indices or indices[-1] is not index:
      indices.append(index)
    state = run.step(state, batches, feed.task, samples)
    if run.one_at_a_time:
      jax.block_until_ready(state)
    then = run.exchange(state, steps)
    if then is not state:
      state, index = then, _index(then)
      exchanges += 1
      again += repeated(run.partition, indices[-1], index)
    yield Done(steps, state, exchanges, again, indices)


def _index(state: Any) -> dict[str, np.ndarray]:
  return {k: np.array(v) for k, v in state.bank.apart.index.items()}


def repeated(
  partition: partitions.Partition,
  old: dict[str, np.ndarray],
  new: dict[str, np.ndarray],
) -> bool:
  """Whether this exchange makes an all-to-all more than once."""
  if not partition.renew:
    return False
  ways = [(old[units], new[units]) for units in new]
  for _, units in partition.pairs:
    # The block of a hidden layer goes home, and the next one comes from there.
    home = np.arange(old[units].size, dtype=np.int32).reshape(old[units].shape)
    ways += [(old[units], home), (home, new[units])]
  return any(dealing.trips(*way) > 1 for way in ways)


def point(
  run: run_lib.Run, feed: inputs.Feed, cost: Cost, done: Done
) -> dict[str, float]:
  """What was reached, and what it took so far."""
  received = cost.deal + done.steps * cost.step + done.exchanges * cost.exchange
  weights = networks.count_parameters(
    jax.eval_shape(run.objective.init, jax.random.key(0))[0]
  )
  return {
    "step": done.steps,
    "samples": samples_of(feed.phase, run.recipe.batch, done.steps),
    "bytes": received,
    "flops": done.steps * cost.flops,
    "accuracy": accuracy(run, done.state, feed),
    "coverage": partitions.coverage(run.partition, done.indices, weights),
  }


def samples_of(phase: plan.Phase, batch: int, steps: int) -> int:
  """Samples in the first steps of a phase.

  The last batch of a pass is filled up with rows that weigh nothing.
  """
  passes, rest = divmod(steps, phase.per_epoch)
  return passes * phase.rows + min(rest * batch, phase.rows)


def accuracy(run: run_lib.Run, state, feed) -> float:
  """Share of the test set that the merged branch gets right."""
  tally = phases.evaluate(run, state, feed)
  return float(tally.correct.sum() / tally.total.sum())


def batch_accuracy(run: run_lib.Run, state, config, size: int) -> float:
  """The same with each test batch's own statistics, in batches of `size`."""
  branch = build.make_branch(
    config.network, run.dataset, run.stream.head_width + 1
  )
  objective = subnets.tested(run.objective, branch, "batch")
  predict = phases.predictor(run._replace(objective=objective), state, 0)
  images, labels = run.dataset.test_images, run.dataset.test_labels
  # The classes of a test set may come in order; a batch needs all of them.
  order = np.random.default_rng(0).permutation(len(labels))
  order = order[: len(order) // size * size]
  hits = [
    predict(images[rows]) == labels[rows] for rows in order.reshape(-1, size)
  ]
  return float(np.mean(hits))


def cost_of(run: run_lib.Run) -> Cost:
  """From the compiled programs; a ring's share of what a collective gives."""
  n = run.mesh.shape["subnet"]
  factor = {"all-reduce": 2 * (n - 1) / n}

  def received(found):
    return sum(
      c.bytes * factor.get(c.kind, (n - 1) / n)
      for c in found
      if "subnet" in c.axes
    )

  flops = run.step.cost_analysis()["flops"]
  return Cost(flops, *map(received, (run.dealt, run.traffic, run.exchanged)))


if __name__ == "__main__":
  flags.DEFINE_integer("tests", 12, "Points of a curve.", lower_bound=1)
  cli.run(main)
