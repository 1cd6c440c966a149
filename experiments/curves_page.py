"""The page of `experiments.curves`: a table, its numbers and its figures."""

import csv
import datetime
import importlib.metadata
import pathlib
import re
from typing import Any

import numpy as np
from absl import flags

from experiments import measure
from mhil import comparison, facts

# By a row's label, what was found with each seed.
Done = dict[str, list[dict[str, Any]]]
LINKS = {"1 Gbit/s": 1e9, "10 Gbit/s": 1e10}
# What the modelled device computes; a step's operations are the compiler's.
FLOPS_PER_SECOND = 1e12
# Rows that the figures leave out.
ASIDE = "momentum|control|one hidden layer"
KINDS = {"": "with batch norm", ", no norm": "without norm"}
COLUMNS = ("step", "samples", "bytes", "flops", "accuracy", "coverage")


def write(out: pathlib.Path, name: str, done: Done) -> None:
  """Writes OUT.md, OUT.csv and the figures.

  Args:
    out: the files without their endings.
    name: of the suite.
    done: the rows that there are.
  """
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
    *about(name, done),
    "",
    *measure.grid(head, (cells(k, v) for k, v in done.items())),
  ]
  for title, path in figures(out, done).items():
    lines += ["", f"![{title}]({path.name})"]
  out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def about(name: str, done: Done) -> list[str]:
  """Where the numbers come from."""
  versions = ", ".join(
    f"{p} {importlib.metadata.version(p)}" for p in facts.PACKAGES
  )
  given = f" --seeds={max(map(len, done.values()))}"
  given += " --data_folder=DIR" if flags.FLAGS.data_folder else ""
  given += f" --tests={flags.FLAGS.tests}"
  note = flags.FLAGS.note
  return [
    f"`python -m experiments.curves --suite={name}{given}`, "
    f"{datetime.date.today()}; {versions}; simulated devices.",
    "",
    "Test accuracy in % of the merged branch, mean and standard deviation over "
    "seeds: with the statistics that the row's configuration names, and with "
    "those of the test batch, all of it or 32 at a time. Every row sees as "
    "many samples. Weights ever trained are a share of all weights. Bytes are "
    "what one device receives, from the compiled programs, in the first deal "
    "too: of an all-reduce 2 (n-1)/n of its result, of an all-to-all (n-1)/n. "
    f"{repetitions(done)} Modelled time adds a step's operations, by the "
    f"compiler's count, at {FLOPS_PER_SECOND:.0e} a second and these bytes on "
    "the link, without latency and one after the other.",
    *(["", note] if note else []),
  ]


def repetitions(done: Done) -> str:
  """How often an exchange had no room for its permutation, in a sentence."""
  shares = {
    label: sum(run["again"] for run in runs)
    / max(sum(run["exchanges"] for run in runs), 1)
    for label, runs in done.items()
  }
  worst = max(shares, key=lambda label: shares[label])
  if not shares[worst]:
    return "No all-to-all had to be made twice."
  return (
    "An all-to-all that had to be made again is counted once; most often in "
    f"`{worst}`, in {100 * shares[worst]:.0f} % of its exchanges."
  )


def cells(label: str, runs: list[dict[str, Any]]) -> list[str]:
  """One line of the page."""
  last = [run["curve"][-1] for run in runs]
  found = [label, str(len(runs))]
  for key in ("configured", "batch of whole", "batch of 32"):
    values = 100 * np.array([run["tested"].get(key, np.nan) for run in runs])
    found.append("" if np.isnan(values).any() else measure.mean_of(values))
  found.append(f"{100 * np.mean([p['coverage'] for p in last]):.0f} %")
  found.append(f"{np.mean([p['bytes'] for p in last]) / 1e6:,.3f}")
  for link in LINKS.values():
    found.append(f"{1e3 * np.mean([seconds(p, link) for p in last]):,.2f}")
  return found


def seconds(point: dict[str, float], link: float) -> float:
  """Modelled time up to a point of a curve, on a link of so many bit/s."""
  return point["flops"] / FLOPS_PER_SECOND + 8 * point["bytes"] / link


def figures(out: pathlib.Path, done: Done) -> dict[str, pathlib.Path]:
  """Draws a figure for each kind of network; rows of panels by n."""
  drawn = {}
  for ending, kind in KINDS.items():
    panels: dict[str, dict[str, Any]] = {}
    shown: list[dict[str, Any]] = []
    for label, runs in done.items():
      head, _, method = label.partition(" ")
      plain = method.removesuffix(", no norm")
      same = method == plain + ending
      if same and head.startswith("n=") and not re.search(ASIDE, plain):
        panels.setdefault(head, {})[plain] = lines_of(runs)
        shown += runs
    if panels:
      tail = "no_norm" if ending else "norm"
      path = out.with_name(f"{out.name}_{tail}.png")
      title = title_of(shown, kind)
      comparison.panels(panels, path, title, "test accuracy, %")
      drawn[title] = path
  return drawn


def title_of(runs: list[dict[str, Any]], kind: str) -> str:
  """What a figure's runs have in common."""
  asked = runs[0]["asked"]
  seeds = len({run["asked"]["seed"] for run in runs})
  return (
    f"{asked['data.name'].removeprefix('tfds:')}, {kind}, "
    f"J = {asked['subnets.local_steps']}, "
    f"{seeds} {'seeds' if seeds > 1 else 'seed'}"
  )


def lines_of(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """`{axis: [3, k]}`: where on that axis; mean and deviation in % there."""
  curves = [run["curve"] for run in runs]
  found = 100 * np.array([[p["accuracy"] for p in c] for c in curves])
  # One seed says nothing about others.
  deviation = found.std(0, ddof=1) if len(runs) > 1 else 0 * found[0]
  first = curves[0]
  axes = {
    "samples": [p["samples"] for p in first],
    "MB received by a device": [p["bytes"] / 1e6 for p in first],
  }
  for name, link in LINKS.items():
    axes[f"modelled s, {name}"] = [seconds(p, link) for p in first]
  return {k: np.array([x, found.mean(0), deviation]) for k, x in axes.items()}
