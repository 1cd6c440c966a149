"""The suite `growth` at the size of a toy, with and without PyTorch."""

import functools
import os
import subprocess
import sys

import jax
import pytest

from experiments import (
  bench_growth,
  measure,
  setups,
  torch_growth,
  torch_resnet,
)
from mhil import networks

TOY = bench_growth.Size(depth=8, each=2, batch=4, samples=16)
SIZES = 8, 3, 2, 4, 16  # depth, tasks, classes of a task, batch, samples


def needs_torch():
  pytest.importorskip("torch", reason="PyTorch is no dependency")


def not_compiled(patch):
  """What is learnt is the same, and starts at once."""
  patch.setattr(torch_resnet, "compiles", lambda: False)


@functools.cache
def without_torch():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch_resnet, "torch", None)
    steps = bench_growth.steps(TOY, (1, 3), repetitions=1)
    return steps, bench_growth.inside(TOY, repetitions=1)


def numbers(outputs):
  """Parameters of ResNet-8 with so many outputs."""
  branch = networks.resnet_cifar(8, outputs)
  params, _ = jax.eval_shape(branch.init, jax.random.key(0))
  return networks.count_parameters(params)


def table(**ms):
  """Rows of `steps` at 1 and 20 tasks, from their times."""
  names = {
    "ours": bench_growth.OURS,
    "coupled": bench_growth.COUPLED,
    "one": bench_growth.ONE,
    "growing": bench_growth.GROWING,
    "replay": bench_growth.REPLAY,
  }
  return {
    (names[key], n): {"walls": [time], "growth": time / times[0]}
    for key, times in ms.items()
    for n, time in zip((1, 20), times)
  }


@pytest.mark.slow
class TestWithoutTorch:
  def test_its_rows_are_missing_and_it_says_so(self):
    for found in without_torch():
      assert found.rows and found.reading[-1] == bench_growth.MISSING
      assert "beside" not in found.columns
      assert not any("PyTorch" in str(row) for row in found.rows)
      assert "?" not in measure.markdown(found).partition("\n- ")[0]

  def test_rows(self):
    steps, inside = without_torch()
    assert [(r["row"], r["tasks"]) for r in steps.rows] == [
      (name, n)
      for name in (
        bench_growth.OURS,
        bench_growth.COUPLED,
        bench_growth.ONE,
      )
      for n in (1, 3)
    ]
    assert [r["part"] for r in inside.rows] == ["forwards", "gradient", "step"]

  def test_parameters(self):
    """A head has its classes and the reference; one network has all."""
    steps, _ = without_torch()
    heads = [n * numbers(3) for n in (1, 3)]
    one = [numbers(2 * n + 1) for n in (1, 3)]
    assert [r["parameters"] for r in steps.rows] == heads + heads + one


@pytest.mark.slow
def test_old_heads_run_forwards_with_ce_and_not_with_dce():
  """What the rows stand for, from the compiled steps of three tasks."""

  def flops(loss, heads):
    setup = bench_growth.setup_of(TOY, 2)
    run = setups.build(setup, heads, loss=loss, train_heads="new")
    return measure.cost(run)["flops"]

  alone, ours = flops(bench_growth.DCE, 1), flops(bench_growth.DCE, 3)
  assert measure.spread([alone, ours]) < 0.01
  # A forward pass is a third of a step, or less.
  assert 1.2 * ours < flops(bench_growth.CE, 3) < 1.6 * ours


class TestReading:
  def test_slower_and_faster_are_told_apart(self):
    rows = table(
      ours=(30.0, 30.0),
      coupled=(40.0, 200.0),
      one=(25.0, 25.0),
      growing=(10.0, 90.0),
      replay=(10.0, 10.0),
    )
    lines = bench_growth._read_steps(rows, (1, 20))
    assert "growing network takes 9.00 times as long" in lines[0]
    name = "D-CE with frozen old heads is"
    assert lines[1] == (
      f"1 task: {name} SLOWER (3.00 times the time) than PyTorch's growing "
      "network, and SLOWER (3.00 times the time) than its plain replay."
    )
    assert f"20 tasks: {name} faster (0.33 times the time) than" in lines[2]
    assert "and SLOWER (3.00 times the time) than its plain" in lines[2]
    assert "one network is SLOWER (2.50 times" in lines[3]
    assert "(CE) is SLOWER (2.22 times" in lines[3]

  def test_parts_of_one_network(self):
    times = {
      ("mhil", "forwards"): 3.0,
      ("mhil", "gradient"): 10.0,
      ("mhil", "step"): 15.0,
      ("PyTorch", "forwards"): 4.0,
      ("PyTorch", "gradient"): 5.0,
      ("PyTorch", "step"): 10.0,
    }
    rows = {
      (library, part): {
        "walls": [ms],
        "beside": ms / times["PyTorch", part],
      }
      for (library, part), ms in times.items()
    }
    first, second = bench_growth._read_inside(rows)
    assert "forwards: faster (0.75 times the time) than PyTorch;" in first
    assert "gradient: SLOWER (2.00 times the time) than PyTorch;" in first
    assert "step: SLOWER (1.50 times the time) than PyTorch." in first
    assert "1.50 times the gradient in straight code in mhil, 2.00" in second

  def test_without_pytorch(self):
    rows = table(ours=(3.0, 3.0), coupled=(4.0, 8.0), one=(2.0, 2.0))
    lines = bench_growth._read_steps(rows, (1, 20))
    assert "of CE with frozen old heads 2.00" in lines[0]
    assert lines[1:] == [bench_growth.MISSING]


