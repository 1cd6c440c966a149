"""Accuracy of parts that are trained apart, against what it took.

  python -m experiments.curves --suite=subnets_digits --seeds=3

Trains the rows of a suite of `experiments.compare` of one task each, tests the
merged branch on the way, and writes OUT.md, OUT.csv and one
figure for each kind of network: accuracy against samples, bytes received by a
device, and modelled time on links of 1 and 10 Gbit/s.
"""

import csv
import datetime
import importlib.metadata
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import build, cli, compare, suites, workdir
from mhil import (
  facts,
  inputs,
  partitions,
  phases,
  plots,
  prepare,
  sharding,
  subnets,
)
from mhil import run as run_lib

LINKS = {"1 Gbit/s": 1e9, "10 Gbit/s": 1e10}
# What the modelled device computes; a step's operations are the compiler's.
FLOPS_PER_SECOND = 1e12
# Rows that the figures leave out.
ASIDE = "momentum|control"
COLUMNS = ("step", "samples", "bytes", "flops", "accuracy", "coverage")


class Cost(NamedTuple):
  """What a run asks of one device.

  Attributes:
    flops: operations of a step.
    step: bytes that a device receives in a step.
    exchange: bytes that it receives in an exchange.
  """

  flops: float
  step: float
  exchange: float


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
  done: dict[str, list[dict[str, Any]]] = {}
  for seed in seeds:
    for row in rows:
      place = pathlib.Path(flags.FLAGS.runs) / "curves" / name
      path = place / f"{compare.slug(row, seed)}.json"
      if not path.exists():
        found = trained(configs[row.label][seed], flags.FLAGS.tests)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
      found = json.loads(path.read_text())
      done.setdefault(row.label, []).append(found)
      print(f"{row.label:<40} seed {seed}  {found['tested']}", flush=True)
    write(out, name, done)


def trained(config: Any, tests: int) -> dict[str, Any]:
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
  cost, curve = cost_of(run), []
  indices: list[dict[str, np.ndarray]] = []
  state, feed = run_lib.start(run), phases.open_phase(run, run.phases[0])
  steps = run.phases[0].steps
  marks = {round(i * len(steps) / tests) for i in range(1, tests + 1)}
  exchanges = 0
  for step, (batches, samples) in zip(steps, inputs.steps(run, feed, 0)):
    if not indices or step % max(partition.every, 1) == 0:
      indices.append(_index(state))
    state = run.step(state, batches, feed.task, samples)
    if run.one_at_a_time:
      jax.block_until_ready(state)
    before = state
    state = run.exchange(state, step + 1)
    exchanges += state is not before
    if step + 1 in marks:
      curve.append(
        {
          "step": step + 1,
          "samples": (step + 1) * recipe.batch,
          "bytes": (step + 1) * cost.step + exchanges * cost.exchange,
          "flops": (step + 1) * cost.flops,
          "accuracy": accuracy(run, state, feed),
          "coverage": partitions.coverage(partition, indices),
        }
      )
  sizes = {"whole": len(dataset.test_labels), "32": 32}
  return {
    "curve": curve,
    "cost": cost._asdict(),
    "tested": {"configured": curve[-1]["accuracy"]}
    | {
      f"batch of {name}": batch_accuracy(run, state, config, size)
      for name, size in sizes.items()
      if config.network.name == "mlp" and config.network.norm == "batch"
    },
  }


def _index(state: Any) -> dict[str, np.ndarray]:
  return {k: np.array(v) for k, v in state.bank.apart.index.items()}


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
  return Cost(flops, received(run.traffic), received(run.exchanged))


