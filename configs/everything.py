"""Digits as 5 tasks: D-CE heads, a shared rehearsal buffer, local modules.

  python -m experiments.train --config=configs/everything.py

Eight devices, two along each of `data`, `head` and `stage`: heads send each
other nothing, the buffer lies over `data`, and the two modules of a branch
learn by losses of their own, each on its own device. Nothing is downloaded.
Average incremental accuracy 97.8 %, fine-tuning 45.4 %: three seeds, made by
`python -m experiments.compare --suite=everything --seeds=3`.
"""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    mesh=config.Mesh(data=2, head=2, stage=2),
    data=config.Data(name="digits"),
    stream=config.Stream(increment=2),
    network=config.Network(name="convnet", widths=(16, 32), norm="group"),
    objective=config.Objective(name="local"),
    local=config.Local(cuts=(0,), mode="E", classifier="0c1f"),
    memory=config.Memory(size=100, draws=24, candidates=24),
    train=config.Train(epochs=8, batch=24),
  )