def copies(module):
  return [x.detach().clone() for x in module.state_dict().values()]


def same(module, before):
  pairs = zip(copies(module), before, strict=True)
  return [bool((a == b).all()) for a, b in pairs]


# What PyTorch warns of while it compiles is its own affair.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
class TestTorch:
  def test_old_branches_stay_and_the_rest_learns(self, monkeypatch):
    needs_torch()
    not_compiled(monkeypatch)
    learner = torch_growth.growing(*SIZES)
    old = [copies(branch) for branch in learner.frozen]
    new, joint = map(copies, learner.trained)
    learner.step()
    for branch, before in zip(learner.frozen, old, strict=True):
      assert all(same(branch, before))  # statistics too
    assert len(old) == 2
    assert not any(same(learner.trained[0], new))
    assert not any(same(learner.trained[1], joint))

  def test_it_learns_the_classes_of_all_tasks(self, monkeypatch):
    """Sixteen images by heart; chance is log 6."""
    needs_torch()
    not_compiled(monkeypatch)
    torch = torch_resnet.torch
    torch.manual_seed(0)
    for make in torch_growth.growing, torch_growth.replay:
      learner = make(8, 3, 2, 16, 16)
      for _ in range(60):
        learner.step()
      assert loss_of(learner) < 0.9

  def test_parameters(self):
    needs_torch()
    features = numbers(1) - 65
    joint = 3 * 64 * 6 + 6
    assert torch_growth.growing(*SIZES).parameters() == 3 * features + joint
    one = torch_growth.replay(*SIZES).parameters()
    assert one == features + 64 * 6 + 6

  def test_nothing_falls_back_and_branches_share_a_program(self):
    needs_torch()
    from torch._dynamo import utils

    torch_resnet.torch._dynamo.reset()
    if not torch_resnet.compiles():
      pytest.skip("no C++ compiler")
    utils.counters.clear()
    learner = torch_growth.growing(8, 6, 2, 4, 16)
    learner.step()
    first = utils.counters["stats"]["unique_graphs"]
    learner.step()
    # One of five old branches, one of the loss; none in a further step.
    assert first == utils.counters["stats"]["unique_graphs"] == 2
    assert not utils.counters["graph_break"]

  def test_without_a_compiler_it_runs_as_it_is(self):
    needs_torch()
    code = (
      "from experiments import torch_growth, torch_resnet\n"
      "torch_growth.growing(8, 2, 2, 4, 16).step()\n"
      "print(torch_resnet.compiles())"
    )
    env = os.environ | {
      "CXX": "/nowhere",
      "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    done = subprocess.run(
      [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n" and "does not compile" in done.stderr

  def test_the_suite_with_both(self):
    needs_torch()
    steps = bench_growth.steps(TOY, (1, 2), repetitions=2)
    inside = bench_growth.inside(TOY, repetitions=2)
    assert [r["row"] for r in steps.rows[-4:]] == [
      *[bench_growth.GROWING] * 2,
      *[bench_growth.REPLAY] * 2,
    ]
    beside = [r["beside"] for r in steps.rows]
    assert beside[6:8] == [1, 1] and all(x > 0 for x in beside)
    assert [r["beside"] for r in inside.rows[3:]] == [1, 1, 1]
    assert bench_growth.MISSING not in steps.reading + inside.reading


def loss_of(learner):
  """Cross-entropy on all sixteen images, in training form."""
  torch, nn = torch_resnet.torch, torch_resnet.nn
  pixels = torch_growth.noise(16).permute(0, 3, 1, 2)
  images = (pixels.float() / 255 - 0.5) / 0.5
  labels = torch.arange(16) % 6
  with torch.no_grad():
    branches = [*learner.frozen, learner.trained[0]]
    found = torch.cat([branch(images) for branch in branches], 1)
    for last in learner.trained[1:]:
      found = last(found)
  return nn.functional.cross_entropy(found, labels).item()
