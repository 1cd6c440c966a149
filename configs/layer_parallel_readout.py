"""Digits, all classes at once, three stages that learn at once.

python -m experiments.train --config=configs/layer_parallel_digits.py
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="digits"),
    stream=config.Stream(increment=10),
    network=config.Network(
      name="mlp", widths=(64, 64, 64), norm="batch", reads=4
    ),
    loss=config.Loss(reference="none"),
    objective=config.Objective(name="layer_parallel"),
    layer_parallel=config.LayerParallel(cuts=(3,)),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(name="sgd", learning_rate=0.1),
    train=config.Train(epochs=30, batch=24),
  )
