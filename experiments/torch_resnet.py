"""The CIFAR ResNet in PyTorch, compiled: what a GPU user would compare with.

PyTorch is no dependency; without it the suites leave its rows out.
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from absl import logging

try:
  import torch
  from torch import nn
except ImportError:
  torch: Any = None  # type: ignore[no-redef]
  nn: Any = None  # type: ignore[no-redef]


def conv(inputs: int, outputs: int, stride: int = 1, k: int = 3) -> Any:
  """Convolution without a bias, and its batch normalisation."""
  layer = nn.Conv2d(inputs, outputs, k, stride, padding=k // 2, bias=False)
  return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Block(nn.Module if nn else object):  # type: ignore[misc]
  """Two convolutions beside a shortcut; one class, so one compiled graph."""

  def __init__(self, inputs, width, stride):
    super().__init__()
    self.body = nn.Sequential(
      conv(inputs, width, stride), nn.ReLU(), conv(width, width)
    )
    changes = stride != 1 or inputs != width
    self.skip = conv(inputs, width, stride, 1) if changes else nn.Identity()

  def forward(self, x: Any) -> Any:
    """Maps `[b, inputs, height, width]`."""
    return torch.relu(self.body(x) + self.skip(x))


def resnet(depth: int, outputs: int) -> Any:
  """He et al. 2016, section 4.2, with 1x1 convolutions on the shortcuts."""

  layers, inputs = [conv(3, 16), nn.ReLU()], 16
  for width in (16, 32, 64):
    for i in range((depth - 2) // 6):
      layers.append(Block(inputs, width, 2 if i == 0 and width > 16 else 1))
      inputs = width
  pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs)
  return nn.Sequential(*layers, *pool)


def device() -> str:
  """Where JAX computes, so that both libraries use the same device."""
  gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
  return "cuda" if gpu else "cpu"


def placed(module: Any) -> Any:
  """The module on the device, its images with channels last."""
  return module.to(device(), memory_format=torch.channels_last)


@functools.cache
def compiles() -> bool:
  """Whether `torch.compile` works; on a CPU it needs a C++ compiler."""
  try:
    torch.compile(lambda x: x + 1)(torch.zeros(1, device=device()))
  except Exception as error:  # Its class depends on what is missing.
    logging.warning("PyTorch does not compile here: %s", error)
    return False
  # Without it a tenth network would silently run uncompiled.
  torch._dynamo.config.fail_on_recompile_limit_hit = True
  return True


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, compiled for fixed shapes where that works."""
  return torch.compile(function, dynamic=False) if compiles() else function


def learner(
  loss: Callable[..., Any], parameters: Iterable[Any]
) -> Callable[..., None]:
  """A step of SGD, with momentum and weight decay, on a compiled loss."""
  optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=5e-4)
  loss = compiled(loss)

  def step(*given):
    optimizer.zero_grad(set_to_none=True)
    loss(*given).backward()
    optimizer.step()

  return step


def rate(
  depth: int, outputs: int, batch: int, steps: int, heads: int, *, bf16: bool
) -> float:
  """Images a second: each of `heads` networks takes a step on each batch.

  Channels last, `torch.compile`, SGD with momentum and weight decay; images
  lie on the device, normalised, without augmentation.
  """
  torch.backends.cudnn.benchmark = True
  torch.manual_seed(0)
  torch._dynamo.reset()
  images = torch.randn(batch, 3, 32, 32, device=device())
  images = images.to(memory_format=torch.channels_last)
  labels = torch.randint(outputs, (batch,), device=device())
  jobs = [_job(placed(resnet(depth, outputs)), bf16) for _ in range(heads)]

  def run(count: int) -> None:
    for _ in range(count):
      for job in jobs:
        job(images, labels)
    wait()

  run(5)  # compiles, and lets cuDNN choose
  start = time.perf_counter()
  run(steps)
  return steps * batch / (time.perf_counter() - start)


def wait() -> None:
  """Waits for the device."""
  if device() == "cuda":
    torch.cuda.synchronize()


def _job(network: Any, bf16: bool) -> Callable[..., None]:
  def loss(images, labels):
    with torch.autocast(device(), torch.bfloat16, enabled=bf16):
      return nn.functional.cross_entropy(network(images), labels)

  return learner(loss, network.parameters())
