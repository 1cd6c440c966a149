"""How a task is trained: the plain numbers behind a run."""

from typing import NamedTuple

import optax

from mhil import optimizers


class Recipe(NamedTuple):
  """How a task is trained.

  Attributes:
    optimizer: of unit learning rate (`optimizers`); fresh in every task.
    rate: learning rate over a task.
    epochs: passes over a task's samples.
    batch: samples of a step, over the whole mesh, without those that a memory
      adds.
    train_heads: `all`, `readout` or `new`; see `heads.update`.
    correction: add the loss's prior correction.
    cumulative: a task's samples are those of all classes seen so far.
    balanced_epochs: passes over what the memory holds, the new classes too,
      after each task but the first; 0 for none.
    balanced_rate: the learning rate in those passes.
    from_scratch: new parameters in every task. With `cumulative` this is joint
      training, the upper bound.
    streamed: read the images from the host, ahead of the step that needs them,
      instead of keeping the whole set on each device.
    log_every: steps between two rows of the history.
    test_batch: samples of an evaluation step, over the whole mesh.
  """

  optimizer: optax.GradientTransformation = optimizers.adam()
  rate: optimizers.Rate = optimizers.constant(1e-3)
  epochs: int = 30
  batch: int = 24
  train_heads: str = "all"
  correction: bool = True
  cumulative: bool = False
  balanced_epochs: int = 0
  balanced_rate: optimizers.Rate = optimizers.constant(1e-4)
  from_scratch: bool = False
  streamed: bool = False
  log_every: int = 50
  test_batch: int = 256
