"""Digits as 5 tasks of 2 classes on 5 heads, each learning locally with D-CE.

  python -m experiments.train --config=configs/local_stream.py

A head is a convnet in three modules; the classifiers between them pay the
head's own loss, D-CE, so nothing is sent between heads.
`--config.mesh.stage=3` puts each module of each head on a device of its own.
Average incremental accuracy 97.9 %, last 95.8 %; the same network trained end
to end (`--config.local.isolated=false`) 97.9 and 95.6 %: one run each, seed 0.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(head=5),
    data=config.Data(name="digits"),
    stream=config.Stream(increment=2),
    network=config.Network(name="convnet", widths=(16, 32, 64), norm="group"),
    objective=config.Objective(name="local"),
    local=config.Local(cuts=(0, 1), mode="E", classifier="0c1f"),
    memory=config.Memory(size=100),
    optimizer=config.Optimizer(learning_rate=3e-3),
    train=config.Train(epochs=8, batch=24),
  )
