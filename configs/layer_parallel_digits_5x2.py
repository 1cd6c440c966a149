"""Digits as 5 tasks of 2 classes, D-CE heads of two stages that learn at once.

  python -m experiments.train --config=configs/layer_parallel_digits_5x2.py

Every head is a chain of stages with a network of its own that guesses. Average
incremental accuracy 95.3 %, last 91.7 %: one run, seed 0.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="digits"),
    stream=config.Stream(increment=2),
    network=config.Network(name="mlp", widths=(64, 64), norm="batch"),
    objective=config.Objective(name="layer_parallel"),
    layer_parallel=config.LayerParallel(
      stages=2, sweeps=1, corrections=2, beta=2.0, eta=0.5, rate=5.0
    ),
    memory=config.Memory(size=100),
    optimizer=config.Optimizer(name="sgd", learning_rate=0.02),
    train=config.Train(epochs=10, batch=24),
  )
