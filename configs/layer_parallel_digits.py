"""Digits, all classes at once, three stages that learn at once.

  python -m experiments.train --config=configs/layer_parallel_digits.py
  python -m experiments.train --config=configs/layer_parallel_digits.py \
    --config.mesh.stage=3

The second command has a device a stage. Accuracy 97.8 %; 95.3 % with
`layer_parallel.correction=off`: plain digits need no credit, so see
`layer_parallel_readout` for a task that does. One run each, seed 0.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="digits"),
    stream=config.Stream(increment=10),
    network=config.Network(name="mlp", widths=(64, 64, 64), norm="batch"),
    loss=config.Loss(reference="none"),
    objective=config.Objective(name="layer_parallel"),
    layer_parallel=config.LayerParallel(
      stages=3, sweeps=2, corrections=3, beta=2.0, eta=0.5, rate=5.0
    ),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(name="sgd", learning_rate=0.05),
    train=config.Train(epochs=10, batch=24),
  )
