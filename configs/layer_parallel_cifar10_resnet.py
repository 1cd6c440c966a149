"""CIFAR-10, all classes at once, a ResNet-20 in two, three or four stages.

  python -m experiments.train --config.data.folder=DIR \
    --config=configs/layer_parallel_cifar10_resnet.py \
    --config.layer_parallel.stages=4 --config.layer_parallel.sweeps=3 \
    --config.layer_parallel.corrections=4 --config.mesh.stage=4

DIR holds the TFDS set `cifar10`, prepared. `mesh.stage` is 1, or a device for
each stage. Sized for one GPU a stage. NOT MEASURED YET: no accuracy and no time
is known. What is measured is `layer_parallel_fashion`.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:cifar10"),
    stream=config.Stream(increment=10),
    network=config.Network(name="resnet20", norm="batch"),
    loss=config.Loss(reference="none"),
    objective=config.Objective(name="layer_parallel"),
    layer_parallel=config.LayerParallel(
      stages=2, sweeps=1, corrections=2, beta=30.0, eta=1 / 30, rate=5.0
    ),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(
      name="sgd", learning_rate=0.1, weight_decay=5e-4, schedule="cosine"
    ),
    train=config.Train(epochs=100, batch=128),
  )
