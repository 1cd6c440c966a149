"""What a growing network and plain replay cost in PyTorch.

A growing network (after DER, Yan et al., CVPR 2021): a branch of features for
each task, the old ones frozen and in inference form, and one classifier over
the features of all, trained with cross-entropy over all classes. DER's
auxiliary classifier and its pruning are left out, which spares it work. Plain
replay: one network for all classes. Both are handed the same batches, drawn
from new and stored images that lie in memory together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import torch_resnet
from experiments.torch_resnet import nn, torch

FEATURES = 64


class Learner(NamedTuple):
  """A network that learns.

  Attributes:
    step: draws a batch, takes a step and waits for it.
    frozen: modules that do not learn.
    trained: modules that do.
  """

  step: Callable[[], None]
  frozen: list[Any]
  trained: list[Any]

  def parameters(self) -> int:
    """Numbers in all of its modules."""
    modules = [*self.frozen, *self.trained]
    return sum(p.numel() for m in modules for p in m.parameters())


def growing(
  depth: int, tasks: int, each: int, batch: int, samples: int
) -> Learner:
  """A growing network in its last task.

  Args:
    depth: of the branches, CIFAR ResNets.
    tasks: how many; as many branches.
    each: classes of a task.
    batch: images of a step.
    samples: images to draw them from.
  """
  *old, new = [
    torch_resnet.placed(torch_resnet.resnet(depth, each)[:-1])
    for _ in range(tasks)
  ]
  for branch in old:
    branch.eval().requires_grad_(False)
  joint = torch_resnet.placed(nn.Linear(FEATURES * tasks, each * tasks))
  draw = drawing(each * tasks, batch, samples)
  features = torch_resnet.compiled(lambda branch, images: branch(images))

  def loss(known, images, labels):
    everything = torch.cat([*known, new(images)], 1)
    return nn.functional.cross_entropy(joint(everything), labels)

  learn = torch_resnet.learner(loss, [*new.parameters(), *joint.parameters()])

  def step():
    images, labels = draw()
    with torch.no_grad():
      known = [features(branch, images) for branch in old]
    learn(known, images, labels)
    torch_resnet.wait()

  return Learner(step, old, [new, joint])


def replay(
  depth: int, tasks: int, each: int, batch: int, samples: int
) -> Learner:
  """One network for the classes of all tasks; arguments as for `growing`."""
  network = torch_resnet.placed(torch_resnet.resnet(depth, each * tasks))
  draw = drawing(each * tasks, batch, samples)

  def loss(images, labels):
    return nn.functional.cross_entropy(network(images), labels)

  learn = torch_resnet.learner(loss, network.parameters())

  def step():
    learn(*draw())
    torch_resnet.wait()

  return Learner(step, [], [network])


def parts(
  depth: int, each: int, batch: int
) -> tuple[Callable[[], None], Callable[[], None]]:
  """One network by itself: forwards in inference form, and its gradient.

  Args:
    depth, each, batch: as for `growing`.
  """
  trained, tested = (
    torch_resnet.placed(torch_resnet.resnet(depth, each)) for _ in range(2)
  )
  tested.eval()
  images, labels = drawing(each, batch, batch)()
  run = torch_resnet.compiled(lambda network, images: network(images))

  def loss(images, labels):
    return nn.functional.cross_entropy(trained(images), labels)

  fast = torch_resnet.compiled(loss)

  def forwards():
    with torch.no_grad():
      run(tested, images)
    torch_resnet.wait()

  def gradient():
    trained.zero_grad(set_to_none=True)
    fast(images, labels).backward()
    torch_resnet.wait()

  return forwards, gradient


def drawing(
  classes: int, batch: int, samples: int
) -> Callable[[], tuple[Any, Any]]:
  """`() -> (images [b, 3, 32, 32], labels [b])`, drawn and normalised."""
  images, device = noise(samples), torch_resnet.device()
  labels = torch.arange(samples, device=device) % classes

  def draw():
    taken = torch.randint(samples, (batch,), device=device)
    rows = images[taken].permute(0, 3, 1, 2)  # a view, with channels last
    return (rows.float() / 255 - 0.5) / 0.5, labels[taken]

  return draw


@functools.cache
def noise(samples: int) -> Any:
  """Pixels `[n, 32, 32, 3]` as a data set stores them."""
  shape = samples, 32, 32, 3
  device = torch_resnet.device()
  return torch.randint(256, shape, dtype=torch.uint8, device=device)
