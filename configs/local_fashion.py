"""Fashion-MNIST, 1,500 training images, ResNet-14 in up to seven modules.

  python -m experiments.train --config=configs/local_fashion.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `fashion_mnist`, prepared. Sized for two CPU cores, a
minute or two; what the number of modules and the context do to accuracy is in
docs/results/local_fashion.md. Accuracy of the file as it stands, of two seeds:
74.9 ± 0.5 %.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(
      name="tfds:fashion_mnist", limit=150, whole_test=True, augment=False
    ),
    stream=config.Stream(increment=10),
    network=config.Network(name="resnet14", norm="batch"),
    objective=config.Objective(name="local"),
    local=config.Local(cuts=tuple(range(6)), mode="E"),
    loss=config.Loss(reference="none"),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(learning_rate=2e-3, schedule="cosine"),
    train=config.Train(epochs=4, batch=50),
  )
