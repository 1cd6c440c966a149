"""Figures of a run.

Drawn through matplotlib's object interface: no global state, no display, safe
in threads. Colours are told apart with every kind of colour vision: cividis
for amounts, the set of Okabe and Ito for lines. The ending of a figure's path
chooses its format.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Path = str | os.PathLike[str]

# Okabe and Ito's set without the yellow, which is too faint for a thin line.
OKABE_ITO = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#56B4E9",
  "#E69F00",
  "#000000",
)
# Colours repeat after seven heads, so the dashes tell the rounds apart.
_STYLES = tuple(product(("-", "--", ":", "-."), OKABE_ITO))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 150
_MOST_WRITTEN_TASKS = 20
_MOST_NAMED = 40
# Share of the axis below which "task 11" would touch its neighbours.
_NARROWEST_LABEL = 0.075


def accuracy_matrix(
  matrix: Float[np.ndarray, "t t"], path: Path, title: str = ""
) -> None:
  """Draws the accuracy matrix as a heat map of its lower triangle.

  Args:
    matrix: accuracy `[t, t]` in [0, 1], after task (row) on task (column).
      NaN, and what lies above the diagonal, stays blank.
    path: file to write.
    title: heading of the figure.
  """
  tasks = len(matrix)
  # The future may be measured (forward transfer), but is not what was learnt.
  shown = np.where(np.tri(tasks, dtype=bool), matrix, np.nan)
  side = 2.2 + 0.36 * min(max(tasks, 5), _MOST_WRITTEN_TASKS)
  # "compressed" is the constrained layout for axes of a fixed shape.
  figure = Figure((1.13 * side, side), dpi=_DPI, layout="compressed")
  axes = figure.add_subplot()
  image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1)
  bar = figure.colorbar(image, ax=axes, label="accuracy", aspect=30)
  bar.outline.set_visible(False)
  if tasks <= _MOST_WRITTEN_TASKS:
    _write_cells(axes, shown)
  axes.set(xlabel="accuracy on task", ylabel="after task")
  axes.set(xticks=_task_ticks(tasks), yticks=_task_ticks(tasks))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  figure.suptitle(title, wrap=True)
  figure.savefig(path)


def curves(
  history: Mapping[str, np.ndarray],
  steps_of_task: Sequence[int] | np.ndarray,
  accuracy: Mapping[str, Sequence[float] | np.ndarray],
  path: Path,
  title: str = "",
) -> None:
  """Draws the loss of each head over the steps, and accuracies over tasks.

  Args:
    history: `"step"` `[k]` and `"loss"` `[k, heads]`, NaN where a head was
      closed. A head that was never open is left out.
    steps_of_task: number of steps of each task, in order.
    accuracy: accuracies `[t]` after each task by the name to show, such as
      `class_incremental`, `task_id` and `within_task`.
    path: file to write.
    title: heading of the figure.
  """
  figure = Figure((9, 6.6), dpi=_DPI, layout="constrained")
  losses, accuracies = figure.subplots(2, 1, height_ratios=(3, 2))
  _draw_losses(losses, history["step"], history["loss"])
  _draw_borders(losses, np.cumsum(steps_of_task))
  _draw_accuracies(accuracies, accuracy)
  for axes in (losses, accuracies):
    axes.spines[["top", "right"]].set_visible(False)
  figure.suptitle(title, wrap=True)
  figure.savefig(path)


def guesses(
  rows: Sequence[Mapping[str, float]], path: Path, title: str = ""
) -> None:
  """Draws what layer-parallel training measured after each task.

  Args:
    rows: by name, for each task: accuracies `settled/chain`,
      `collected/chain`, `settled/aux`; `settled/violation1` and so on.
    path: file to write.
    title: heading of the figure.
  """
  figure = Figure((8, 3.2), dpi=_DPI, layout="constrained")
  accuracies, violations = figure.subplots(1, 2)
  shown = {
    "settled/chain": "chain",
    "collected/chain": "chain, statistics as collected",
    "settled/aux": "guess and last stage",
  }
  off = sorted({k for row in rows for k in row if "settled/violation" in k})
  numbers = {k: f"interface {k.removeprefix('settled/violation')}" for k in off}
  for axes, names in (accuracies, shown), (violations, numbers):
    for i, (name, label) in enumerate(names.items()):
      values = [row.get(name, np.nan) for row in rows]
      style = {"color": OKABE_ITO[i % 7], "marker": _MARKERS[i % 7], "lw": 1.6}
      axes.plot(range(len(rows)), values, ms=5, label=label, **style)
    axes.set_xticks(_task_ticks(len(rows)))
    axes.set(xlabel="after task")
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
  accuracies.set(ylabel="accuracy within the heads", ylim=(-0.02, 1.02))
  violations.set(ylabel="guess against truth, relative", ylim=(0, None))
  figure.suptitle(title, wrap=True)
  figure.savefig(path)


def probes(
  curves: Mapping[str, Sequence[float]], path: Path, title: str = ""
) -> None:
  """Draws what a linear probe finds behind each module of some networks.

  Args:
    curves: accuracies `[K]` in % by the name to show; K may differ.
    path: file to write.
    title: heading of the figure.
  """
  figure = Figure((7.5, 4), dpi=_DPI, layout="constrained")
  axes = figure.add_subplot()
  for i, (name, values) in enumerate(curves.items()):
    axes.plot(
      np.arange(len(values)),
      values,
      color=OKABE_ITO[i % len(OKABE_ITO)],
      marker=_MARKERS[i % len(_MARKERS)],
      lw=1.6,
      ms=4.5,
      label=name,
    )
  axes.set(xlabel="module", ylabel="test accuracy of a linear probe, %")
  axes.set_xticks(_task_ticks(max(map(len, curves.values()), default=1)))
  axes.grid(axis="y", color="0.9", lw=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  _legend_beside(axes)
  figure.suptitle(title, wrap=True)
  figure.savefig(path)


def _task_ticks(tasks: int) -> np.ndarray:
  # Matplotlib's own locators leave the whole numbers when tasks are few.
  return np.arange(0, tasks, 1 if tasks <= 20 else 5 if tasks <= 100 else 20)


def _write_cells(axes: Axes, shown: np.ndarray) -> None:
  colors = colormaps["cividis"](np.nan_to_num(shown))[..., :3]
  bright = colors @ (0.2126, 0.7152, 0.0722)
  size = 9 if len(shown) <= 10 else 7.5
  for i, j in np.argwhere(~np.isnan(shown)):
    # No leading zero, so that twenty columns fit: .87
    text = f"{shown[i, j]:.2f}".removeprefix("0")
    color = "black" if bright[i, j] > 0.45 else "white"
    axes.text(j, i, text, ha="center", va="center", color=color, size=size)


def _draw_losses(axes: Axes, step: np.ndarray, loss: np.ndarray) -> None:
  # A legend of hundreds of heads would leave the curves no room.
  named = -(-loss.shape[1] // _MOST_NAMED)
  for head in range(loss.shape[1]):
    measured = np.isfinite(loss[:, head]).sum()
    if not measured:
      continue
    dash, color = _STYLES[head % len(_STYLES)]
    axes.plot(
      step,
      loss[:, head],
      linestyle=dash,
      color=color,
      lw=1.2,
      # A line of one point would be invisible.
      marker="o" if measured == 1 else "",
      label="" if head % named else f"head {head}",
    )
  axes.set(xlabel="step", ylabel="loss")
  axes.margins(x=0.015)
  axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
  _legend_beside(axes)


def _draw_borders(axes: Axes, ends: np.ndarray) -> None:
  for end in ends[:-1]:
    axes.axvline(end, color="0.75", lw=0.6, zorder=0)
  starts = ends - np.diff(ends, prepend=0)
  for task, (start, end) in enumerate(zip(starts, ends)):
    if end - start < _NARROWEST_LABEL * ends[-1]:
      continue
    axes.annotate(
      f"task {task}",
      ((start + end) / 2, 1.01),
      xycoords=axes.get_xaxis_transform(),
      ha="center",
      va="bottom",
      color="0.4",
      size=8,
    )


def _draw_accuracies(
  axes: Axes, accuracy: Mapping[str, Sequence[float] | np.ndarray]
) -> None:
  for i, (name, values) in enumerate(accuracy.items()):
    axes.plot(
      np.arange(len(values)),
      values,
      color=OKABE_ITO[i % len(OKABE_ITO)],
      marker=_MARKERS[i % len(_MARKERS)],
      lw=1.6,
      ms=4.5,
      label=name.replace("_", "-"),
    )
  axes.set(xlabel="after task", ylabel="accuracy", ylim=(-0.02, 1.02))
  axes.margins(x=0.015)
  axes.set_xticks(_task_ticks(max(map(len, accuracy.values()), default=1)))
  axes.grid(axis="y", color="0.9", lw=0.6)
  axes.set_axisbelow(True)
  _legend_beside(axes)


def _legend_beside(axes: Axes) -> None:
  handles, _ = axes.get_legend_handles_labels()
  if handles:
    axes.legend(
      loc="upper left",
      bbox_to_anchor=(1.01, 1),
      borderaxespad=0,
      frameon=False,
      fontsize=8,
      labelspacing=0.4,
      ncols=1 + (len(handles) - 1) // 20,
    )
