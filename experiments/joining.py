"""Flags of a run of several processes, and what these must agree on."""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments import build, claims, cli
from mhil import config as config_lib
from mhil import connecting, processes, trainer


def define_flags() -> None:
  """Defines the flags of a process that is not alone."""
  flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, if there are several; auto asks JAX.",
  )
  flags.DEFINE_integer("num_processes", None, "How many processes there are.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


@contextlib.contextmanager
def joined() -> Iterator[processes.Together]:
  """The processes that the flags name; those that are left learn of errors.

  Raises:
    UserError: for flags that do not fit, or processes that do not come.
  """
  given = flags.FLAGS
  if given.coordinator is None:
    _refuse_alone()
    yield processes.ALONE
    return
  _refuse_together()
  with cli.checking():
    together = connecting.join(
      given.coordinator, given.num_processes, given.process_id
    )
  try:
    yield together
  except (cli.UserError, trainer.Diverged) as error:
    status = 2 if isinstance(error, cli.UserError) else 1
    if not together.failed(error, status):
      sys.exit(status)
    raise
  except BaseException as error:
    # A line to a lost process breaks before anybody knows that it is lost.
    if isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError)):
      together.await_news()
    together.failed(type(error).__name__)
    raise
  together.over()


def _refuse_alone() -> None:
  for name in "num_processes", "process_id":
    if (value := flags.FLAGS[name].value) is not None:
      raise cli.UserError(
        f"--{name}={value} is of a run of several processes; add "
        "--coordinator=HOST:PORT, or leave it out"
      )


def _refuse_together() -> None:
  given = flags.FLAGS
  if not given.workdir:
    raise cli.UserError(
      f"--coordinator={given.coordinator}: several processes write into one "
      "folder; add --workdir=DIR, the same for all"
    )
  if heads := given.config.heads:
    raise cli.UserError(
      f"--heads={','.join(map(str, heads))} trains without a link, and "
      f"--coordinator={given.coordinator} is one; use one of the two"
    )


def agree(
  together: processes.Together,
  config: config_lib.Config,
  parts: build.Parts,
  fingerprint: str,
  resume: bool,
) -> None:
  """Raises ValueError unless all processes are to do the same."""
  fields = config_lib.flatten(config_lib.to_dict(config))
  fields |= {"--resume": resume, "data_sha256": fingerprint}
  together.agree(fields)
  together.what = heads_of(parts.mesh, len(parts.stream.heads))
  together.wait("agreed")


def check_shared(
  together: processes.Together, folder: pathlib.Path, config: config_lib.Config
) -> None:
  """Raises UserError if a process does not see what the first one wrote."""
  path = folder / claims.CONFIG
  told = path.read_text() if path.is_file() else None
  if told != config_lib.to_json(config):
    raise cli.UserError(
      f"--workdir={folder} is not the same folder for process {together.index} "
      "as for process 0; name one that all processes share"
    )
  together.wait("seen")
  together.begun = True


def heads_of(mesh: Mesh, heads: int) -> Callable[[int], str]:
  """`process -> which of so many heads it has`, in words."""
  place = np.vectorize(lambda d: d.process_index)(mesh.devices)
  h = mesh.shape["head"]

  def what(process: int) -> str:
    along = np.unique(np.argwhere(place == process)[:, 1])
    found = [str(head) for head in range(heads) if head % h in along]
    few = f"head{'s' * (len(found) > 1)} {', '.join(found)}"
    return few if len(found) < 10 else f"{len(found)} of {heads} heads"

  return what


class Preempted:
  """True, in all processes at the same step, once SIGTERM came to one."""

  def __init__(self) -> None:
    self._asked = 0

  def __call__(self) -> bool:
    """Whether all are to stop here; to be asked by all alike."""
    self._asked += 1
    return multihost_utils.reached_preemption_sync_point(self._asked)

  def __enter__(self):
    # A key of one terminal is to stop all of them.
    self._before = signal.signal(
      signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    return self

  def __exit__(self, *_):
    signal.signal(signal.SIGINT, self._before)
