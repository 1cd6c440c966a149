"""Fashion-MNIST, 12,000 images, as 5 tasks of 2 classes; 1,000 exemplars.

  python -m experiments.train --config=configs/fashion_5x2.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `fashion_mnist`, prepared. Sized for two CPU cores: half
a minute from start to end, compilation included, or a minute where others keep
the cores busy. Average incremental accuracy 81.3 %, last 74.4 %: mean of seeds
0 to 2, each with its own class order, in docs/results/fashion_5x2.md.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(head=5),
    data=config.Data(name="tfds:fashion_mnist", limit=1200, augment=False),
    stream=config.Stream(increment=2),
    network=config.Network(name="convnet", widths=(8, 16, 32)),
    memory=config.Memory(size=1000),
    optimizer=config.Optimizer(learning_rate=4e-3, schedule="cosine"),
    train=config.Train(epochs=2, batch=24),
  )
