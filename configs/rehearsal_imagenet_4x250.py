"""ImageNet as 4 tasks of 250 classes on 8 workers, a buffer of 30 %.

  python -m experiments.train --config=configs/rehearsal_imagenet_4x250.py \\
    --config.data.name=arrays:FOLDER --config.network.dtype=bfloat16

FOLDER holds ImageNet's images as uint8 arrays of 224x224x3 (`data.load` says
how), 193 GB that are read as they are needed. The published settings: b/c/r of
56/14/7 on each worker, 30 epochs a task with 5 of warm-up, SGD with momentum
0.9, weight decay 5e-5, the rate times the workers and cut to 50, 5 and 1 % at
epochs 21, 26 and 28. The 384,350 rows of the buffer are 58 GB, in the host's
memory. The base rate, 0.0125 a worker, is our guess. ResNet-18 is one of the
paper's three networks.

NOT MEASURED: nobody has run this; it needs the data and eight devices.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(data=8),
    data=config.Data(name="arrays:imagenet224", streamed=True),
    stream=config.Stream(increment=250),
    network=config.Network(name="resnet18_imagenet", norm="batch"),
    memory=config.Memory(
      size=384_350, policy="per_class", draws=56, candidates=112, place="host"
    ),
    optimizer=config.Optimizer(
      name="sgd",
      learning_rate=0.1,
      weight_decay=5e-5,
      schedule="steps",
      milestones=(21, 26, 28),
      percents=(50, 5, 1),
      warm_up=5,
    ),
    train=config.Train(epochs=30, batch=448),
    checkpoint=config.Checkpoint(every=2000),
  )
