"""The page of a run says what its numbers say, and why when it does not."""

import itertools
import re

import numpy as np
import pytest

from mhil import charts, metrics, report, report_learning
from tests import pages

SECTIONS = [
  "Accuracy",
  "Forgetting",
  "Where errors come from",
  "Loss",
  "Throughput",
  "Collectives",
  "Configuration",
  "Versions",
]


def page(tasks=5, *, config=(), history=None, **changed):
  done = pages.done(tasks)
  history = done.history if history is None else history
  numbers = pages.numbers(done, **changed)
  return report.of_run(numbers, pages.CONFIG | dict(config), history)


def tables(name, **of):
  return pages.tables(pages.section(page(**of), name))


def charts_of(name, **of):
  """Words of the charts of a section."""
  section = pages.section(page(**of), name)
  return [s.get("aria-label") for s in section.iter("svg") if s.get("role")]


@pytest.mark.parametrize("tasks", [1, 2, 5, 20, 100])
def test_a_page_is_whole_and_small(tasks):
  made = page(tasks)
  assert len(made.encode()) < 2**20
  root = pages.tree(made)
  assert [pages.words(h) for h in root.iter("h2")] == SECTIONS
  assert root.find("head/title").text == (
    f"digits, {tasks} task{'s' if tasks > 1 else ''}"
  )
  # Every figure says what it shows, a chart twice: for eyes and for ears.
  figures = list(root.iter("figure"))
  assert all(pages.words(figure.find("figcaption")) for figure in figures)
  drawn = [s for f in figures for s in f.iter("svg") if s.get("role") == "img"]
  assert len(drawn) == (5 if tasks > 1 else 3)
  assert all(svg.get("aria-label") for svg in drawn)
  assert not re.search(r"https?:|//|url\(|<script|src=", made)
  assert not re.search(r"\b(nan|inf|None)\b", made)


def test_a_thousand_tasks_stay_below_two_mebibytes():
  # Counted out of one drawn row, since drawing a thousand takes minutes.
  done, tasks = pages.done(2), 1000
  numbers = pages.numbers(done) | {
    name: [0.5] * tasks
    for name in (*report_learning.AFTER.values(), "within_task_per_task")
  }
  numbers |= {
    "accuracy_matrix": np.full((tasks, tasks), 0.5).tolist(),
    "confusion_between_heads": np.ones((tasks, tasks), int).tolist(),
    "task_sizes": [2] * tasks,
    "class_order": list(range(2 * tasks)),
    "steps_per_task": [1000] * tasks,
    "seconds_per_task": [1.0] * tasks,
  }
  history = [[i, *[0.5] * 300] for i in range(2000)]
  made = report.of_run(numbers, pages.CONFIG, history)
  assert len(made.encode()) < 2 * 2**20
  pages.tree(made)


def test_the_same_numbers_give_the_same_bytes():
  assert page() == page()
  assert page() != page(seconds_per_task=[9.0] * 5)


def test_what_comes_from_the_configuration_is_escaped():
  made = page(config={"data.name": "arrays:<b>&'\"", "loss.name": "<i>"})
  assert "<b>" not in made and "<i>" not in made
  root = pages.tree(made)
  assert root.find("head/title").text == "arrays:<b>&'\", 5 tasks"
  assert "loss.name=<i>" in pages.words(root)


def test_headline_numbers():
  numbers = pages.numbers(pages.done(5))
  root = pages.tree(page())
  told = dict(
    zip(map(pages.words, root.iter("dt")), map(pages.words, root.iter("dd")))
  )
  for name, key in {
    "average incremental, %": "average_incremental_accuracy",
    "last accuracy, %": "last_accuracy",
    "forgetting, points": "forgetting",
  }.items():
    assert told[name] == f"{100 * numbers[key]:.1f}"
  assert told["parameters"] == "21,775" and told["devices"] == "8"
  assert told["memory, samples"] == "100"


def test_accuracies():
  numbers = pages.numbers(pages.done(5))
  found = tables("Accuracy")
  curves = found["After each task, %"]
  assert curves[0] == [
    "after task",
    "class-incremental",
    "task-id",
    "within-task",
  ]
  for t, row in enumerate(curves[1:]):
    values = [numbers[key][t] for key in report_learning.AFTER.values()]
    assert row == [str(t), *(f"{100 * x:.1f}" for x in values)]
  (matrix,) = [t for c, t in found.items() if c.startswith("Accuracy matrix")]
  for i, row in enumerate(matrix[1:]):
    wanted = numbers["accuracy_matrix"][i][: i + 1]
    assert row == [str(i), *(f"{100 * x:.1f}" for x in wanted), *[""] * (4 - i)]
  (told,) = charts_of("Accuracy")
  assert "class-incremental from " in told and "task-id from 100 to" in told


