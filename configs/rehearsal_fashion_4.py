"""Fashion-MNIST, 12,000 images, as 4 tasks; a rehearsal buffer of 30 %."""

from mhil import config


def get_config() -> config.Config:
  return config.Config(
    data=config.Data(name="tfds:fashion_mnist", limit=1200, augment=False),
    stream=config.Stream(sizes=(3, 3, 2, 2)),
    network=config.Network(name="convnet", widths=(8, 16, 32)),
    memory=config.Memory(size=3600, policy="per_class", draws=7, candidates=14),
    optimizer=config.Optimizer(learning_rate=4e-3, schedule="cosine"),
    train=config.Train(epochs=3, batch=56),
  )
