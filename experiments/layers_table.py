"""A table of layer-parallel runs: what guesses of states are worth."""

from typing import Any

import numpy as np

from experiments import measure


def lines(done: dict[str, list[dict[str, Any]]]) -> list[str]:
  """The table as Markdown.

  Args:
    done: metrics of each row's runs.
  """
  text = [
    "",
    "Of the first head after the last task, %: the chain of stages with "
    "re-estimated normalisation statistics, and with those collected in "
    "training; the last stage on a guessed state; how far guesses are off at "
    "each interface, the norm of the difference over the larger norm. Then "
    "multiply-adds of the networks that guess as a share of the branch's, and "
    "how much sooner a step would end with a device a stage, by multiply-adds "
    "alone (serial steps of a hybrid counted in).",
    "",
  ]
  head = ["row", "chain", "collected", "guess and last stage", "guesses off"]
  body = []
  for label, runs in done.items():
    last = [run["probes"][-1] for run in runs if run["probes"][-1]]
    if not last:
      continue
    off = sorted(k for k in last[0] if k.startswith("settled/violation"))
    facts = runs[0]["objective"]
    cells = [
      label,
      *(
        _mean(last, name)
        for name in ("settled/chain", "collected/chain", "settled/aux")
      ),
      ", ".join(_mean(last, name) for name in off),
      f"{100 * facts['aux_share']:.1f} %",
      f"{facts['counted_speedup']:.2f}",
    ]
    body.append(cells)
  return [*text, *measure.grid([*head, "share", "sooner"], body)]


def _mean(rows: list[dict[str, float]], name: str) -> str:
  values = [row[name] for row in rows if name in row]
  return f"{100 * np.mean(values):.1f}" if values else ""