def test_the_future_stays_blank_even_if_it_was_measured():
  full = np.full((3, 3), 0.25).tolist()
  found = tables("Accuracy", tasks=3, accuracy_matrix=full)
  (matrix,) = [t for c, t in found.items() if c.startswith("Accuracy matrix")]
  assert matrix[1:] == [
    ["0", "25.0", "", ""],
    ["1", "25.0", "25.0", ""],
    ["2", "25.0", "25.0", "25.0"],
  ]


def test_forgetting():
  numbers = pages.numbers(pages.done(5))
  matrix = np.array(numbers["accuracy_matrix"], float)
  (rows,) = tables("Forgetting").values()
  lost = metrics.forgetting_per_task(matrix)
  assert lost.mean() == pytest.approx(numbers["forgetting"])
  assert rows[0] == ["task", "classes", "best", "at the end", "forgotten"]
  for j, row in enumerate(rows[1:]):
    best = np.nanmax(matrix[j:-1, j])
    values = best, matrix[-1, j], best - matrix[-1, j]
    assert row[2:] == [f"{100 * x:.1f}" for x in values]
  assert [row[1] for row in rows[1:]] == ["9, 8", "7, 6", "5, 4", "3, 2"]
  assert len(rows) == 5


def test_classes_of_a_large_task_are_cut_short():
  order = {"class_order": list(range(30)), "task_sizes": [20, 5, 5]}
  (rows,) = tables("Forgetting", tasks=3, **order).values()
  assert rows[1][1] == "0, 1, 2, 3, 4, 5, .. (20)"
  assert rows[2][1] == "20, 21, 22, 23, 24"


def test_errors():
  numbers = pages.numbers(pages.done(5))
  (rows,) = tables("Where errors come from").values()
  counts = np.array(numbers["confusion_between_heads"])
  assert rows[0] == ["task", "0", "1", "2", "3", "4"]
  for i, row in enumerate(rows[1:]):
    assert row[0] == f"{i} ({counts[i].sum()})"
    for cell, count in zip(row[1:], counts[i]):
      wanted = f"{100 * count / counts[i].sum():.1f}" if count else "0"
      assert cell == wanted
  (told,) = charts_of("Where errors come from")
  right = counts.diagonal() / counts.sum(1)
  assert f"task-id from {100 * right[0]:.3g} to {100 * right[-1]:.3g}" in told
  assert "within-task from" in told and "class-incremental from" in told


def test_one_task_leaves_out_with_a_reason():
  made = page(1)
  for name, reason in {
    "Forgetting": "nothing to forget",
    "Where errors come from": "always the right one",
  }.items():
    section = pages.section(made, name)
    assert not list(section.iter("svg")) and not list(section.iter("table"))
    assert reason in pages.words(section)


def test_what_was_not_measured_is_left_out_with_a_reason():
  made = page(confusion_between_heads=None)
  section = pages.section(made, "Where errors come from")
  assert not list(section.iter("svg"))
  assert "was not measured" in pages.words(section)
  section = pages.section(page(history=()), "Loss")
  assert not list(section.iter("svg"))
  assert "No loss" in pages.words(section)
  (told,) = charts_of("Where errors come from", within_task_per_task=[])
  assert "within-task from" not in told and "task-id from" in told


def test_losses_of_few_heads_have_a_line_each():
  section = pages.section(page(7), "Loss")
  legend = [pages.words(li) for li in section.iter("li")]
  assert legend == [f"head {i}" for i in range(7)]
  borders = [p for p in section.iter("path") if p.get("class") == "border"]
  assert len(borders) == 6 and "Dotted" in pages.words(section)


def test_losses_of_many_heads_are_three_lines():
  section = pages.section(page(8), "Loss")
  legend = [pages.words(li) for li in section.iter("li")]
  assert legend == ["newest head", "older heads, mean", "older heads, highest"]
  assert len(legend) <= charts.SERIES
  section = pages.section(page(100), "Loss")
  assert "Dotted" not in pages.words(section)
  assert not [p for p in section.iter("path") if p.get("class") == "border"]


def test_old_and_new_losses():
  nan = np.nan
  losses = np.array(
    [[1, nan, nan], [3, 2, nan], [5, 4, 9], [nan, nan, 8]], float
  )
  found = report_learning._old_and_new(losses)
  assert found["newest head"].tolist() == [1, 2, 9, 8]
  mean, most = found["older heads, mean"], found["older heads, highest"]
  assert mean[1:3].tolist() == [3, 4.5] and np.isnan(mean[[0, 3]]).all()
  # Where there is no older head, the chart has a gap.
  assert most[1:3].tolist() == [3, 5] and not np.isfinite(most[[0, 3]]).any()


