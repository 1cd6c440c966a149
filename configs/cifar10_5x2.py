"""CIFAR-10, 1,500 images a class, as 5 tasks of 2 classes; 1,000 exemplars.

  python -m experiments.train --config=configs/cifar10_5x2.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `cifar10`, prepared. Sized for two CPU cores: 80 s of
training and tests, and three minutes from start to end where others kept the
cores busy. Average incremental accuracy 67.9 %, last 51.8 %: mean of seeds 0 to
2, each with its own class order, on a copy stored as JPEG of quality 90, in
docs/results/cifar10_5x2.md.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(head=5),
    data=config.Data(name="tfds:cifar10", limit=1500, augment=False),
    stream=config.Stream(increment=2),
    network=config.Network(name="convnet", widths=(16, 32, 64, 128)),
    memory=config.Memory(size=1000),
    optimizer=config.Optimizer(learning_rate=3e-3, schedule="cosine"),
    train=config.Train(epochs=3, batch=24),
  )
