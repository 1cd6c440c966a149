"""Suite `growth`: cost of a step against the number of tasks, beside PyTorch.

(a) growing networks and plain replay, (b) where one network's time goes.
PyTorch is no dependency: without it its rows are missing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import measure, setups, torch_growth, torch_resnet
from mhil import losses, networks, optimizers

TASKS, EACH, DEPTH, BATCH, REPETITIONS = (1, 5, 10, 20), 10, 20, 64, 7
OURS, GROWING = "mhil: D-CE, old heads frozen", "PyTorch: growing network"
COUPLED, ONE = "mhil: CE, old heads frozen", "mhil: one network, replay"
REPLAY = "PyTorch: one network, replay"
MISSING = "PyTorch is not installed, so its rows are missing."
# Of a single head `none` is cross-entropy, without a second forward pass.
DCE, CE, ALONE = losses.dce(), losses.ce(), losses.dce("none")


class Size(NamedTuple):
  """Of the network and of its steps."""

  depth: int = DEPTH
  each: int = EACH  # classes of a task
  batch: int = BATCH
  samples: int = 1600  # so that a task of twenty fills a batch


SIZE = Size()
Case = tuple[dict[str, Any], Callable[[], None]]


def steps(
  size: Size = SIZE,
  counts: Sequence[int] = TASKS,
  repetitions: int = REPETITIONS,
) -> measure.Table:
  """(a) A step in the last task, of every kind of network, in turn."""
  cases = [kind(size, n) for kind in _kinds() for n in counts]
  labels, steppers = zip(*cases)
  rows = measure.timed(list(labels), steppers, repetitions)
  by_case = {(row["row"], row["tasks"]): row for row in rows}
  for row in rows:
    row["growth"] = measure.ratio(row, by_case[row["row"], counts[0]])
    theirs = by_case.get((GROWING, row["tasks"]))
    row["beside"] = measure.ratio(row, theirs) if theirs else None
  columns = {
    **{"row": "network", "tasks": "tasks", "parameters": "parameters"},
    **{"ms": "ms a step", "cpu_ms": "CPU ms"},
    **{"growth": f"time against {counts[0]} task", "beside": f"/ {GROWING}"},
  }
  if not theirs_too():
    del columns["beside"]
  reading = _read_steps(by_case, counts)
  title = f"ResNet-{size.depth}: a step against the number of tasks"
  return measure.Table(title, _note(size, repetitions), columns, rows, reading)


def theirs_too() -> bool:
  """Whether PyTorch is installed."""
  return torch_resnet.torch is not None


def _kinds() -> list[Callable[[Size, int], Case]]:
  ours: list[Callable[[Size, int], Case]] = [
    functools.partial(_heads, OURS, DCE),
    functools.partial(_heads, COUPLED, CE),
    _one,
  ]
  if not theirs_too():
    return ours
  return [
    *ours,
    functools.partial(_torch, GROWING, torch_growth.growing),
    functools.partial(_torch, REPLAY, torch_growth.replay),
  ]


@functools.cache
def setup_of(size: Size, each: int) -> setups.Setup:
  """Of mhil, with so many classes of a task; one object, so built once."""
  return setups.Setup(
    f"ResNet-{size.depth}",
    functools.partial(networks.resnet_cifar, size.depth, axis="data"),
    batch=size.batch,
    samples=size.samples,
    each=each,
    optimizer=optimizers.sgd(0.9, 5e-4),
  )


def _heads(name: str, loss: losses.Loss, size: Size, tasks: int) -> Case:
  setup = setup_of(size, size.each)
  run = setups.build(setup, tasks, loss=loss, train_heads="new")
  labels = {"row": name, "tasks": tasks, "parameters": _numbers(run)}
  return labels, measure.Stepper(run, tasks - 1)


def _one(size: Size, tasks: int) -> Case:
  run = setups.build(setup_of(size, size.each * tasks), 1, loss=ALONE)
  labels = {"row": ONE, "tasks": tasks, "parameters": _numbers(run)}
  return labels, measure.Stepper(run, 0)


def _torch(name: str, make: Callable[..., Any], size: Size, tasks: int) -> Case:
  sizes = size.depth, tasks, size.each, size.batch, size.samples
  learner = make(*sizes)
  labels = {"row": name, "tasks": tasks, "parameters": learner.parameters()}
  return labels, learner.step


def _numbers(run: Any) -> int:
  """Parameters of all heads."""
  params, _, _ = jax.eval_shape(run.objective.init, jax.random.key(0))
  return len(run.stream.heads) * networks.count_parameters(params)


def _note(size: Size, repetitions: int) -> str:
  mode = "compiled (`torch.compile`)"
  if theirs_too() and not torch_resnet.compiles():
    mode = "not compiled, for want of a C++ compiler"
  return (
    f"ResNet-{size.depth} on 32x32x3 noise, float32, batch {size.batch}, "
    f"{size.each} classes a task, in the last of so many tasks, one device; "
    "SGD with momentum; no augmentation. A batch is drawn in the step from "
    f"new and stored images in memory. Medians of {repetitions} repetitions "
    "taken in turn; ratios within a repetition. A growing network has a branch "
    "of features for each task, of which the new one trains and the old ones "
    "run forwards in inference form, and one classifier over the features of "
    f"all; PyTorch is {mode}, channels last. mhil with CE does the same with a "
    "classifier for each head; with D-CE old heads are not run at all. Replay "
    "is one network for all classes, in either library. What each learns is "
    "not compared here: heads that D-CE does not run learn nothing of new "
    "classes. With `train_heads=all` every head learns, and the time of a step "
    "grows with their number ([heads](heads.md))."
  )


def _read_steps(
  rows: dict[tuple[str, int], dict[str, Any]], counts: Sequence[int]
) -> list[str]:
  last = counts[-1]
  lines = [
    f"From {counts[0]} to {last} tasks a step of D-CE with frozen old heads "
    f"takes {rows[OURS, last]['growth']:.2f} times as long, of CE with frozen "
    f"old heads {rows[COUPLED, last]['growth']:.2f}, of one network "
    f"{rows[ONE, last]['growth']:.2f}."
  ]
  if (GROWING, last) not in rows:
    return [*lines, MISSING]
  lines[0] += (
    f" PyTorch's growing network takes {rows[GROWING, last]['growth']:.2f} "
    f"times as long, its plain replay {rows[REPLAY, last]['growth']:.2f}."
  )
  for n in counts:
    growing = measure.ratio(rows[OURS, n], rows[GROWING, n])
    replay = measure.ratio(rows[OURS, n], rows[REPLAY, n])
    lines.append(
      f"{n} task{'s' * (n > 1)}: D-CE with frozen old heads is "
      f"{_beside(growing)} PyTorch's growing network, and {_beside(replay)} "
      "its plain replay."
    )
  same = measure.ratio(rows[ONE, last], rows[REPLAY, last])
  alike = measure.ratio(rows[COUPLED, last], rows[GROWING, last])
  return [
    *lines,
    f"Where the work is the same, at {last} tasks: mhil's one network is "
    f"{_beside(same)} PyTorch's, and mhil that runs its old heads forwards "
    f"(CE) is {_beside(alike)} the growing network. This is the speed of the "
    "arithmetic; what D-CE has beyond it is from old heads that do not run.",
  ]


def _beside(times: float) -> str:
  """`SLOWER than` or `faster than`, from the time over the other's time."""
  word = "SLOWER" if times > 1 else "faster"
  return f"{word} ({times:.2f} times the time) than"


