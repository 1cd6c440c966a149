"""Fashion-MNIST, a part of it, all classes at once, a small ResNet cut up.

  python -m experiments.train \\
    --config=configs/layer_parallel_fashion_resnet.py --config.data.folder=DIR
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:fashion_mnist", limit=1000),
    stream=config.Stream(increment=10),
    network=config.Network(name="resnet8", norm="batch"),
    loss=config.Loss(reference="none"),
    objective=config.Objective(name="layer_parallel"),
    layer_parallel=config.LayerParallel(stages=2),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(
      name="sgd", learning_rate=0.05, weight_decay=5e-4, schedule="cosine"
    ),
    train=config.Train(epochs=5, batch=64),
  )
