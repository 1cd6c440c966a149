"""How much sooner a step of stages ends, by the model and by the clock.

Measured once the run is done, on states of its own, so that the run stays what
it is. It costs the compilation of the serial step and some steps of each.
"""

import statistics
import time

from experiments import layer_steps, measure
from mhil import coupling, objectives, prepare
from mhil import run as run_lib

# Steps of a program that is timed: for so many seconds, within these limits.
SECONDS, LEAST, MOST = 0.5, 3, 20


def measured(
  run: run_lib.Run, serial: objectives.Objective
) -> dict[str, float] | None:
  """Milliseconds of a step, and how many times as soon it ends.

  Args:
    run: with a device a stage; else there is nothing to compare.
    serial: back-propagation through the same branch.

  Returns:
    `step_ms` of the run, `serial_ms` of back-propagation on the first stage's
    devices, `model_ms` of the run's programs and copies, each timed alone;
    `measured` and `predicted`, the second over the first and over the third.
    None for a run without stages at once, or whose images are streamed.
  """
  facts = run.objective.facts
  if "method" not in facts or run.grid.shape["stage"] == 1:
    return None
  if run.recipe.streamed:
    return None
  method = coupling.Method(**facts["method"])
  found = {
    "step_ms": _ms(run),
    "serial_ms": _ms(_serial(run, serial)),
    "model_ms": _model_ms(run, method),
  }
  return found | {
    "measured": found["serial_ms"] / found["step_ms"],
    "predicted": found["serial_ms"] / found["model_ms"],
  }


def line(speed: dict[str, float]) -> str:
  """The same in a sentence."""
  return (
    f"a step of all stages takes {speed['step_ms']:.1f} ms, end to end on one "
    f"stage's devices {speed['serial_ms']:.1f} ms: predicted from its programs "
    f"{speed['predicted']:.2f} x, measured {speed['measured']:.2f} x"
  )


def _serial(run, objective):
  parts = run.mesh, run.stream, run.dataset, objective, run.loss, run.recipe
  return prepare.build(*parts, run.seed, run.transform)


def _ms(run: run_lib.Run) -> float:
  """Milliseconds of a step, while steps run ahead."""
  stepper = measure.Stepper(run, 0)
  stepper()
  begun = time.perf_counter()
  stepper()
  once = time.perf_counter() - begun
  steps = min(max(LEAST, round(SECONDS / once)), MOST)
  begun = time.perf_counter()
  for _ in range(steps):
    stepper.step()
    if run.one_at_a_time:
      stepper.wait()
  stepper.wait()
  return 1e3 * (time.perf_counter() - begun) / steps


def _model_ms(run: run_lib.Run, method: coupling.Method) -> float:
  pieces, count = layer_steps.Pieces(run, method), run.grid.shape["stage"]
  for _ in range(1 + LEAST):
    pieces()
  models = [
    layer_steps.modelled(step, {}, method, count) for step in pieces.steps[1:]
  ]
  return statistics.median(sent for _, sent, _ in models)
