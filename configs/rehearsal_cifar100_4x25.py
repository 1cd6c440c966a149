"""CIFAR-100 as 4 tasks of 25 classes, ResNet-18, a buffer of 30 %.

  python -m experiments.train --config=configs/rehearsal_cifar100_4x25.py \\
    --config.data.folder=DIR --config.network.dtype=bfloat16

DIR holds the TFDS set `cifar100`, prepared. The paper's four tasks and its
recipe, scaled from ImageNet to CIFAR-100: b/c/r of 56/14/7, 30 epochs a task
with 5 of warm-up, the rate cut to 50, 5 and 1 % at epochs 21, 26 and 28.
`--config.mesh.data=8 --config.train.batch=448 --config.memory.draws=56
--config.memory.candidates=112` keeps these numbers on each of 8 workers.

Sized for one GPU. NOT MEASURED YET: nobody has run it.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:cifar100"),
    stream=config.Stream(increment=25),
    network=config.Network(name="resnet18", norm="batch"),
    memory=config.Memory(
      size=15_000, policy="per_class", draws=7, candidates=14
    ),
    optimizer=config.Optimizer(
      name="sgd",
      learning_rate=0.0125,
      weight_decay=5e-5,
      schedule="steps",
      milestones=(21, 26, 28),
      percents=(50, 5, 1),
      warm_up=5,
    ),
    train=config.Train(epochs=30, batch=56),
    checkpoint=config.Checkpoint(every=2000),
  )
