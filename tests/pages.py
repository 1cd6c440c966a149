"""Numbers of runs that were never made, and what a page says, as a tree."""

from xml.etree import ElementTree

import numpy as np

from mhil import config as config_lib
from mhil import metrics, progress

CONFIG = config_lib.flatten(config_lib.to_dict(config_lib.Config()))
FACTS = {
  "params_sha256": "0123456789abcdef" * 4,
  "data_sha256": "fedcba9876543210" * 4,
  "parameters": {"total": 21775, "per_head": 4355},
  "memory": {"samples": 100, "bytes": 6400},
  "compiles": {"train_step": 1, "evaluate": 1, "after_first_task": 0},
  "collectives": [
    {"kind": "all-reduce", "bytes": 1000, "axes": ["data"]},
    {"kind": "all-reduce", "bytes": 24, "axes": ["data"]},
    {"kind": "all-to-all", "bytes": 7, "axes": ["data", "stage"]},
  ],
  "exchange": {"method": "none", "every": 0, "collectives": []},
  "step_bytes_per_device": {"temporary": 12345, "arguments": 67890},
  "mesh": {"data": 2, "head": 4, "stage": 1, "subnet": 1},
  "devices": [f"cpu:{i}" for i in range(8)],
  "versions": {"python": "3.11.7", "jax": "0.10.2"},
}


def tallies(tasks, seed=0):
  """Counts after each task: the older a task, the more of it is lost."""
  rng = np.random.default_rng(seed)
  for t in range(tasks):
    age = t - np.arange(tasks)
    total = np.where(age >= 0, 100 + np.arange(tasks) % 7, 0)
    # A lone head is always the right one.
    right = np.clip(0.97 - 0.3 * age / tasks, 0, 1) if t else 1.0
    right = rng.binomial(total, right)
    correct = rng.binomial(right, 0.98)
    within = np.maximum(correct, rng.binomial(total, 0.97))
    confusion = np.diag(right)
    for j in range(t + 1):
      others = np.delete(np.arange(t + 1), j)
      for wrong in rng.choice(others, total[j] - right[j]) if t else ():
        confusion[j, wrong] += 1
    yield metrics.Tally(total, correct, right, within, within, confusion)


def done(tasks, rows=10, seed=0):
  """The progress of a run of `rows` logged steps a task."""
  history = tuple(
    (
      10 * (1 + t * rows + k),
      *(
        0.05 + 0.7 * float(np.exp(-((t - h) * rows + k) / 9))
        if h <= t
        else None
        for h in range(tasks)
      ),
    )
    for t in range(tasks)
    for k in range(rows)
  )
  return progress.Progress(
    step=10 * tasks * rows,
    tallies=tuple(tallies(tasks, seed)),
    history=history,
    seconds=tuple(1.0 + 0.125 * t for t in range(tasks)),
    waited=1.0,
    stepped=9.0,
    probes=({},) * tasks,
  )


def numbers(of, **changed):
  """`metrics.json` of such a run; `changed` replaces what it says."""
  tasks = len(of.tallies)
  stream = {
    "class_order": list(range(2 * tasks))[::-1],
    "task_sizes": [2] * tasks,
    "steps_per_task": [of.step // tasks] * tasks,
  }
  return progress.measured(of) | FACTS | stream | changed


def tree(page):
  """The page as elements; an error unless every tag is closed."""
  return ElementTree.fromstring(page)


def words(element):
  """All that is written in an element."""
  return " ".join(" ".join(element.itertext()).split())


def tables(element):
  """Rows of cells of every table, by its caption."""
  return {
    words(figure.find("figcaption")): [
      [words(cell) for cell in row] for row in table.iter("tr")
    ]
    for figure in element.iter("figure")
    for table in figure.iter("table")
  }


def section(page, name, root=None):
  """A section of a page, or of its tree, by its heading."""
  for found in (tree(page) if root is None else root).iter("section"):
    if words(found.find("h2")) == name:
      return found
  raise KeyError(name)
