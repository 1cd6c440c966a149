"""How processes come together; see `processes` for what they do then."""

import os
import re
import sys
import threading
from typing import Any

import jax
from jax._src import distributed

from mhil import relaying
from mhil.processes import CONNECT, PATIENCE, Together


def join(coordinator: str, count: int | None, index: int | None) -> Together:
  """Connects this process with the others, before the first use of a device.

  Args:
    coordinator: `HOST:PORT` of process 0; `auto` asks JAX, which knows Slurm,
      Open MPI and Kubernetes.
    count, index: of the processes, and which one this is; None with `auto`.

  Raises:
    ValueError: if one of them is no good, or the others do not come.
  """
  how: dict[str, Any] = {
    "initialization_timeout": 10 * CONNECT,
    # Ours come first.
    "heartbeat_timeout_seconds": int(8 * PATIENCE),
    "shutdown_timeout_seconds": 10,
  }
  line: relaying.Relay | None = None
  if coordinator == "auto":
    if count is not None or index is not None:
      raise ValueError(
        f"num_processes={count} and process_id={index} are found by "
        "coordinator=auto; leave them out"
      )
  else:
    count, index = _checked(coordinator, count, index)
    how |= {"num_processes": count, "process_id": index}
    how["coordinator_address"] = coordinator
    if index and count > 1:
      line = relaying.Relay(coordinator, 10 * CONNECT)
      how["coordinator_address"] = line.address
  # Its messages are not for the user, who gets ours.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  missing = (
    f"coordinator={coordinator} did not bring the processes together ({{}}); "
    f"check that all{'' if count is None else f' {count}'} are started and "
    "reach HOST:PORT of process 0, which must be free"
  )
  # JAX would end in a dump.
  late = threading.Timer(CONNECT, _late, [missing])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(**how)
  except (RuntimeError, ValueError) as error:
    raise ValueError(missing.format(_first_line(error))) from None
  finally:
    late.cancel()
  state = distributed.global_state
  together = Together(state.num_processes, state.process_id)
  if line is not None:
    line.broken = lambda: together.lost(0, "is gone")
  return together


def _checked(
  coordinator: str, count: int | None, index: int | None
) -> tuple[int, int]:
  if not re.fullmatch(r"\S+:\d+", coordinator):
    raise ValueError(
      f"coordinator={coordinator} is not HOST:PORT; use the address of process "
      "0 with a free port, such as 10.0.0.1:4000, or auto"
    )
  if count is None or index is None:
    raise ValueError(
      f"coordinator={coordinator} needs num_processes and process_id; use for "
      "instance num_processes=2 and process_id=0"
    )
  if count < 1 or not 0 <= index < count:
    raise ValueError(
      f"process_id={index} is not one of num_processes={count}; use 0 to "
      f"{max(count - 1, 0)}"
    )
  return count, index


def _late(missing: str) -> None:
  line = missing.format(f"not all came in {CONNECT} s")
  print(f"error: {line}", file=sys.stderr, flush=True)
  os._exit(2)


def _first_line(error: Exception) -> str:
  return str(error).strip().partition("\n")[0]
