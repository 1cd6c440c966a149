"""Fashion-MNIST, all classes, a small ResNet in two, three or four stages.

  python -m experiments.train --config=configs/layer_parallel_fashion.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `fashion_mnist`, prepared. It trains on 300 images a
class and tests on all 10,000. Sized for two CPU cores. Accuracy of the file
as it stands, of two seeds: 69.3 ± 0.4 %; 67.4 ± 0.7 % with
`layer_parallel.correction=off`.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:fashion_mnist", limit=300, whole_test=True),
    stream=config.Stream(increment=10),
    network=config.Network(
      name="resnet", widths=(8, 8, 16, 32), blocks=(1, 1, 1), norm="batch"
    ),
    loss=config.Loss(reference="none"),
    objective=config.Objective(name="layer_parallel"),
    layer_parallel=config.LayerParallel(
      stages=2, sweeps=1, corrections=2, beta=30.0, eta=1 / 30, rate=5.0
    ),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(
      name="sgd", learning_rate=0.05, schedule="cosine"
    ),
    train=config.Train(epochs=4, batch=64),
  )
