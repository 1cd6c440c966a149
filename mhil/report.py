"""The page of one run: what was learnt, what it cost, what was sent.

A function of the numbers that a run leaves: neither the time of day nor the
place changes a byte of it. What is not known is left out, and the page says
why.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mhil import charts, report_learning, version, webpage
from mhil.report_learning import History, Numbers, percent

Config = Mapping[str, Any]


def of_run(numbers: Numbers, config: Config, history: History = ()) -> str:
  """One self-contained HTML page, below 2 MiB.

  Args:
    numbers: what `metrics.json` holds.
    config: every field by its full name, such as `train.batch`.
    history: rows `[step, loss of head 0, ..]`, None where a head was idle.
  """
  matrix = np.array(numbers["accuracy_matrix"], np.float64)
  tasks = f"{len(matrix):,} task" + ("s" if len(matrix) > 1 else "")
  sections = {
    "Accuracy": report_learning.accuracy(numbers, matrix),
    "Forgetting": report_learning.forgetting(numbers, matrix),
    "Where errors come from": report_learning.errors(numbers, matrix),
    "Loss": report_learning.loss(numbers, history),
    "Throughput": _throughput(numbers, config),
    "Collectives": _collectives(numbers),
    "Configuration": _configuration(numbers, config),
    "Versions": _versions(numbers),
  }
  title = f"{config['data.name']}, {tasks}"
  return webpage.page(title, _lead(numbers, config), sections)


def _lead(numbers: Numbers, config: Config) -> list[str]:
  fields = ("loss.name", "network.name", "objective.name", "seed")
  how = ", ".join(f"`{name}={config[name]}`" for name in fields)
  shown = {
    "average incremental, %": "average_incremental_accuracy",
    "last accuracy, %": "last_accuracy",
    "task-id, %": "task_id_accuracy",
    "within-task, %": "within_task_accuracy",
    "top-5, %": "top5_accuracy",
    "forgetting, points": "forgetting",
  }
  memory = numbers["memory"]
  told = {name: percent(numbers[key]) for name, key in shown.items()} | {
    "parameters": f"{numbers['parameters']['total']:,}",
    "memory, samples": f"{memory['samples']:,}",
    "memory, bytes": f"{memory['bytes']:,}",
    "devices": f"{len(numbers['devices']):,}",
  }
  about = f"One run: {how}. Accuracies are on test samples."
  tasks, heads = len(numbers["accuracy_matrix"]), numbers.get("heads")
  if config.get("network.fixed"):
    about += (
      " A fixed network: its one head has the classes of all tasks, and of the "
      "heads that tests tell of here, each stands for a task's classes."
    )
  elif heads is not None and len(heads) < tasks:
    about += (
      f" Only heads {', '.join(map(str, heads))} were trained here: the "
      "classes of every other head count as wrong."
    )
  return [webpage.paragraph(about), webpage.facts(told)]


def _throughput(numbers: Numbers, config: Config) -> str:
  steps = np.array(numbers["steps_per_task"], np.float64)
  seconds = np.array(numbers["seconds_per_task"], np.float64)
  pace = steps / np.where(seconds > 0, seconds, np.nan)
  batch = config["train.batch"]
  drawn = charts.lines(
    [charts.Curve("steps a second", range(len(pace)), pace)],
    title="Steps a second in each task",
    x="task",
    y="steps a second",
  )
  rows = [
    [str(t), f"{n:,.0f}", f"{s:.1f}", f"{p:,.1f}", f"{batch * p:,.0f}"]
    for t, (n, s, p) in enumerate(zip(steps, seconds, pace))
  ]
  table = webpage.table(
    ["task", "steps", "seconds", "steps a second", "new samples a second"],
    rows,
    f"Training, choosing exemplars and tests, together; {batch} new samples a "
    "step",
  )
  figure = webpage.figure(
    drawn, "Steps a second in each task, its tests and all."
  )
  told = _costs(numbers) + _speed(numbers.get("speed"))
  return told + webpage.tabled(figure, table, len(rows))


def _costs(numbers: Numbers) -> str:
  usage, compiles = numbers["step_bytes_per_device"], numbers["compiles"]
  return webpage.paragraph(
    f"{sum(numbers['seconds_per_task']):,.1f} seconds in all, without "
    f"compilation; {100 * numbers['waiting_share']:.1f} % of the training "
    "steps' time was spent waiting for data. Compiled programs: "
    f"{compiles['train_step']} of a step, {compiles['evaluate']} of a test, "
    f"{compiles['after_first_task']} after the first task. On each device a "
    f"step takes {usage['temporary']:,} bytes of temporary memory beside "
    f"{usage['arguments']:,} of arguments."
  )


def _speed(found: Mapping[str, float] | None) -> str:
  """Of stages that learn at once: how much sooner their step ends."""
  if found is None:
    return ""
  return webpage.paragraph(
    f"A step of all stages takes {found['step_ms']:.1f} ms, end to end on one "
    f"stage's devices {found['serial_ms']:.1f} ms: it ends "
    f"{found['measured']:.2f} times as soon, and was predicted from its "
    f"programs to end {found['predicted']:.2f} times as soon."
  )


def _collectives(numbers: Numbers) -> str:
  mesh, exchange = numbers["mesh"], numbers["exchange"]
  parts = [_traffic("a training step", numbers["collectives"], mesh)]
  if exchange["collectives"]:
    of = f"an exchange of `{exchange['method']}`"
    parts.append(f"<h3>Every {exchange['every']:,} steps</h3>")
    parts.append(_traffic(of, exchange["collectives"], mesh))
  return "".join(parts)


def _traffic(of: str, found: Sequence[Numbers], mesh: Mapping[str, int]) -> str:
  """What a program sends over each axis of the mesh, and by which kinds."""
  over = {axis: [c for c in found if axis in c["axes"]] for axis in mesh}
  silent = [f"`{a}`" for a, n in mesh.items() if n > 1 and not over[a]]
  about = (
    f"Read from the compiled program of {of}: each instruction that moves "
    "something between devices counts once, with the bytes of its result on "
    "one device."
  )
  if silent:
    about += f" Over {' and '.join(silent)} nothing is sent."
  rows = [
    [f"`{axis}`", f"{mesh[axis]:,}", f"{len(sent):,}", f"{_bytes(sent):,}"]
    for axis, sent in over.items()
  ]
  head = ["axis", "devices along it", "collectives", "bytes"]
  table = webpage.table(head, rows, f"By axis of the mesh, in {of}")
  return webpage.paragraph(about) + webpage.beside(table, _kinds(of, found))


def _kinds(of: str, found: Sequence[Numbers]) -> str:
  if not found:
    return webpage.missing(f"The program of {of} holds no collective.")
  kinds: dict[tuple[str, str], list[Numbers]] = {}
  for c in found:
    kinds.setdefault((c["kind"], ", ".join(c["axes"])), []).append(c)
  rows = [
    [kind, f"`{axes}`", f"{len(those):,}", f"{_bytes(those):,}"]
    for (kind, axes), those in kinds.items()
  ]
  head = ["kind", "over", "collectives", "bytes"]
  return webpage.table(head, rows, f"By kind, in {of}")


def _bytes(found: Sequence[Numbers]) -> int:
  return sum(c["bytes"] for c in found)


def _configuration(numbers: Numbers, config: Config) -> str:
  rows = [[f"`{name}`", str(value)] for name, value in config.items()]
  table = webpage.table(["field", "value"], rows, "Every field", "words")
  order = ", ".join(map(str, numbers.get("class_order", []))) or "unknown"
  about = webpage.paragraph(f"Classes in the order of arrival: {order}.")
  return about + webpage.folded(f"All {len(rows)} fields", table)


def _versions(numbers: Numbers) -> str:
  devices = numbers["devices"]
  told = {
    "mhil": version.__version__,
    **numbers["versions"],
    "devices": f"{len(devices):,}, {devices[0]} first",
    "SHA-256 of the parameters": numbers["params_sha256"],
    "SHA-256 of the data": numbers.get("data_sha256", "not taken"),
  }
  head = ["what", "version or hash"]
  caption = "What made this run, and what came of it"
  return webpage.table(head, told.items(), caption, "words")
