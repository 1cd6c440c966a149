"""The page of a comparison: the table as it stands, figures of its runs."""

import pytest

from experiments import overview, page, suites
from mhil import charts
from tests import pages

ROWS = [
  suites.Row("rows <30>", "digits", at={"size": 30.0}, curve="ours"),
  suites.Row("rows 5", "digits", at={"size": 5.0}, curve="ours"),
  suites.Row("joint", "digits", bound="upper"),
  suites.Row("plain", "digits"),
]


def run(accuracy, seed, seconds=2.0):
  return dict.fromkeys(page.COLUMNS, accuracy) | {
    "seed": seed,
    "seconds_per_task": [seconds, seconds],
    "mesh": {"data": 1, "head": 2, "stage": 1, "subnet": 1},
    "collectives": [{"kind": "all-reduce", "bytes": 8, "axes": ["head"]}],
  }


DONE = {
  "rows <30>": [run(0.70, 0), run(0.72, 1)],
  "rows 5": [run(0.60, 0), run(0.60, 1)],
  "joint": [run(0.90, 0), run(0.92, 1)],
  "plain": [run(0.50, 0, 7.0)],
}


@pytest.fixture
def made(tmp_path):
  """Words of a comparison's page, and its tree."""

  def write(rows, done, suite="digits", about=("About `it` & more.",)):
    out = tmp_path / "table"
    page.write(out, suite, list(about), done)
    overview.write(out, rows, done)
    text = out.with_suffix(".html").read_text()
    return text, pages.tree(text), out.with_suffix(".md").read_text()

  return write


def test_it_holds_the_table_and_its_words(made):
  text, root, markdown = made(ROWS, DONE)
  assert root.find("head/title").text == "Comparison digits"
  (table,) = pages.tables(root).values()
  lines = [x for x in markdown.splitlines() if x.startswith("|")]
  cells = [[c.strip() for c in x.strip("|").split("|")] for x in lines]
  assert table == [cells[0], *cells[2:]]
  assert "About it & more." in pages.words(root)
  assert "<30>" not in text


def test_figures_hold_every_row(made):
  _, root, _ = made(ROWS, DONE)
  told = [s.get("aria-label") for s in root.iter("svg") if s.get("role")]
  average, last, seconds, scan = told
  for label in DONE:
    assert label in average and label in last and label in seconds
  assert "rows <30> 71.0 ± 1.4" in average and "plain 50.0" in average
  assert "plain 14.0" in seconds and "joint 4.0" in seconds
  # Along the number, whatever the order of the rows; bounds are level.
  assert scan.endswith("ours from 60 to 71; joint from 91 to 91")


def test_no_scan_without_a_number(made):
  _, root, _ = made(ROWS[2:], {k: DONE[k] for k in ("joint", "plain")})
  assert [h.text for h in root.iter("h2")] == ["Tables", "Accuracy and time"]


def test_one_row_of_one_seed(made):
  _, root, _ = made(ROWS[3:], {"plain": DONE["plain"]})
  (average, *_) = [s for s in root.iter("svg") if s.get("role")]
  assert "±" not in average.get("aria-label")


def test_a_note_that_looks_like_a_table_is_words(made):
  _, root, _ = made(ROWS, DONE, about=["First.", "", "| a note"])
  assert "| a note" in [pages.words(p) for p in root.iter("p")]


@pytest.mark.parametrize("name", suites.SUITES)
def test_scans_of_every_suite_have_colours_enough(name):
  rows = suites.SUITES[name]
  curves, bounds = page.scans(rows, {row.label: [run(0.5, 0)] for row in rows})
  for named in curves.values():
    assert len(named) + len(bounds) <= charts.SERIES
