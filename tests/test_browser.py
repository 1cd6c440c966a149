"""Pages in a real browser, on a phone and on a desk, by day and by night."""

import re

import matplotlib.image
import numpy as np
import pytest

from mhil import report
from tests import browser, pages
from tests.test_overview import DONE, ROWS, made
from tests.test_webpage import contrast

__all__ = ["made"]
SIZES = [(320, True), (390, False), (1280, True)]
TASKS = [1, 5, 20, 100]


@pytest.fixture(scope="module")
def page_of():
  """The page of a run of so many tasks."""

  def write(tasks):
    done = pages.done(tasks)
    return report.of_run(pages.numbers(done), pages.CONFIG, done.history)

  return write


def rgb(text):
  """Red, green, blue and opacity of a computed colour."""
  values = [float(x) for x in re.findall(r"[\d.]+", text)]
  return np.array(values[:3]) / 255, (*values, 1.0)[3]


def cell_contrast(found):
  """The least contrast between a cell's words and its shade."""
  ground, _ = rgb(found["ground"])
  least = 21.0
  for _, shade, ink in {tuple(cell) for cell in found["cells"]}:
    color, share = rgb(shade)
    cell = share * color + (1 - share) * ground
    least = min(least, contrast(cell, rgb(ink)[0]))
  return least


def meet(a, b, slack=1.0):
  return (
    min(a[2], b[2]) - max(a[0], b[0]) > slack
    and min(a[3], b[3]) - max(a[1], b[1]) > slack
  )


def check(seen, width, dark):
  """What must hold of every page, wherever it is read."""
  found = seen.found
  assert not seen.console and not found["errors"]
  assert found["fetched"] == []
  assert found["window"] == width and found["dark"] == dark
  # Nothing pushes the page sideways: what is wide scrolls in its own box.
  assert found["wide"] <= width
  for inner, content, overflow, right in found["boxes"]:
    assert right <= width and (content <= inner or overflow == "auto")
  bright = rgb(found["ground"])[0].mean()
  assert (bright < 0.2) if dark else (bright > 0.9)
  assert contrast(rgb(found["ground"])[0], rgb(found["ink"])[0]) >= 7
  for chart in found["charts"]:
    left, top, right, bottom = chart["box"]
    assert right - left >= 280 and bottom - top >= 50
    marked = any(r - l > 3 and b - t > 3 for l, t, r, b in chart["marks"])
    assert marked or any(length > 20 for length, _ in chart["lines"])
    for i, word in enumerate(chart["words"]):
      assert left - 1 <= word[0] and word[2] <= right + 1
      assert top - 1 <= word[1] and word[3] <= bottom + 1
      # Legible: a line of words is about 1.2 times as high as its letters.
      assert word[3] - word[1] >= 9 or word[2] - word[0] >= 9
      assert not any(meet(word, other) for other in chart["words"][:i])


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("width, dark", SIZES)
def test_a_run(page_of, tmp_path, tasks, width, dark):
  seen = browser.look(page_of(tasks), tmp_path, width=width, dark=dark)
  check(seen, width, dark)
  found = seen.found
  # A lone task's curves are points.
  assert len(found["charts"]) == (5 if tasks > 1 else 3)
  assert all(r - l > 40 and b - t > 40 for l, t, r, b in found["tables"])
  cells = tasks * (tasks + 1) // 2 + (tasks**2 if tasks > 1 else 0)
  assert len(found["cells"]) == cells
  assert cell_contrast(found) >= 4.5


@pytest.mark.parametrize("width, dark", SIZES)
def test_a_comparison(made, tmp_path, width, dark):
  seen = browser.look(made(ROWS, DONE)[0], tmp_path, width=width, dark=dark)
  check(seen, width, dark)
  assert len(seen.found["charts"]) == 4 and len(seen.found["tables"]) == 1


def test_both_themes_have_their_own_colours(page_of, tmp_path):
  page = page_of(5)
  light, dark = (
    browser.look(page, tmp_path, dark=dark).found for dark in (False, True)
  )
  for name in "ground", "ink":
    assert light[name] != dark[name]
  strokes = [
    {color for chart in found["charts"] for _, color in chart["lines"]}
    for found in (light, dark)
  ]
  # Five heads, of which each has a colour of its own.
  assert all(len(colors) == 5 for colors in strokes)


def test_a_picture_of_the_page_as_it_is(page_of, tmp_path):
  path = tmp_path / "report.html"
  path.write_text(page_of(5))
  picture = tmp_path / "report.png"
  assert browser.shoot(path, picture, width=1280, height=2000) == []
  pixels = matplotlib.image.imread(picture)[..., :3]
  assert pixels.shape[:2] == (2000, 1280)
  for color in "#0072B2", "#D55E00", "#009E73":
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    assert (np.abs(pixels - wanted).max(-1) < 0.02).sum() > 100


BAD = {
  "console": "<script>console.error('oh')</script>",
  "errors": "<script>nothing()</script>",
  "fetched": "<img src='https://example.invalid/x.png'/>",
  "wide": "<p style='width:2000px'>wide</p>",
  "small": "<svg role='img' class='chart'></svg>",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_page_would_be_noticed(page_of, tmp_path, kind):
  page = page_of(2).replace("</main>", BAD[kind] + "</main>")
  seen = browser.look(page, tmp_path)
  with pytest.raises(AssertionError):
    check(seen, 390, False)
