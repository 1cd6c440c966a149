"""Objectives, losses, memories and cuts of the branch in one run each.

What is remembered depends on samples, seed and `mesh.data`, and on nothing
else: every way to train ends with the same buffer.
"""

import functools
import itertools
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from experiments import build
from mhil import config as config_lib
from mhil import prepare, trainer
from tests import program

MEMORIES = {
  "no memory": {"memory.size": 0},
  "rows on devices": {},
  "rows on the host": {"memory.place": "host"},
}
OBJECTIVES = {
  "end to end": {},
  "local": {
    "objective.name": "local",
    "local.cuts": (0,),
    "local.classifier": "0c1f",
  },
  "layer parallel": {
    "objective.name": "layer_parallel",
    "layer_parallel.stages": 2,
    "layer_parallel.sweeps": 1,
    "layer_parallel.cost": 0.5,
  },
}
CUTS = {
  "whole": {},
  "stages": {"mesh.stage": 2},
  "subnets": {"mesh.subnet": 2},
}
LOSSES = "dce", "distributed_ce", "ce"
ALL = list(itertools.product(OBJECTIVES, LOSSES, MEMORIES, CUTS))


def makes_sense(objective, loss, memory, cut):
  """Whether the four are meant to go together."""
  if objective == "end to end":
    return cut != "stages"
  apart = cut != "subnets" and loss == "dce"
  return apart and (cut, memory) != ("stages", "rows on the host")


@functools.cache
def folder():
  return pathlib.Path(tempfile.mkdtemp())


@functools.cache
def data():
  return program.save_arrays(folder() / "data")


def configured(objective, loss, memory, cut):
  """Four devices along `data` and `head`, and two more along a cut."""
  made = config_lib.Config(
    mesh=config_lib.Mesh(data=2, head=2),
    data=config_lib.Data(name=data()),
    stream=config_lib.Stream(sizes=(3, 4, 3)),
    network=config_lib.Network(widths=(8,), norm="batch"),
    memory=config_lib.Memory(size=20, draws=4, candidates=4),
    train=config_lib.Train(epochs=1, batch=8, log_every=4),
  )
  given = OBJECTIVES[objective] | MEMORIES[memory] | CUTS[cut]
  for field, value in (given | {"loss.name": loss}).items():
    config_lib.assign(made, field, value)
  return made


@functools.cache
def trained(*parts):
  made = build.parts(configured(*parts))
  mesh, stream, dataset, objective, loss, recipe, transform, partition = made
  run = prepare.build(
    *(mesh, stream, dataset, objective, loss, recipe, 0),
    transform,
    partition,
  )
  return run, trainer.fit(run)


@pytest.mark.parametrize("parts", ALL, ids=", ".join)
def test_what_makes_sense_is_built_and_the_rest_refused(parts):
  if makes_sense(*parts):
    build.parts(configured(*parts))
    return
  with pytest.raises(ValueError, match=r"=\S+.*; use ") as raised:
    built = build.parts(configured(*parts))
    prepare.check_spread(built.mesh, built.objective, built.transform)
  assert "\n" not in str(raised.value)


# Every objective, loss, memory and cut, and every pair of the last two.
TRAINED = [
  ("end to end", "dce", "no memory", "whole"),
  ("end to end", "ce", "rows on devices", "whole"),
  ("end to end", "distributed_ce", "rows on the host", "whole"),
  ("end to end", "dce", "rows on devices", "whole"),
  ("end to end", "dce", "rows on devices", "subnets"),
  ("end to end", "dce", "rows on the host", "subnets"),
  ("local", "dce", "rows on devices", "whole"),
  ("local", "dce", "rows on devices", "stages"),
  ("local", "dce", "no memory", "stages"),
  ("layer parallel", "dce", "rows on devices", "whole"),
  ("layer parallel", "dce", "rows on devices", "stages"),
  ("layer parallel", "dce", "rows on the host", "whole"),
  ("layer parallel", "dce", "no memory", "stages"),
]


@pytest.mark.slow
@pytest.mark.parametrize("parts", TRAINED, ids=", ".join)
def test_it_trains(parts):
  run, done = trained(*parts)
  assert done.finished
  assert done.metrics["compiles"]["after_first_task"] == 0
  losses = [
    x for row in done.progress.history for x in row[1:] if x is not None
  ]
  assert np.isfinite(losses).all() and len(losses) > 5
  over_head = [c for c in run.traffic if "head" in c.axes]
  assert bool(over_head) == (parts[1] != "dce")
  assert not any({"stage", "subnet"} & set(c.axes) for c in run.traffic)


@pytest.mark.slow
def test_all_remember_alike():
  held = {}
  for parts in TRAINED:
    if parts[2] != "no memory":
      _, done = trained(*parts)
      held[parts] = jax.tree.map(np.asarray, done.state.memory.buffer)
  first = next(iter(held.values()))
  assert (first.fill.sum(), first.rows.any()) == (20, True)
  for parts, buffer in held.items():
    assert len(held) == 10, parts
    jax.tree.map(np.testing.assert_array_equal, buffer, first)
