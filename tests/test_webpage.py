"""Parts of a page: whole, escaped, legible, and alone."""

import re

import numpy as np
import pytest

from mhil import plots, webpage
from tests import pages

NASTY = "<script>alert('&\"')</script>"


def theme(dark):
  """Colours of a theme by their names."""
  light, _, rest = webpage.STYLE.partition("@media")
  found = dict(re.findall(r"--([a-z]\w*):([^;}]+)", light))
  if dark:
    found |= dict(re.findall(r"--([a-z]\w*):([^;}]+)", rest.partition("}}")[0]))
  return {k: rgb(v.replace("\n", " ")) for k, v in found.items()}


def rgb(text):
  if not text.startswith("#"):
    return np.array([int(x) for x in text.split()]) / 255
  digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
  return np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255


def contrast(a, b):
  """WCAG's ratio of two colours."""

  def luminance(color):
    low = color / 12.92
    linear = np.where(color <= 0.04045, low, ((color + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)

  dark, bright = sorted((luminance(a), luminance(b)))
  return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_definition():
  assert contrast(rgb("#fff"), rgb("#000000")) == pytest.approx(21)
  assert contrast(rgb("#777777"), rgb("#fff")) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_every_ground(dark):
  of = theme(dark)
  for ground in "ground", "panel":
    assert contrast(of["ink"], of[ground]) >= 7
    assert contrast(of["soft"], of[ground]) >= 4.5
  for share in np.linspace(0, 1, 21):
    cell = share * of["shade"] + (1 - share) * of["ground"]
    assert contrast(of["ink"], cell) >= 4.5
  # A shade that cannot be seen would tell nothing.
  assert contrast(of["shade"], of["ground"]) > 2


@pytest.mark.parametrize("dark", [False, True])
def test_lines_have_the_colours_of_okabe_and_ito(dark):
  of = theme(dark)
  colors = [of[f"s{i}"] for i in range(len(plots.OKABE_ITO))]
  known = {c: rgb(c) for c in plots.OKABE_ITO}
  if dark:
    known["#000000"] = rgb("#fff")
  assert {tuple(c) for c in colors} == {tuple(c) for c in known.values()}
  # The first are used most. The set's sky blue and orange are faint on white.
  least = 3 if dark else 2
  assert min(contrast(c, of["ground"]) for c in colors) >= least
  assert min(contrast(c, of["ground"]) for c in colors[:3]) >= 3


def test_a_page_is_whole_and_alone():
  page = webpage.page("a title", ["<p>lead</p>"], {"One": "<p>1</p>", "B": ""})
  assert page.startswith("<!DOCTYPE html>\n")
  root = pages.tree(page)
  assert root.tag == "html" and root.get("lang") == "en"
  assert root.find("head/title").text == "a title"
  assert [h.text for h in root.iter("h1")] == ["a title"]
  assert [h.text for h in root.iter("h2")] == ["One", "B"]
  targets = {a.get("href") for a in root.iter("a")}
  assert targets == {f"#{s.get('id')}" for s in root.iter("section")}
  names = {m.get("name"): m.get("content") for m in root.iter("meta")}
  assert names["viewport"].startswith("width=device-width")
  policy = next(m for m in root.iter("meta") if m.get("http-equiv"))
  assert "default-src 'none'" in policy.get("content")
  assert not re.search(r"https?:|//|@import|url\(|<script|src=", page)
  assert "prefers-color-scheme:dark" in page


def test_words_are_escaped_everywhere():
  shares = np.ones((1, 1))
  parts = [
    webpage.paragraph(NASTY),
    webpage.missing(NASTY),
    webpage.facts({NASTY: NASTY}),
    webpage.figure("<svg></svg>", NASTY),
    webpage.folded(NASTY, "<p></p>"),
    webpage.table([NASTY, NASTY], [[NASTY, NASTY]], NASTY),
    webpage.heat(
      shares, corner=NASTY, rows=[NASTY], columns=[NASTY], caption=NASTY
    ),
    webpage.markdown(f"{NASTY}\n\n| {NASTY} |\n| --- |\n| {NASTY} |"),
  ]
  page = webpage.page(NASTY, parts, {NASTY: ""})
  assert "<script" not in page
  assert pages.words(pages.tree(page)).count("alert('&") == 22


def test_code_is_marked():
  assert webpage.paragraph("a `b<c` d") == "<p>a <code>b&lt;c</code> d</p>"


def test_tables_name_their_rows_and_columns():
  body = webpage.table(["a", "b"], [["r", "1"], ["s", "2"]], "what `it` is")
  found = pages.tree(body)
  assert pages.tables(found) == {
    "what it is": [["a", "b"], ["r", "1"], ["s", "2"]]
  }
  scopes = [th.get("scope") for th in found.iter("th")]
  assert scopes == ["col", "col", "row", "row"]
  # What scrolls can be reached by the keyboard, and has a name there.
  (box,) = found.iter("div")
  assert box.get("tabindex") == "0" and box.get("aria-label") == "what it is"


def test_a_long_table_is_folded():
  few, many = (webpage.tabled("<p>f</p>", "<p>t</p>", n) for n in (12, 1000))
  assert few == webpage.beside("<p>f</p>", "<p>t</p>")
  assert many == "<p>f</p>" + webpage.folded("Table of 1,000 rows", "<p>t</p>")


def cells(body):
  """Style and words of each cell of a heat table, row by row."""
  return [
    [(td.get("style"), td.text) for td in row.iter("td")]
    for row in pages.tree(body).find("div/table/tbody")
  ]


def heat(shares, **names):
  rows, columns = (list(map(str, range(n))) for n in shares.shape)
  told = {"corner": "task", "rows": rows, "columns": columns, "caption": "c"}
  return webpage.heat(shares, **told | names)


def test_cells_are_shaded_by_their_share():
  shares = np.array([[1.0, np.nan], [0.0, 0.4567]])
  assert cells(heat(shares)) == [
    [("--v:100", "100.0"), (None, None)],
    [("--v:0", "0"), ("--v:46", "45.7")],
  ]
  many = np.full((11, 11), 0.4567)
  assert cells(heat(many))[0][0] == ("--v:46", "46")


@pytest.mark.parametrize("tasks, dense", [(20, False), (21, True), (100, True)])
def test_many_cells_are_small_and_still_hold_their_numbers(tasks, dense):
  body = heat(np.full((tasks, tasks), 0.25))
  figure = pages.tree(body)
  table = figure.find("div/table")
  assert table.get("class") == ("heat dense" if dense else "heat")
  assert [len(row) for row in cells(body)] == [tasks] * tasks
  assert cells(body)[-1][-1] == ("--v:25", "25")
  loud = [th.text for th in table.iter("th") if th.get("class") != "quiet"]
  each = [str(t) for t in range(0, tasks, 10 if dense else 1)]
  assert loud == ["task", *each, *each]
  assert "is shown" not in pages.words(figure.find("figcaption"))


def test_a_thousand_tasks_leave_some_out():
  shares = np.add.outer(np.arange(1000), np.arange(1000)) / 2000
  body = heat(shares)
  assert len(body) < 500_000
  shown = cells(body)
  assert len(shown) == len(shown[0]) == 100
  assert shown[3][5][0] == f"--v:{100 * (30 + 50) / 2000:.0f}"
  assert "One of every 10 is shown." in body


def test_markdown_of_our_own_pages():
  text = "`a` is\nb.\n\n| x | y |\n| --- | --- |\n| 1 | `2` |\n\n| no table"
  found = pages.tree(f"<div>{webpage.markdown(text)}</div>")
  assert [pages.words(p) for p in found.iter("p")] == ["a is b.", "| no table"]
  assert pages.tables(found) == {"Table 1": [["x", "y"], ["1", "2"]]}
