"""The table of expectations: what it says is what a run gives."""

import pathlib

import pytest

from experiments import cli, expected
from tests import program

README = (program.ROOT / "README.md").read_text()
BEGIN, END = "<!-- expected -->\n", "<!-- /expected -->"
# One a paper, of those that take seconds.
TRAINED = {
  "digits",
  "rehearsal_digits",
  "layer_parallel_digits",
  "subnets_digits",
}
RUN = """
import runpy
runpy.run_module("experiments.expected", run_name="__main__", alter_sys=True)
"""
ROWS = {row.config: row for row in expected.ROWS}


def test_the_readme_holds_the_table():
  table = README.partition(BEGIN)[2].partition(END)[0]
  assert "\n".join(expected.lines()) in table


@pytest.mark.parametrize("name", ROWS)
def test_a_row_stands_for_files_that_are_there(name):
  assert (cli.CONFIGS / f"{name}.py").is_file()
  assert ROWS[name].files
  for file in ROWS[name].files:
    assert (program.ROOT / "mhil" / f"{file}.py").is_file()


@pytest.mark.slow
def test_all_rows_run_in_one_process(tmp_path):
  """One after the other on other numbers of devices."""
  script = RUN.replace(
    "import runpy\n",
    """import runpy
from experiments import cli
load = cli.load_config

def short(path):
  config = load(path)
  config.train.epochs = 1
  return config

cli.load_config = short
""",
  )
  done = program.forked(["--only=rehearsal_digits,digits"], tmp_path, script)
  table = [line for line in done.out.splitlines() if line.startswith("| ")]
  assert len(table) == 4, done
  assert "more than 1.5 points away" in done.err


def test_near_is_a_tolerance_on_both_numbers():
  row = expected.Row("digits", "", (), 90.0, 80.0)
  assert expected.near(row, ("91.5", "78.5"))
  assert not expected.near(row, ("91.6", "80.0"))
  assert not expected.near(row, ("90.0", "78.4"))


def run(folder: pathlib.Path, *names):
  return program.forked([f"--only={','.join(names)}"], folder, RUN)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRAINED))
def test_a_run_of_today_gives_what_is_expected(name, tmp_path):
  done = run(tmp_path, name)
  assert done.status == 0, done
  row = done.out.rstrip().splitlines()[-1]
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert cells[0] == name
  wanted, found = map(float, cells[1:3]), map(float, cells[3:])
  assert list(wanted) == pytest.approx(list(found), abs=expected.TOLERANCE)


def test_a_row_that_is_not_there_is_refused(tmp_path):
  done = run(tmp_path, "digitz")
  assert done.status == 2
  assert done.err.startswith(
    "error: --only=digitz is no row; use one of digits"
  )
