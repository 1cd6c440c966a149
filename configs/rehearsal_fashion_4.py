"""Fashion-MNIST, 12,000 images, as 4 tasks; a buffer of 30 % of them.

  python -m experiments.train --config=configs/rehearsal_fashion_4.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `fashion_mnist`, prepared. The paper's b/c/r of 56/14/7
and its four tasks, sized for two CPU cores: some 20 seconds of training, and
average incremental accuracy 73.7 % (two seeds). `python -m experiments.compare
--suite=rehearsal_fashion_4` makes the table of buffer sizes, rows drawn, scopes
and bounds in docs/results/rehearsal_fashion_4.md.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:fashion_mnist", limit=1200, augment=False),
    stream=config.Stream(sizes=(3, 3, 2, 2)),
    network=config.Network(name="convnet", widths=(8, 16, 32)),
    memory=config.Memory(size=3600, policy="per_class", draws=7, candidates=14),
    optimizer=config.Optimizer(learning_rate=4e-3, schedule="cosine"),
    train=config.Train(epochs=3, batch=56),
  )
