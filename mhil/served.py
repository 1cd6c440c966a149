"""The step of a run whose memory has its rows on the host.

It hands rows over before a step and takes others after it, and waits for no
device: what there is to know of a step is known before, and steps are counted.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mhil import programs

P = jax.P


class Served:
  """Called like the compiled step that it wraps.

  Args:
    step: compiled.
    serve: of the run's memory; see `transforms.Hosted`.
    workers: devices along `data`.
  """

  def __init__(self, step: Any, serve: Callable, workers: int):
    self._step, self._serve, self._workers = step, serve, workers
    self._keys = jax.jit(programs.keys)
    self._copies: dict[str, tuple[Any, Any]] = {}
    self._last: Any = None
    self._count = 0

  def __call__(
    self,
    state: programs.State,
    epoch: programs.Epoch,
    task: Any,
    samples: programs.Samples,
  ) -> programs.State:
    """The state after a step."""
    if state.step is not self._last:
      self._count = int(state.step)
    with jax.default_device(_host()):
      everyone = self._everyone(epoch, task, samples)
      root = self._copy("key", samples.key)
      key = self._keys(jax.random.wrap_key_data(root), self._count)[2]
      memory, done = self._serve(state.memory, everyone, key)
    state = self._step(state._replace(memory=memory), epoch, task, samples)
    self._last, self._count = state.step, self._count + 1
    return state._replace(memory=done(state.memory))

  def memory_analysis(self) -> Any:
    """That of the compiled step."""
    return self._step.memory_analysis()

  def cost_analysis(self) -> Any:
    """That of the compiled step."""
    return self._step.cost_analysis()

  def _everyone(self, epoch, task, samples):
    order = self._copy("order", epoch.order)
    row = order[self._count - int(self._copy("first", epoch.first_step))]
    return programs.known(
      row.reshape(self._workers, -1),
      self._copy("labels", samples.labels),
      self._copy("balanced", task.balanced),
    )

  def _copy(self, name, array):
    """The array on the host; copied once while it is the same."""
    if name not in self._copies or self._copies[name][0] is not array:
      plain = jax.random.key_data(array) if name == "key" else array
      self._copies[name] = array, np.asarray(plain)
    return self._copies[name][1]


def _host() -> jax.Device:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the processor out.
    return jax.local_devices()[0]
