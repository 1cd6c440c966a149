"""CIFAR-100 as 10 tasks of 10 classes ("B0"), ResNet-32, 2,000 exemplars.

  python -m experiments.train --config=configs/cifar100_b0_10.py \\
    --config.data.folder=DIR --config.network.dtype=bfloat16

DIR holds the TFDS set `cifar100`, prepared. The recipe that the field
publishes: SGD, 170 epochs a task with 10 of warm-up, rate 0.1 cut at epochs
100 and 120, then 30 balanced epochs; exemplars by herding, the class order of
seed 1993. `--config.network.name=resnet18` is the other published backbone,
`--config.loss.name=ce` the coupled loss, `--config.mesh.head=10` a device a
head.

Sized for one GPU. NOT MEASURED YET: no accuracy and no time is known; on a CPU
only its first steps were run.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:cifar100"),
    stream=config.Stream(increment=10, order_seed=1993),
    network=config.Network(name="resnet32", norm="batch"),
    memory=config.Memory(
      size=2000, selection="herding", draws=36, candidates=0
    ),
    optimizer=config.Optimizer(
      name="sgd",
      learning_rate=0.1,
      weight_decay=5e-4,
      schedule="steps",
      milestones=(100, 120),
      warm_up=10,
    ),
    train=config.Train(
      epochs=170, batch=92, balanced_epochs=30, balanced_rate=1e-2
    ),
    checkpoint=config.Checkpoint(every=2000),
  )
