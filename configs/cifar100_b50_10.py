"""CIFAR-100 as 50 classes, then 10 tasks of 5 ("B50"), 20 exemplars a class.

  python -m experiments.train --config=configs/cifar100_b50_10.py \\
    --config.data.folder=DIR --config.network.dtype=bfloat16

DIR holds the TFDS set `cifar100`, prepared. The recipe is that of
`cifar100_b0_10`; heads are padded to the 50 classes of the first.

Sized for one GPU. NOT MEASURED YET: no accuracy and no time is known; on a CPU
only its first steps were run.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:cifar100"),
    stream=config.Stream(base=50, increment=5, order_seed=1993),
    network=config.Network(name="resnet32", norm="batch"),
    memory=config.Memory(
      size=2000, policy="per_class", selection="herding", draws=36, candidates=0
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
