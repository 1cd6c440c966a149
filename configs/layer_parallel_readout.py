"""Digits through a frozen classifier that reads 4 of 64 units.

  python -m experiments.compare --suite=layer_parallel_readout --seeds=3

The last stage is the frozen classifier, so a stage that gets no credit from it
learns nothing of the task.
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
    layer_parallel=config.LayerParallel(
      cuts=(3,), beta=0.03, eta=30.0, rate=5.0
    ),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(name="sgd", learning_rate=0.05),
    train=config.Train(epochs=30, batch=24),
  )
