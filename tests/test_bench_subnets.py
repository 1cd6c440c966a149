"""The suite `subnets` at a small size, and the wide net that does not fit."""

import numpy as np
import pytest

from experiments import bench_subnets, measure
from mhil import inputs, phases
from mhil import run as run_lib
from tests import tiny

HIDDEN = (64, 64)


def test_the_formula_in_closed_form():
  """784-f-f-11, by hand: n r / m of what is owned, twice of what is crossed."""
  n, f = 4, 64
  m = f // n
  room = 16 // 4 + 6  # the mean and three of its roots
  owned = m * (784 + 4) + m * (
    11 + 4
  )  # a layer's rows, scale, shift, mean, var
  crossed = m * m
  shared = 2 * 11  # mean and variance of the logits
  want = n * room / m * (owned + 2 * crossed) + shared
  assert bench_subnets.formula((f, f), n) == 4 * want


def test_tables_hold_what_they_say():
  table = bench_subnets.held(HIDDEN, (1, 4))
  whole, four = table.rows
  assert four["moved"] == four["formula"] > 0
  assert whole["silent"] == four["silent"] == "yes"
  f, d, c = 64, 784, 11
  # Weights; scale, shift, mean and variance of a unit, two of a logit; the
  # loss and the first bad step.
  assert whole["held"] == 4 * (d * f + f * f + f * c + 8 * f + 2 * c + 2)
  # A subnet and its share of the home; two tables say where all units are.
  part = d * f // 4 + f * f // 16 + f * c // 4 + 8 * f // 4 + 2 * c + 2
  assert four["held"] == 4 * (part + f * f // 4 + 2 * f)
  assert "| 4 |" in measure.markdown(table)


@pytest.mark.slow
def test_a_net_that_does_not_fit_one_device_trains_on_eight():
  """Budget: 4 MiB for the step and for the exchange, by XLA's own count."""
  budget, hidden = 2**22, (512, 512)
  whole, parted = (bench_subnets.build(hidden, n, 16) for n in (1, 8))
  assert used(whole.step) > budget
  assert used(parted.step) < budget
  table = bench_subnets.held(hidden, (8,))
  assert table.rows[0]["exchange"] < budget
  before, after = (accuracy_after(parted, steps) for steps in (0, 60))
  assert before < 0.3 and after > 0.9


def used(program):
  usage = program.memory_analysis()
  return usage.argument_size_in_bytes + usage.temp_size_in_bytes


def accuracy_after(run, steps):
  """Accuracy of the merged net after so many steps and their exchanges."""
  state, feed = run_lib.start(run), tiny.feed(run, 0)
  for step, given in zip(range(steps), inputs.steps(run, feed, 0)):
    state = run.step(state, given[0], feed.task, given[1])
    state = run.exchange(state, step + 1)
  tally = phases.evaluate(run, state, feed)
  return tally.correct.sum() / tally.total.sum()


def test_every_exchange_deals_anew():
  """An exchange that is timed moves units, and other ones each time."""
  exchange, seen = bench_subnets.exchanger(bench_subnets.build(HIDDEN, 2)), []
  for _ in range(4):
    index = exchange().bank.apart.index
    seen.append(np.concatenate([np.ravel(x) for x in index.values()]).tolist())
  assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.slow
def test_side_by_side():
  table = bench_subnets.paced(HIDDEN, (1, 2), 2)
  one, two = table.rows
  assert one["growth"] == 1.0 and two["exchange_ms"] > 0
  # Half the columns of the first layer and a quarter of the hidden one.
  assert two["flops"] < 0.6 * one["flops"]