def inside(
  size: Size = SIZE, repetitions: int = 3 * REPETITIONS
) -> measure.Table:
  """(b) One network of one task: forwards, with its gradient, a step."""
  cases: list[Case] = [*_ours(size)]
  if theirs_too():
    cases += _theirs(size)
  labels, steppers = zip(*cases)
  rows = measure.timed(list(labels), steppers, repetitions)
  of = {(row["library"], row["part"]): row for row in rows}
  for row in rows:
    theirs = of.get(("PyTorch", row["part"]))
    row["beside"] = measure.ratio(row, theirs) if theirs else None
  columns = {"part": "part", "library": "library", "ms": "ms", "cpu_ms": "CPU"}
  columns |= {"beside": "/ PyTorch"} if theirs_too() else {}
  note = (
    f"ResNet-{size.depth}, batch {size.batch}, one task. Forwards: in "
    "inference form. Gradient: of cross-entropy, forwards and backwards, in "
    "straight code. Step: as above, with its batch and its optimiser; in mhil "
    "the gradient lies in the loop over a device's heads. Medians of "
    f"{repetitions} repetitions in turn."
  )
  title = "Where the time of one network goes"
  return measure.Table(title, note, columns, rows, _read_inside(of))


def _ours(size: Size) -> list[Case]:
  # No mesh axis: this is a network by itself.
  branch = networks.resnet_cifar(size.depth, size.each)
  params, stats = branch.init(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (size.batch, 32, 32, 3))
  labels = jnp.arange(size.batch) % size.each

  @jax.jit
  def forwards(params):
    return branch.apply(params, stats, images, False)[0]

  @jax.jit
  @jax.grad
  def gradient(params):
    logp = jax.nn.log_softmax(branch.apply(params, stats, images, True)[0])
    return -jnp.mean(jnp.take_along_axis(logp, labels[:, None], axis=1))

  def call(function):
    def run():
      jax.block_until_ready(function(params))

    return run

  return [
    ({"library": "mhil", "part": "forwards"}, call(forwards)),
    ({"library": "mhil", "part": "gradient"}, call(gradient)),
    ({"library": "mhil", "part": "step"}, _one(size, 1)[1]),
  ]


def _theirs(size: Size) -> list[Case]:
  sizes = size.depth, size.each, size.batch
  forwards, gradient = torch_growth.parts(*sizes)
  step = torch_growth.replay(size.depth, 1, *sizes[1:], size.samples).step
  return [
    ({"library": "PyTorch", "part": "forwards"}, forwards),
    ({"library": "PyTorch", "part": "gradient"}, gradient),
    ({"library": "PyTorch", "part": "step"}, step),
  ]


def _read_inside(rows: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
  if ("PyTorch", "step") not in rows:
    return [MISSING]
  told = "; ".join(
    f"{part}: {_beside(row['beside'])} PyTorch"
    for (library, part), row in rows.items()
    if library == "mhil"
  )
  more = {
    library: measure.ratio(rows[library, "step"], rows[library, "gradient"])
    for library in ("mhil", "PyTorch")
  }
  return [
    f"mhil, for the same arithmetic: {told}. {_kernels()}",
    f"A step takes {more['mhil']:.2f} times the gradient in straight code in "
    f"mhil, {more['PyTorch']:.2f} times in PyTorch: what differs is the batch, "
    "the optimiser and, in mhil, the loop over heads.",
  ]


def _kernels() -> str:
  if jax.default_backend() != "cpu":
    return "The kernels are those of XLA and of PyTorch's compiler."
  return (
    "The kernels are XLA's here and oneDNN's there; on a CPU mhil has its own "
    "gradients of convolutions, which are fast inside the loop over heads and "
    "can be slower than XLA's outside ([decisions](../decisions.md))."
  )


SUITE = measure.Suite(1, (steps, inside))
