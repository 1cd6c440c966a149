"""Every file in `configs/` loads, is valid and builds; nothing is compiled.

Sets that are not at hand are stood in for by empty images of their shape.
"""

import ast
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build, cli
from mhil import data, validation

FILES = sorted(p for p in cli.CONFIGS.glob("*.py") if p.stem[0] != "_")
NAMES = [path.stem for path in FILES]
LOCAL = {
  # Modules, and encoders of the image.
  "local_cifar10_resnet32_k16": (16, 15),
  "local_digits": (7, 6),
  "local_fashion": (7, 6),
  "local_stream": (3, 2),
}
# Shape of an image, classes, training images of each class. ImageNet's are
# smaller here: a buffer for them is held against the machine's memory.
SETS = {
  "tfds:cifar10": ((32, 32, 3), 10, 5000),
  "tfds:cifar100": ((32, 32, 3), 100, 500),
  "tfds:fashion_mnist": ((28, 28, 1), 10, 6000),
  "arrays:imagenet224": ((16, 16, 3), 1000, 1281),
}
load = data.load


def stand_in(name, *, limit=None, augment=True, **rest):
  """A set without content, which takes no memory."""
  if name not in SETS:
    return load(name, limit=limit, augment=augment, **rest)
  shape, classes, each = SETS[name]
  each = min(each, limit or each)

  def split(n):
    labels = np.arange(classes * n, dtype=np.int32) % classes
    return np.broadcast_to(np.uint8(0), (len(labels), *shape)), labels

  sets = *split(each), *split(min(each, 10))
  moments = (0.5,) * shape[-1], (0.25,) * shape[-1]
  crops = (4, True) if augment else (0, False)
  return data.Dataset(name, *sets, classes, 255.0, *moments, *crops)


def built(name, monkeypatch):
  """The configuration and its parts, on as many devices as there are."""
  config = cli.load_config(cli.CONFIGS / f"{name}.py")
  validation.validate(config)
  while build.devices(config.mesh) > len(jax.devices()):
    config.mesh.head -= 1
  monkeypatch.setattr(data, "load", stand_in)
  return config, build.parts(config)


def test_every_file_is_found():
  assert {"digits", *LOCAL} <= set(NAMES) and len(NAMES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_builds(name, monkeypatch):
  config, parts = built(name, monkeypatch)
  assert parts.objective.name == config.objective.name
  assert parts.transform.size == max(config.memory.size, 0)
  assert parts.partition.parts == config.mesh.subnet
  assert parts.recipe.epochs == config.train.epochs
  shape = parts.dataset.train_images.shape[1:]
  params, stats, _ = jax.eval_shape(parts.objective.init, jax.random.key(0))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) > 100
  images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  logits = jax.eval_shape(parts.objective.predict, params, stats, images)
  assert logits.shape == (2, parts.stream.head_width + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
def test_local_learning_has_the_modules_that_its_docstring_says(
  name, monkeypatch
):
  config, parts = built(name, monkeypatch)
  branch = build.branch_of(config, parts.dataset, parts.stream)
  cut = build.make_split(config.local, branch, parts.dataset)
  count, encoders = LOCAL[name]
  assert len(cut.modules) == count
  assert sum(net.startswith("enc") for net in cut.nets.names) == encoders
  params, *_ = jax.eval_shape(parts.objective.init, jax.random.key(0))
  assert set(params) == set(branch.pieces) | set(cut.nets.names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_docstring_says_the_command(path):
  text = ast.get_docstring(ast.parse(path.read_text())) or ""
  known = f"--config=configs/{path.name}", f"--suite={path.stem}"
  assert path.stem == "digits" or any(flag in text for flag in known)
