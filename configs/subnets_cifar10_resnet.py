"""CIFAR-10, 300 images a class, a small ResNet whose blocks are dealt to 2.

  python -m experiments.train --config=configs/subnets_cifar10_resnet.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `cifar10`, prepared. Sections of 2, 3 and 2 blocks; two
of the longest are dealt to two subnets, the rest is shared and averaged every
10 steps. Sized for a few minutes on two CPU cores; it shows what the parts of
the method are worth beside each other, and no accuracy that CIFAR-10 is known
for. Accuracy of the file as it stands, of two seeds: 35.0 ± 0.3 %.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(subnet=2),
    data=config.Data(name="tfds:cifar10", limit=300, augment=False),
    stream=config.Stream(increment=10),
    network=config.Network(
      name="resnet", widths=(8, 8, 16, 16), blocks=(2, 3, 2), norm="batch"
    ),
    subnets=config.Subnets(local_steps=10, statistics="collected"),
    # Of one head, plain cross-entropy.
    loss=config.Loss(reference="none", correction="off"),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(name="sgd", learning_rate=0.05, momentum=0.0),
    train=config.Train(epochs=10, batch=64),
  )
