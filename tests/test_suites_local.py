"""Comparisons of local learning: every context has its control beside it."""

import pytest

from experiments import build, compare, page, suites, suites_local
from mhil import config as config_lib
from mhil import cuts, modules
from tests import tiny
from tests.test_plots import check_picture

SUITES = ("local_cifar10", "local_fashion")
FASHION = {row.label: row for row in suites.SUITES["local_fashion"]}
CIFAR10 = {row.label: row for row in suites.SUITES["local_cifar10"]}


def fields(row):
  config = compare.configure(row, 0)
  return config_lib.flatten(config_lib.to_dict(config))


@pytest.mark.parametrize("k", [4, 7])
@pytest.mark.parametrize("mode", ["E", "R1E"])
def test_the_same_network_is_trained_end_to_end_too(mode, k):
  row = FASHION[f"{mode}, {k} modules"]
  control = FASHION[f"end to end with the encoders of {mode}, {k}"]
  assert row.at == control.at == {"modules": k}
  changed = dict(fields(control).items() - fields(row).items())
  assert changed == {"local.isolated": False}


def test_the_control_that_must_not_learn_is_there():
  control = FASHION["E, 7 modules, learning rate 0 (control)"]
  changed = fields(control).items() - fields(FASHION["E, 7 modules"]).items()
  assert dict(changed) == {"optimizer.learning_rate": 0.0}


def split_of(row, shape, depth):
  config = compare.configure(row, 0)
  dataset = tiny.dataset(10, shape=shape)
  branch = build.make_branch(config.network, dataset, 11)
  assert branch.name == f"resnet{depth}"
  return build.make_split(config.local, branch, dataset)


@pytest.mark.parametrize("label", FASHION)
def test_labels_of_fashion_are_what_is_built(label):
  cut = split_of(FASHION[label], (8, 8, 1), 14)
  k = FASHION[label].at.get("modules", 7 if "modules" in label else 1)
  assert len(cut.modules) == k
  mode = label.split(",")[0].removeprefix("end to end with the encoders of ")
  assert cut.method.mode == ("R0" if label == "end to end" else mode)


@pytest.mark.parametrize("label", CIFAR10)
def test_labels_of_cifar10_are_what_is_built(label):
  cut = split_of(CIFAR10[label], (8, 8, 3), 32)
  k = int(label.split()[-2]) if label.endswith("modules") else 16
  k = 1 if label == "end to end" else k
  assert [module[-1] for module in cut.modules[:-1]] == [
    *cuts.published("resnet32", k)
  ]
  method, *_ = label.split(",")
  pixels = cut.method.pixels
  known = {
    "end to end": modules.DGL,
    "greedy 0c1f": modules.GREEDY,
    "DGL": modules.DGL,
    **{mode: modules.Method(mode) for mode in ("E", "R1E")},
  }
  for mode in "E", "R1E":
    name = f"end to end with the encoders of {mode}"
    known[name] = modules.Method(mode, isolated=False)
  assert cut.method == known[method]._replace(pixels=pixels)


def test_the_published_recipe_is_scanned_where_it_has_lists():
  found = {(row.curve, row.at["modules"]) for row in CIFAR10.values() if row.at}
  names = "greedy 0c1f", "DGL", "E", "R1E"
  assert found == {(name, k) for name in names for k in (4, 8, 16)}


@pytest.mark.parametrize("suite", SUITES)
def test_what_a_row_costs_is_tabled(suite):
  assert suite in suites.COSTS


@pytest.mark.parametrize("suite", SUITES)
def test_a_figure_goes_over_the_number_of_modules(suite, tmp_path):
  rows = suites.SUITES[suite]
  run = {
    "average_incremental_accuracy": 0.7,
    "last_accuracy": 0.7,
    "seconds_per_task": [1.0],
  }
  done = {
    row.label: [run | {"average_incremental_accuracy": 0.6 + i / 100}]
    for i, row in enumerate(rows)
  }
  page.draw(tmp_path / "table", rows, done)
  assert check_picture(tmp_path / "table_scan.png").any()


def test_two_modules_have_no_context_of_both_kinds():
  assert "R1E, 2 modules" not in FASHION
  assert suites_local.CUTS[2] == (3,)