def write(
  out: pathlib.Path, name: str, done: dict[str, list[dict[str, Any]]]
) -> None:
  """Writes OUT.md, OUT.csv and the figures."""
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.with_suffix(".csv").open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "seed", *COLUMNS])
    for label, runs in done.items():
      for seed, run in enumerate(runs):
        for point in run["curve"]:
          writer.writerow([label, seed, *(point[c] for c in COLUMNS)])
  head = [
    "row", "seeds", "test", "test, batch statistics of all",
    "of 32", "weights ever trained", "MB received a device",
    *(f"modelled ms, {link}" for link in LINKS),
  ]  # fmt: skip
  lines = [
    f"# Curves `{name}`",
    "",
    *about(name, max(map(len, done.values()))),
    "",
    "| " + " | ".join(head) + " |",
    "|" + " --- |" * len(head),
    *("| " + " | ".join(cells(k, v)) + " |" for k, v in done.items()),
  ]
  for title, path in figures(out, done).items():
    lines += ["", f"![{title}]({path.name})"]
  out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def about(name: str, seeds: int) -> list[str]:
  """Where the numbers come from."""
  versions = ", ".join(
    f"{p} {importlib.metadata.version(p)}" for p in facts.PACKAGES
  )
  given = " --data_folder=DIR" if flags.FLAGS.data_folder else ""
  given += f" --tests={flags.FLAGS.tests}"
  note = flags.FLAGS.note
  return [
    f"`python -m experiments.curves --suite={name} --seeds={seeds}{given}`, "
    f"{datetime.date.today()}; {versions}; simulated devices.",
    "",
    "Test accuracy in % of the merged branch, mean and standard deviation over "
    "seeds: with the statistics that the row's configuration names, and with "
    "those of the test batch, all of it or 32 at a time. Every row sees as "
    "many samples. Bytes are what one device receives, from the compiled "
    "programs: of an all-reduce 2 (n-1)/n of its result, of an all-to-all "
    "(n-1)/n, repeated ones not counted. Modelled time adds a step's "
    f"operations, by the compiler's count, at {FLOPS_PER_SECOND:.0e} a second "
    "and these bytes on the link, without latency and one after the other.",
    *(["", note] if note else []),
  ]


def cells(label: str, runs: list[dict[str, Any]]) -> list[str]:
  """One line of the page."""
  last = [run["curve"][-1] for run in runs]
  found = [label, str(len(runs))]
  for key in ("configured", "batch of whole", "batch of 32"):
    values = 100 * np.array([run["tested"].get(key, np.nan) for run in runs])
    found.append("" if np.isnan(values).any() else spread(values))
  found.append(f"{100 * np.mean([p['coverage'] for p in last]):.0f} %")
  found.append(f"{np.mean([p['bytes'] for p in last]) / 1e6:,.3f}")
  for link in LINKS.values():
    found.append(f"{1e3 * np.mean([seconds(p, link) for p in last]):,.2f}")
  return found


def spread(values: np.ndarray) -> str:
  """Mean and standard deviation."""
  deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
  return f"{values.mean():.1f}{deviation}"


def seconds(point: dict[str, float], link: float) -> float:
  """Modelled time up to a point of a curve, on a link of so many bit/s."""
  return point["flops"] / FLOPS_PER_SECOND + 8 * point["bytes"] / link


def figures(
  out: pathlib.Path, done: dict[str, list[dict[str, Any]]]
) -> dict[str, pathlib.Path]:
  """Draws a figure for each kind of network; rows of panels by n."""
  kinds = {"": "with batch norm", ", no norm": "without norm"}
  drawn = {}
  for ending, title in kinds.items():
    panels: dict[str, dict[str, Any]] = {}
    for label, runs in done.items():
      head, _, method = label.partition(" ")
      plain = method.removesuffix(", no norm")
      same = method == plain + ending
      if same and head.startswith("n=") and not re.search(ASIDE, plain):
        panels.setdefault(head, {})[plain] = lines_of(runs)
    if panels:
      tail = "no_norm" if ending else "norm"
      path = out.with_name(f"{out.name}_{tail}.png")
      plots.panels(panels, path, title)
      drawn[title] = path
  return drawn


def lines_of(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """`{axis: [2, k]}`: where on that axis, and the mean accuracy there."""
  curves = [run["curve"] for run in runs]
  mean = np.mean([[p["accuracy"] for p in c] for c in curves], axis=0)
  first = curves[0]
  axes = {
    "samples": [p["samples"] for p in first],
    "MB received by a device": [p["bytes"] / 1e6 for p in first],
  }
  for name, link in LINKS.items():
    axes[f"modelled s, {name}"] = [seconds(p, link) for p in first]
  return {name: np.array([x, mean]) for name, x in axes.items()}


if __name__ == "__main__":
  flags.DEFINE_integer("tests", 12, "Points of a curve.", lower_bound=1)
  cli.run(main)
