"""Fashion-MNIST in one task, the paper's three-layer net as 4 subnets.

  python -m experiments.train --config=configs/subnets_wide.py \\
    --config.data.folder=DIR

DIR holds the TFDS set `fashion_mnist`, prepared. Hidden layers of 512 units, to
run on two CPU cores. The paper's width and more devices:

  --config.network.widths="(4096, 4096)" --config.mesh.subnet=8

and its two-layer net is `--config.network.widths="(4096,)"`. A device then
holds its subnet and an eighth of what no subnet holds. Accuracy of the
file as it stands, of two seeds: 80.9 ± 0.2 %.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(subnet=4),
    data=config.Data(name="tfds:fashion_mnist", limit=1200, augment=False),
    stream=config.Stream(increment=10),
    network=config.Network(
      name="mlp", widths=(512, 512), norm="batch", output_norm=True
    ),
    subnets=config.Subnets(statistics="collected"),
    # Of one head, plain cross-entropy.
    loss=config.Loss(reference="none", correction="off"),
    memory=config.Memory(size=0),
    optimizer=config.Optimizer(name="sgd", learning_rate=0.05, momentum=0.0),
    train=config.Train(epochs=5, batch=128),
  )
