"""Digits in one task: ResNet-20 in ten modules that see the image again.

  python -m experiments.train --config=configs/local_digits.py

Each module has a classifier and a loss of its own, no gradient leaves it, and
encoders of the image feed all but the first.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="digits"),
    stream=config.Stream(increment=10),
    network=config.Network(name="resnet20", norm="batch"),
    objective=config.Objective(name="local"),
    local=config.Local(cuts=tuple(range(9)), mode="E"),
    loss=config.Loss(reference="none"),
    optimizer=config.Optimizer(learning_rate=2e-3, schedule="cosine"),
    train=config.Train(epochs=5, batch=64),
  )
