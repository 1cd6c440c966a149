"""Numbers of the methods' pages are those of docs/results."""

import csv
import re

import numpy as np
import pytest

from experiments import cli
from tests import program

DOCS = program.ROOT / "docs"


def cells(name):
  """Of a results page: the cells of each label's first row."""
  found = {}
  for line in (DOCS / "results" / f"{name}.md").read_text().splitlines():
    if line.startswith("| "):
      first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
      found.setdefault(first, rest)
  return found


def page(name):
  return (DOCS / "methods" / f"{name}.md").read_text()


def table(name):
  with (DOCS / "results" / f"{name}.csv").open() as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_digits_of_subnets(n):
  norm = "IST", "IST, fixed subnets", "local SGD", "data parallel"
  names = *norm, "IST, no norm", "IST, fixed subnets, no norm"
  made = cells("subnets_digits")
  row = " | ".join(made[f"n={n} {name}"][1] for name in names)
  assert f"| {n} | {row} |" in page("5-subnets")


@pytest.mark.parametrize(
  "label, step, words",
  [
    ("n=8 IST", 250, "at {a:.1f} % after {ms:.1f} ms"),
    ("n=8 local SGD", 50, "at {a:.1f} after {ms:.1f}"),
    ("n=8 local SGD", 75, "at {a:.1f} after {ms:.1f}"),
    ("n=8 data parallel", 50, "at {a:.1f} after {ms:.0f}"),
    ("n=8 IST", 300, "device received {mb:.2f} MB"),
  ],
)
def test_way_of_subnets(label, step, words):
  at = [
    row
    for row in table("subnets_digits")
    if (row["row"], int(row["step"])) == (label, step)
  ]
  names = "accuracy", "bytes", "flops"
  mean = {name: np.mean([float(row[name]) for row in at]) for name in names}
  ms = 1e3 * (mean["flops"] / 1e12 + 8 * mean["bytes"] / 1e9)
  numbers = {"a": 100 * mean["accuracy"], "ms": ms, "mb": mean["bytes"] / 1e6}
  assert words.format(**numbers) in " ".join(page("5-subnets").split())


@pytest.mark.parametrize("mode", ["R0", "E", "R1E"])
def test_modules(mode):
  made, ks = cells("local_fashion"), (4, 7) if mode == "R1E" else (2, 4, 7)
  row = " | ".join(made[f"{mode}, {k} modules"][1] for k in ks)
  found = rf"^\| {mode} \|.* {re.escape(row)} \|$"
  assert re.search(found, page("3-local"), re.MULTILINE)


def mean(name, label):
  rows = [row for row in table(name) if row["row"] == label]
  return 100 * np.mean([float(row["last_accuracy"]) for row in rows])


def test_distances_are_of_what_is_not_rounded():
  gaps = [
    mean("local_fashion", f"end to end with the encoders of {mode}, {k}")
    - mean("local_fashion", f"{mode}, {k} modules")
    for mode in ("E", "R1E")
    for k in (4, 7)
  ]
  told = f"{min(gaps):.1f} to {max(gaps):.1f} points above"
  assert told in page("3-local")
  serial = [f"{k} stages as serial as back-propagation" for k in (2, 3, 4)]
  gaps = [
    mean("layer_parallel_fashion", row)
    - mean("layer_parallel_fashion", f"{row}, correction off (control)")
    for row in serial
  ]
  told = f"apart by {min(gaps):.1f} to {max(gaps):.1f} points"
  assert told in page("4-layer-parallel")


@pytest.mark.parametrize(
  "config, label",
  [
    ("layer_parallel_fashion", "2 stages as serial as back-propagation"),
    ("local_fashion", "E, 7 modules"),
    ("subnets_digits", "n=4 IST"),
    ("subnets_wide", "n=4 IST"),
    ("subnets_cifar10_resnet", "longest section, scaled"),
  ],
)
def test_docstrings_of_configurations(config, label):
  text = (cli.CONFIGS / f"{config}.py").read_text()
  assert cells(config)[label][1] in text
