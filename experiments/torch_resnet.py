"""The CIFAR ResNet in PyTorch, compiled: what a GPU user would compare with.

PyTorch is no dependency; without it the suite `resnet` leaves its rows out.
"""

import time
from typing import Any

try:
  import torch
  from torch import nn
except ImportError:
  torch: Any = None  # type: ignore[no-redef]


def conv(inputs: int, outputs: int, stride: int = 1, k: int = 3) -> Any:
  """Convolution without a bias, and its batch normalisation."""
  layer = nn.Conv2d(inputs, outputs, k, stride, padding=k // 2, bias=False)
  return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def resnet(depth: int, outputs: int) -> Any:
  """He et al. 2016, section 4.2, with 1x1 convolutions on the shortcuts."""

  class Block(nn.Module):
    def __init__(self, inputs, width, stride):
      super().__init__()
      self.body = nn.Sequential(
        conv(inputs, width, stride), nn.ReLU(), conv(width, width)
      )
      changes = stride != 1 or inputs != width
      self.skip = conv(inputs, width, stride, 1) if changes else nn.Identity()

    def forward(self, x):
      return torch.relu(self.body(x) + self.skip(x))

  layers, inputs = [conv(3, 16), nn.ReLU()], 16
  for width in (16, 32, 64):
    for i in range((depth - 2) // 6):
      layers.append(Block(inputs, width, 2 if i == 0 and width > 16 else 1))
      inputs = width
  pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, outputs)
  return nn.Sequential(*layers, *pool)


def rate(
  depth: int, outputs: int, batch: int, steps: int, heads: int, *, bf16: bool
) -> float:
  """Images a second: each of `heads` networks takes a step on each batch.

  Channels last, `torch.compile`, SGD with momentum and weight decay; images
  lie on the device, normalised, without augmentation.
  """
  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cudnn.benchmark = True
  torch.manual_seed(0)
  images = torch.randn(batch, 3, 32, 32, device=device)
  images = images.to(memory_format=torch.channels_last)
  labels = torch.randint(outputs, (batch,), device=device)
  jobs = [_job(resnet(depth, outputs), device, bf16) for _ in range(heads)]

  def run(count: int) -> None:
    for _ in range(count):
      for job in jobs:
        job(images, labels)
    if device == "cuda":
      torch.cuda.synchronize()

  run(5)  # compiles, and lets cuDNN choose
  start = time.perf_counter()
  run(steps)
  return steps * batch / (time.perf_counter() - start)


def _job(network: Any, device: str, bf16: bool) -> Any:
  network = network.to(device, memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(
    network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4
  )

  def loss(images, labels):
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
      return nn.functional.cross_entropy(network(images), labels)

  compiled = torch.compile(loss)

  def step(images, labels):
    optimizer.zero_grad(set_to_none=True)
    compiled(images, labels).backward()
    optimizer.step()

  return step
