"""Digits in one task: ResNet-14 in seven modules that see the image again.

  python -m experiments.train --config=configs/local_digits.py

Each module has a classifier and a loss of its own, no gradient leaves it, and
encoders of the image feed all but the first. `--config.mesh.stage=2` puts the
modules on two devices, which work at once and come to the same parameters;
`--config.local.mode=R0` is plain greedy learning. Accuracy 98.3 %: one run,
seed 0.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="digits"),
    stream=config.Stream(increment=10),
    network=config.Network(name="resnet14", norm="batch"),
    objective=config.Objective(name="local"),
    local=config.Local(cuts=tuple(range(6)), mode="E"),
    loss=config.Loss(reference="none"),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(learning_rate=2e-3, schedule="cosine"),
    train=config.Train(epochs=5, batch=64),
  )
