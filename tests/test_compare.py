"""The comparison: rows that are valid, a whole table, errors of one line."""

import csv
import os
import re

import pytest

from experiments import cli, compare, suites
from tests import pages, program
from tests.test_plots import check_picture

ROWS = {
  f"{name}: {row.label}": row
  for name, rows in suites.SUITES.items()
  for row in rows
}
# Two short rows of a set that is made here instead of being read from DIR.
SCRIPT = """
import runpy, sys
from experiments import suites
from mhil import data
from tests import tiny

def load(name, *, folder, **rest):
  assert name == "tfds:cifar10" and folder == sys.argv[1].split("=")[1]
  return tiny.dataset(10)

data.load = load
short = {"network.name": "mlp", "train.epochs": 1, "memory.size": 20}
suites.SUITES["cifar10_5x2"] = [
  suites.Row(label, "cifar10_5x2", short | {"loss.name": loss})
  for label, loss in (("first", "dce"), ("second", "ce"))
]
runpy.run_module("experiments.compare", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_valid_and_goes_by_its_seed(name):
  config = compare.configure(ROWS[name], 7)
  assert config.seed == config.stream.order_seed == 7
  assert config != compare.configure(ROWS[name], 8)


def test_rows_of_a_suite_have_folders_of_their_own():
  for rows in suites.SUITES.values():
    slugs = {compare.slug(row, 0) for row in rows}
    assert len(slugs) == len(rows)
  row = suites.Row("D-CE, old heads frozen", "digits")
  assert compare.slug(row, 3) == "d-ce-old-heads-frozen-3"


def test_the_data_folder_reaches_the_configuration(tmp_path):
  row = suites.SUITES["fashion_5x2"][0]
  config = compare.configure(row, 0, str(tmp_path))
  assert config.data.folder == str(tmp_path)
  assert compare.configure(row, 0).data.folder == ""


@pytest.mark.parametrize(
  "suite, words",
  [
    ("digits", "is not read for data.name=digits; .* or leave it out"),
    ("fashion_5x2", "is not a folder; .* prepared set fashion_mnist"),
  ],
)
def test_a_data_folder_that_cannot_be_meant(suite, words):
  row = suites.SUITES[suite][0]
  with pytest.raises(cli.UserError, match=words) as raised:
    compare.configure(row, 0, "no/such/folder")
  assert str(raised.value).startswith("--data_folder=no/such/folder ")


def test_after_a_signal_the_same_command_is_to_go_on(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(compare.train, "train", lambda *_, **__: None)
  config = compare.configure(suites.SUITES["digits"][0], 0)
  with pytest.raises(SystemExit) as ended:
    cli._guarded(lambda: compare.finish(config, tmp_path))
  assert ended.value.code == os.EX_TEMPFAIL
  out, err = capsys.readouterr()
  assert (out, err) == ("stopped by a signal; the same command goes on\n", "")


@pytest.mark.slow
def test_a_table_holds_every_run_and_names_no_place(tmp_path):
  flags = [
    f"--data_folder={tmp_path}",
    "--suite=cifar10_5x2",
    "--seeds=2",
    f"--out={tmp_path / 'table'}",
    f"--runs={tmp_path / 'runs'}",
  ]
  done = program.forked(flags, tmp_path / "fork", SCRIPT)
  assert done.status == 0, done.err
  made = tmp_path / "table.md", tmp_path / "table.csv"
  page, numbers = (path.read_text() for path in made)
  assert "--suite=cifar10_5x2 --seeds=2 --data_folder=DIR`" in page
  assert str(tmp_path) not in page + numbers
  assert re.findall(r"^\| (first|second) \| 2 \|", page, re.MULTILINE) == [
    "first",
    "second",
  ]
  assert check_picture(tmp_path / "table.png").any()
  root = pages.tree((tmp_path / "table.html").read_text())
  assert str(tmp_path) not in pages.words(root)
  whole = re.findall(r"^\| (first|second) \|.*\|$", page, re.MULTILINE)
  found = [row[0] for rows in pages.tables(root).values() for row in rows[1:]]
  assert found == whole == ["first", "second"] * 2
  rows = list(csv.DictReader(numbers.splitlines()))
  assert [(row["row"], row["seed"]) for row in rows] == [
    (label, seed) for label in ("first", "second") for seed in "01"
  ]

  # What is done is not run again.
  runs = sorted((tmp_path / "runs").rglob("metrics.json"))
  times = [path.stat().st_mtime_ns for path in runs]
  assert len(runs) == 4
  again = program.forked(flags, tmp_path / "again", SCRIPT)
  assert again.status == 0, again.err
  assert [path.stat().st_mtime_ns for path in runs] == times
  assert made[1].read_text() == numbers
