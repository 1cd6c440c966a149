"""Figures: whole, legible, silent, and free of global state."""

import pathlib
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mhil import plots


@pytest.fixture
def figures(monkeypatch):
  """The figures that were saved, in order."""
  saved, save = [], Figure.savefig

  def spy(self, *args, **kwargs):
    saved.append(self)
    save(self, *args, **kwargs)

  monkeypatch.setattr(Figure, "savefig", spy)
  return saved


def lower(tasks, value=0.5):
  return np.where(np.tri(tasks, dtype=bool), value, np.nan)


def run(tasks, steps=30):
  """A history in which head `t` opens with task `t`."""
  step = np.arange(tasks * steps)
  opened = step[:, None] >= steps * np.arange(tasks)
  since = step[:, None] - steps * np.arange(tasks)
  loss = np.where(opened, 0.1 + np.exp(-since / 10), np.nan)
  names = ("class_incremental", "task_id", "within_task")
  accuracy = {name: np.linspace(1, 0.7, tasks) for name in names}
  return {"step": step, "loss": loss}, [steps] * tasks, accuracy


def check_picture(path):
  """A picture with something on it and nothing cut off at its edges."""
  with open(path, "rb") as file:
    assert file.read(8) == b"\x89PNG\r\n\x1a\n"
  pixels = matplotlib.image.imread(path)[..., :3]
  height, width = pixels.shape[:2]
  assert 400 <= height <= 2000 and 400 <= width <= 2000
  ink = (pixels < 1).any(-1)
  # Axes, ticks and words alone are more than this.
  assert ink.mean() > 0.01
  edge = np.ones_like(ink)
  edge[1:-1, 1:-1] = False
  assert not (ink & edge).any()
  return pixels


def overlaps(texts, figure):
  """Pairs of visible words whose boxes meet."""
  renderer = FigureCanvasAgg(figure).get_renderer()
  boxes = [t.get_window_extent(renderer) for t in texts if t.get_text()]
  return [
    (a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)
  ]


@pytest.mark.parametrize("tasks", [1, 5, 20, 50])
def test_accuracy_matrix(tmp_path, figures, tasks):
  path = tmp_path / "matrix.png"
  plots.accuracy_matrix(lower(tasks), path, "a title")
  check_picture(path)
  axes = figures[0].axes[0]
  cells = tasks * (tasks + 1) // 2 if tasks <= 20 else 0
  assert [text.get_text() for text in axes.texts] == [".50"] * cells
  assert not overlaps(axes.texts, figures[0])
  assert not overlaps(axes.get_xticklabels(), figures[0])
  assert axes.get_xlabel() == "accuracy on task"
  assert axes.get_ylabel() == "after task"
  assert figures[0].get_suptitle() == "a title"


@pytest.mark.parametrize("value", [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_cell_words_stand_out(tmp_path, figures, value):
  plots.accuracy_matrix(lower(2, value), tmp_path / "matrix.png")
  word = figures[0].axes[0].texts[0].get_color()

  def luminance(color):
    color = np.array(color)
    linear = np.where(
      color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4
    )
    return linear @ (0.2126, 0.7152, 0.0722)

  cell = luminance(colormaps["cividis"](value)[:3])
  letter = {"white": 1.0, "black": 0.0}[word]
  dark, bright = sorted((cell, letter))
  # 4.5 is the contrast that WCAG asks of text.
  assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_only_the_measured_past_is_drawn(tmp_path, figures):
  matrix = np.full((3, 3), 0.25)
  matrix[2, 0] = np.nan
  plots.accuracy_matrix(matrix, tmp_path / "matrix.png")
  places = {text.get_position() for text in figures[0].axes[0].texts}
  assert places == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)}


def test_a_long_title_is_wrapped(tmp_path):
  title = "class-incremental learning of a hundred classes " * 4
  plots.accuracy_matrix(lower(2), tmp_path / "matrix.png", title)
  check_picture(tmp_path / "matrix.png")
  plots.curves(*run(2), tmp_path / "curves.png", title)
  check_picture(tmp_path / "curves.png")


@pytest.mark.parametrize("tasks", [1, 5, 20])
def test_curves(tmp_path, figures, tasks):
  path = tmp_path / "curves.png"
  history, steps, accuracy = run(tasks)
  plots.curves(history, steps, accuracy, path, "a title")
  check_picture(path)
  losses, accuracies = figures[0].axes
  labels = [text.get_text() for text in losses.get_legend().get_texts()]
  assert labels == [f"head {head}" for head in range(tasks)]
  shown = [text.get_text() for text in accuracies.get_legend().get_texts()]
  assert shown == ["class-incremental", "task-id", "within-task"]
  assert not overlaps(losses.texts, figures[0])
  assert not overlaps(accuracies.get_xticklabels(), figures[0])
  lines = losses.get_lines()
  np.testing.assert_array_equal(lines[0].get_ydata(), history["loss"][:, 0])
  styles = {(line.get_color(), line.get_linestyle()) for line in lines[:tasks]}
  assert len(styles) == tasks
  borders = [line.get_xdata()[0] for line in lines[tasks:]]
  assert borders == list(np.cumsum(steps)[:-1])


