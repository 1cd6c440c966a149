"""CIFAR-10 in one task, ResNet-32 in 16 modules, the published recipe.

  python -m experiments.train --config=configs/local_cifar10_resnet32_k16.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `cifar10`, prepared. SGD with Nesterov momentum, 160
epochs of 1,024 images, rate 0.8 by a cosine after 10 epochs of warm-up, decay
on every parameter; reflect-pad 4, crop, flip; classifiers 1c2f; the image is
supplied at every cut. `--config.local.mode=R0` is DGL, with
`--config.local.classifier=0c1f` greedy learning; `--config.local.modules=4`
and 8 have lists too, `--config.local.isolated=false` is the end-to-end control
with the same encoders.

Sized for one GPU. NOT MEASURED YET, needs a GPU: no accuracy and no time is
known; nobody has run it.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:cifar10"),
    stream=config.Stream(increment=10, order_seed=-1),
    network=config.Network(name="resnet32", norm="batch"),
    objective=config.Objective(name="local"),
    local=config.Local(modules=16, mode="E"),
    loss=config.Loss(reference="none"),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(
      name="sgd",
      learning_rate=0.8,
      weight_decay=1e-4,
      nesterov=True,
      schedule="epoch_cosine",
      warm_up=10,
    ),
    train=config.Train(epochs=160, batch=1024),
    checkpoint=config.Checkpoint(every=490),
  )