def test_throughput():
  found = tables("Throughput")
  ((caption, rows),) = found.items()
  assert "24 new samples a step" in caption
  for t, row in enumerate(rows[1:]):
    seconds = 1 + 0.125 * t
    assert row[:2] == [str(t), "100"] and row[2] == f"{seconds:.1f}"
    assert row[3] == f"{100 / seconds:,.1f}"
    assert row[4] == f"{2400 / seconds:,.0f}"
  text = pages.words(pages.section(page(), "Throughput"))
  assert "6.2 seconds in all" in text and "10.0 % of the" in text
  assert "12,345 bytes" in text


def test_the_speed_of_stages():
  assert "times as soon" not in page()
  speed = {"step_ms": 4.0, "serial_ms": 6.0, "measured": 1.5, "predicted": 1.75}
  text = pages.words(pages.section(page(speed=speed), "Throughput"))
  assert "takes 4.0 ms" in text and "6.0 ms: it ends 1.50 times" in text
  assert "to end 1.75 times as soon." in text


def test_collectives_by_axis_and_kind():
  found = tables("Collectives")
  axes, kinds = found.values()
  assert axes[1:] == [
    ["data", "2", "3", "1,031"],
    ["head", "4", "0", "0"],
    ["stage", "1", "1", "7"],
    ["subnet", "1", "0", "0"],
  ]
  assert kinds[1:] == [
    ["all-reduce", "data", "2", "1,024"],
    ["all-to-all", "data, stage", "1", "7"],
  ]
  text = pages.words(pages.section(page(), "Collectives"))
  assert "Over head nothing is sent." in text


def test_what_is_sent_over_head_is_not_denied():
  sent = [{"kind": "all-gather", "bytes": 5, "axes": ["data", "head"]}]
  text = pages.words(pages.section(page(collectives=sent), "Collectives"))
  assert "nothing is sent" not in text


def test_no_collective_at_all():
  section = pages.section(page(collectives=[]), "Collectives")
  assert "holds no collective" in pages.words(section)
  assert "Over data and head nothing is sent." in pages.words(section)


def test_an_exchange_now_and_then():
  moved = [{"kind": "collective-permute", "bytes": 9, "axes": ["subnet"]}]
  exchange = {"method": "ist", "every": 20, "collectives": moved}
  made = page(exchange=exchange)
  section = pages.section(made, "Collectives")
  assert [h.text for h in section.iter("h3")] == ["Every 20 steps"]
  last = list(pages.tables(section).values())[-1]
  assert last[1] == ["collective-permute", "subnet", "1", "9"]


def test_the_whole_configuration_and_versions():
  made = page(config={"network.widths": (64, 32)})
  (rows,) = pages.tables(pages.section(made, "Configuration")).values()
  told = dict(rows[1:])
  assert told.keys() == pages.CONFIG.keys()
  assert told["network.widths"] == "(64, 32)" and told["loss.name"] == "dce"
  text = pages.words(pages.section(made, "Configuration"))
  assert "order of arrival: 9, 8, 7, 6" in text
  (rows,) = pages.tables(pages.section(made, "Versions")).values()
  versions = dict(rows[1:])
  assert versions["jax"] == "0.10.2" and "mhil" in versions
  assert versions["SHA-256 of the data"] == pages.FACTS["data_sha256"]


def test_tables_of_many_rows_are_folded():
  for tasks, folded in (5, 2), (30, 4):
    root = pages.tree(page(tasks))
    # The configuration always is, and the numbers of the curves.
    assert len(list(root.iter("details"))) == folded


def test_ids_are_unique():
  root = pages.tree(page())
  ids = [e.get("id") for e in root.iter() if e.get("id")]
  assert len(ids) == len(set(ids)) == len(SECTIONS)
  levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch(r"h\d", e.tag)]
  assert levels[0] == 1 and levels.count(1) == 1
  assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_a_page_says_which_heads_are_not_there():
  alone = page(heads=[0, 2])
  assert "Only heads 0, 2 were trained here" in alone
  assert "A fixed network" not in alone
  fixed = page(heads=[0], config={"network.fixed": True})
  assert "A fixed network: its one head has the classes" in fixed
  for made in fixed, page(heads=[0, 1, 2, 3, 4]), page():
    assert "were trained here" not in made
