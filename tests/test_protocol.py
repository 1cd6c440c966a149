"""What a comparison says of its rows: every fact is the row's own."""

import pytest

from experiments import compare, protocol, suites
from mhil import config as config_lib


def run(**changed):
  return {
    "step_bytes_per_device": {"temporary": 2**20, "arguments": 2**19},
    "parameters": {"total": 1_000, "per_head": 100},
    "memory": {"samples": 2_000, "bytes": 6_400},
    "augmentation": {"pad": 0, "flip": False},
    "test_ms_per_image": 0.25,
  } | changed


def told(changes, **changed):
  """Words, and the cells of the only row."""
  config = config_lib.Config()
  for field, value in changes.items():
    config_lib.assign(config, field, value)
  lines = protocol.lines({"it": config}, {"it": [run(**changed)]})
  (row,) = (x for x in lines if x.startswith("| it |"))
  return "\n".join(lines), [cell.strip() for cell in row.split("|")[2:-1]]


def test_a_row_says_what_it_is_and_costs():
  _, cells = told({})
  assert cells == [
    *("dce, learned", "mlp 64", "none", "2,000", "6,400", "1,000", "4,000"),
    *("1.5", "0.250"),
  ]


@pytest.mark.parametrize(
  "changes, place, cell",
  [
    ({"loss.name": "ce"}, 0, "ce"),
    ({"loss.name": "distributed_ce"}, 0, "distributed ce"),
    ({"loss.reference": "zero"}, 0, "dce, zero"),
    ({"loss.correction": "off"}, 0, "dce, learned, no correction"),
    ({"train.train_heads": "new"}, 0, "dce, learned, no correction"),
    (
      {"network.name": "resnet", "network.widths": (8, 8, 16)}
      | {"network.blocks": (1, 2)},
      1,
      "resnet 8-8-16 of 1-2 blocks",
    ),
    ({"network.name": "resnet14"}, 1, "resnet14"),
    (
      {"network.name": "convnet", "network.widths": (16, 32)},
      1,
      "convnet 16-32",
    ),
    ({"network.norm": "batch"}, 1, "mlp 64, batch norm"),
    ({"network.fixed": True}, 1, "mlp 64, fixed"),
    ({"objective.name": "layer_parallel"}, 1, "mlp 64, layer parallel"),
  ],
)
def test_a_field_moves_its_cell_alone(changes, place, cell):
  _, plain = told({})
  _, cells = told(changes)
  assert cells[place] == cell
  del plain[place], cells[place]
  assert cells == plain


@pytest.mark.parametrize(
  "pad, flip, cell",
  [
    (4, True, "crops of 4 pixels, flips"),
    (4, False, "crops of 4 pixels"),
    (0, True, "flips"),
  ],
)
def test_augmentation_is_what_the_run_did(pad, flip, cell):
  _, cells = told({}, augmentation={"pad": pad, "flip": flip})
  assert cells[2] == cell


def test_what_an_older_run_did_not_measure_is_left_empty():
  old = run()
  del old["augmentation"], old["test_ms_per_image"]
  lines = protocol.lines({"it": config_lib.Config()}, {"it": [old]})
  assert lines[-1].startswith("| it | dce, learned | mlp 64 |  | 2,000")
  assert lines[-1].endswith("| 1.5 |  |")


@pytest.mark.parametrize(
  "changes, words",
  [
    ({}, "2 classes a task, in an order drawn from the seed."),
    ({"stream.base": 5}, "5 classes, then 2 a task, in an order drawn"),
    ({"stream.sizes": (3, 4, 3)}, "Tasks of 3, 4, 3 classes, in an order"),
    ({"stream.order_seed": -1}, "in the order of their numbers."),
    ({"stream.order": (1, 0)}, "in a given order."),
  ],
)
def test_the_order_is_said(changes, words):
  assert words in told(changes)[0]


def test_rows_of_two_orders_are_told_apart():
  one, other = config_lib.Config(), config_lib.Config()
  other.stream.increment = 5
  configs = {"a": one, "b": other, "c": one}
  lines = protocol.lines(configs, {key: [run()] for key in configs})
  seed = "in an order drawn from the seed"
  assert f"- 2 classes a task, {seed}: a, c." in lines
  assert f"- 5 classes a task, {seed}: b." in lines


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_can_be_told(suite):
  rows = suites.SUITES[suite]
  configs = {row.label: compare.configure(row, 0) for row in rows}
  lines = protocol.lines(configs, {key: [run()] for key in configs})
  # A head of the table, its rule, a line each.
  assert sum(line.startswith("|") for line in lines) == 2 + len(rows)
