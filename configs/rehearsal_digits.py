"""Digits as 5 tasks on 2 data-parallel workers that share a rehearsal buffer.

  python -m experiments.train --config=configs/rehearsal_digits.py

Nothing is downloaded. Each worker sees 28 new samples a step and is dealt 7
rows of the whole buffer, which lie on both.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(data=2),
    data=config.Data(name="digits"),
    stream=config.Stream(increment=2),
    network=config.Network(name="mlp", widths=(64,)),
    memory=config.Memory(size=430, policy="per_class", draws=14, candidates=14),
    train=config.Train(epochs=30, batch=56),
  )
