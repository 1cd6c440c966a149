"""Several processes that run one program, and what they do when one is lost.

`jax.distributed` connects them. Beside it each process beats once a second into
its key-value store, where the first one looks who has stopped, and each learns
of it and ends with one line, wherever it waits. Without this a process would
wait for a lost one until JAX ends it with a dump of its own.

That store is in no public interface of JAX; Orbax uses the same.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed

PATIENCE = 15.0  # seconds without a beat, after which a process is lost
BEAT = 1.0  # seconds
CONNECT = 120  # seconds until all have to be there
LOST = 75  # a process's status where another was lost; the run can go on
_PREFIX = "mhil/"


class Together:
  """The processes of a run; with one of them, nothing is done.

  Attributes:
    count: how many.
    index: which one this is.
    what: `process -> what it has`, to be told when it is lost.
    begun: whether there is something to go on with.
  """

  def __init__(self, count: int = 1, index: int = 0):
    self.count, self.index = count, index
    self.what: Callable[[int], str] = lambda process: ""
    self.begun = False
    self._threads: list[threading.Thread] = []
    self._over = threading.Event()
    self._lock = threading.Lock()
    self._heard = time.monotonic()
    if count > 1:
      for work in (self._beat, self._listen, self._doubt):
        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

  @property
  def first(self) -> bool:
    """Whether this process writes what one process has to."""
    return self.index == 0

  def of_first(self, name: str, value: str) -> str:
    """The value that the first process has under this name; each name once."""
    if self.count == 1:
      return value
    key = f"{_PREFIX}of_first/{name}"
    if self.first:
      _store().key_value_set(key, value)
    return _store().blocking_key_value_get(key, 1000 * CONNECT)

  def agree(self, values: Mapping[str, Any]) -> None:
    """Raises ValueError if the first process has another value of a name."""
    ours = {name: json.dumps(value) for name, value in values.items()}
    theirs = json.loads(self.of_first("values", json.dumps(ours)))
    for name, value in ours.items():
      if theirs.get(name) != value:
        raise ValueError(
          f"{name}={value} in process {self.index}, and {theirs.get(name)} in "
          "process 0; give all processes the same"
        )

  def wait(self, name: str) -> None:
    """Waits until all processes are here; each name once."""
    if self.count > 1:
      _store().wait_at_barrier(f"{_PREFIX}{name}", 24 * 3600 * 1000)

  def failed(self, why: object, status: int = 1) -> bool:
    """Tells the others that this process ends before its time.

    Args:
      why: in words.
      status: with which the process will end.

    Returns:
      Whether it is for this process to say why: the first one says what holds
      for all.
    """
    if self.count == 1:
      return True
    self._over.set()
    # JAX would wait for the others at the end, and then abort.
    atexit.register(_leave, status)
    ours = [True]
    # The store may be what is gone.
    told = threading.Thread(target=self._explain, args=(why, ours), daemon=True)
    told.start()
    told.join(6 * BEAT)
    return ours[0]

  def await_news(self) -> None:
    """Waits as long as it takes to learn that another process is lost.

    For where this one fails for no reason of its own: it does not return then.
    """
    if self.count > 1:
      time.sleep(PATIENCE + 5 * BEAT)

  def over(self) -> None:
    """All is done: waits for the others and takes leave of them."""
    if self.count > 1:
      self.wait("over")
      self._over.set()
      for thread in self._threads:
        thread.join(5 * BEAT)
      jax.distributed.shutdown()

  def lost(self, process: int, how: str) -> None:
    """Ends this process, since another is gone."""
    self._end(self._named(process, how))

  def _named(self, process: int, how: str) -> str:
    what = self.what(process)
    return f"process {process}{what and f' with {what}'} {how}"

  def _explain(self, why: object, ours: list[bool]) -> None:
    text, key = " ".join(str(why).split()), f"{_PREFIX}ended"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      if self.first:
        _store().key_value_set(key, text)
      else:
        time.sleep(2 * BEAT)
        if _read(key) == text:
          ours[0] = False
          return
    self._tell(f"process {self.index} ended: {text}"[:500])

  def _beat(self) -> None:
    count = 0
    while not self._over.wait(BEAT):
      count += 1
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        key = f"{_PREFIX}beat/{self.index}"
        _store().key_value_set(key, str(count), allow_overwrite=True)
        self._heard = time.monotonic()

  def _listen(self) -> None:
    beats = dict.fromkeys(range(self.count), ("", time.monotonic()))
    while not self._over.wait(BEAT):
      now = time.monotonic()
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        told = _read(f"{_PREFIX}lost")
        if told is not None:
          # The store goes with the first one, and others are to read it too.
          time.sleep(3 * BEAT * self.first)
          self._end(told)
        for key, beat in self._beats():
          process = int(key.rsplit("/", 1)[1])
          if beats[process][0] != beat:
            beats[process] = beat, now
      for process, (_, heard) in beats.items():
        if self.first and now - heard > PATIENCE:
          self._tell(self._named(process, "is gone"))
          self.lost(process, "is gone")

  def _doubt(self) -> None:
    # By itself: what asks the store may wait for an answer without end.
    while not self._over.wait(BEAT):
      if time.monotonic() - self._heard > PATIENCE:
        self.lost(0, f"has not answered for {PATIENCE:.0f} s")

  def _beats(self) -> list[tuple[str, str]]:
    if not self.first:
      return []
    return _store().key_value_dir_get(f"{_PREFIX}beat/")

  def _tell(self, text: str) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _store().key_value_set(f"{_PREFIX}lost", text)
    if self.first:
      time.sleep(3 * BEAT)  # What it says goes with it.

  def _end(self, text: str) -> None:
    with self._lock:
      if self._over.is_set():
        return
      try:
        if self.begun:
          line = (
            f"error: {text}; this run stops here: add --resume to go on from "
            "its newest save, with as many processes as there are"
          )
          print(line, file=sys.stderr, flush=True)
        elif not text.startswith("process 0 ended"):  # It has said so itself.
          print(f"error: {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
      finally:
        os._exit(LOST if self.begun else 2)


ALONE = Together()


def _leave(status: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _store() -> Any:
  client = distributed.global_state.client
  assert client is not None
  return client


def _read(key: str) -> str | None:
  try:
    return _store().key_value_try_get(key)
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" in str(error):
      return None
    raise