def test_a_legend_of_very_many_heads_names_some(tmp_path, figures):
  history, steps, accuracy = run(200)
  plots.curves(history, steps, accuracy, tmp_path / "curves.png")
  losses = figures[0].axes[0]
  labels = [text.get_text() for text in losses.get_legend().get_texts()]
  assert labels == [f"head {head}" for head in range(0, 200, 5)]
  # Above half of the figure's width stays for what is drawn.
  assert losses.get_position().width > 0.5


def test_narrow_tasks_go_unlabelled(tmp_path, figures):
  history, _, accuracy = run(3)
  plots.curves(history, [80, 8, 2], accuracy, tmp_path / "curves.png")
  labels = [text.get_text() for text in figures[0].axes[0].texts]
  assert labels == ["task 0", "task 1"]


def test_heads_that_were_never_open_are_left_out(tmp_path, figures):
  history, steps, accuracy = run(2)
  history["loss"] = np.pad(
    history["loss"], ((0, 0), (0, 3)), constant_values=np.nan
  )
  plots.curves(history, steps, accuracy, tmp_path / "curves.png")
  legend = figures[0].axes[0].get_legend()
  assert [text.get_text() for text in legend.get_texts()] == [
    "head 0",
    "head 1",
  ]


def test_a_diverged_loss_still_gives_a_figure(tmp_path):
  history, steps, accuracy = run(2)
  history["loss"][40:, 1] = np.inf
  plots.curves(history, steps, accuracy, tmp_path / "curves.png")
  check_picture(tmp_path / "curves.png")


def test_a_single_logged_step_is_visible(tmp_path):
  history = {"step": np.array([3]), "loss": np.array([[0.5]])}
  plots.curves(history, [5], {"task_id": [0.5]}, tmp_path / "curves.png")
  pixels = check_picture(tmp_path / "curves.png")
  height, width = pixels.shape[:2]
  blue = np.abs(pixels - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.02
  # Left of the legend, in the upper panel.
  assert blue[: height // 2, : width * 3 // 4].sum() > 10


def test_nothing_logged_gives_empty_panels(tmp_path):
  history = {"step": np.zeros(0), "loss": np.zeros((0, 2))}
  plots.curves(history, [], {}, tmp_path / "curves.png")
  check_picture(tmp_path / "curves.png")


def test_other_formats_follow_from_the_path(tmp_path):
  plots.accuracy_matrix(lower(2), tmp_path / "matrix.svg")
  assert "<svg" in (tmp_path / "matrix.svg").read_text()


def test_pyplot_is_never_loaded(tmp_path):
  # In a process of its own, since another test may have loaded pyplot.
  program = (
    "import sys, numpy as np; from mhil import plots;"
    f"plots.accuracy_matrix(np.eye(2), {str(tmp_path / 'matrix.png')!r});"
    "sys.exit('matplotlib.pyplot' in sys.modules)"
  )
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run([sys.executable, "-c", program], cwd=root)
  assert done.returncode == 0


def test_guesses_show_their_numbers_and_all_of_them(figures, tmp_path):
  rows = [
    {
      "settled/chain": 0.9 - 0.1 * t,
      "collected/chain": 0.8 - 0.1 * t,
      "settled/aux": 0.2,
      # Two states that point apart are off by up to 2.
      "settled/violation1": 1.9,
      "settled/violation2": 0.3 + 0.1 * t,
    }
    for t in range(3)
  ]
  plots.guesses(rows, tmp_path / "guesses.png", "Guesses")
  check_picture(tmp_path / "guesses.png")
  accuracies, violations = figures[0].axes
  labels = "chain", "chain, statistics as collected", "guess and last stage"
  names = "settled/chain", "collected/chain", "settled/aux"
  for axes, pairs in (
    (accuracies, dict(zip(labels, names))),
    (violations, {f"interface {k}": f"settled/violation{k}" for k in (1, 2)}),
  ):
    drawn = {line.get_label(): [*line.get_ydata()] for line in axes.lines}
    want = {label: [row[n] for row in rows] for label, n in pairs.items()}
    assert drawn == want
  assert accuracies.get_ylim() == (-0.02, 1.02)
  low, high = violations.get_ylim()
  assert low == 0 and high > 1.9


def test_probes_of_networks_with_few_and_many_modules(figures, tmp_path):
  curves = {"one": [50.0], "five": [20.0, 40.0, 60.0, 70.0, 80.0]}
  plots.probes(curves, tmp_path / "probe.png", "Linear probes")
  check_picture(tmp_path / "probe.png")
  (axes,) = figures[0].axes
  drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
  assert {name: [*y] for name, y in drawn.items()} == curves
  assert axes.get_ylabel().endswith("%")
  assert axes.get_xticks().tolist() == [0, 1, 2, 3, 4]
