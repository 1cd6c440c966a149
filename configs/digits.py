"""scikit-learn's digits as 5 tasks of 2 classes, D-CE on 5 heads.

  python -m experiments.train

The built-in default: nothing is downloaded.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(head=5),
    data=config.Data(name="digits"),
    stream=config.Stream(increment=2),
    network=config.Network(name="mlp", widths=(64,)),
    memory=config.Memory(size=100),
    train=config.Train(epochs=30, batch=24),
  )
