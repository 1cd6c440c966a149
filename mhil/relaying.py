"""A line to another host that stays open here when it breaks there.

JAX ends a process with a dump as soon as its line to process 0 closes. Given
the near end of a relay it hears nothing but silence then, while we are told.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable


class Relay:
  """Hands on what comes to an address of this process, both ways.

  Args:
    target: `HOST:PORT`.
    patience: seconds to wait until somebody listens there.

  Attributes:
    address: `HOST:PORT` of the near end.
    broken: called once the far end has closed a line.
  """

  def __init__(self, target: str, patience: float | int):
    host, _, port = target.rpartition(":")
    self._target = host.strip("[]"), int(port)
    self._patience = patience
    self._server = socket.create_server(("127.0.0.1", 0))
    self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
    self.broken: Callable[[], None] = lambda: None
    self._open_lines: list[socket.socket] = []
    threading.Thread(target=self._accept, daemon=True).start()

  def close(self) -> None:
    """Closes both ends of every line."""
    for line in (self._server, *self._open_lines):
      with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
      line.close()

  def _accept(self) -> None:
    with contextlib.suppress(OSError):
      while True:
        near, _ = self._server.accept()
        threading.Thread(target=self._open, args=(near,), daemon=True).start()

  def _open(self, near: socket.socket) -> None:
    far = self._connect()
    if far is None:
      near.close()
      return
    # Kept, so that the near end stays open whatever becomes of the far one.
    self._open_lines += near, far
    for end in near, far:
      end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    gone = threading.Event()

    def back():
      if _copy(near, far):
        gone.set()
        with contextlib.suppress(OSError):
          far.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=back, daemon=True).start()
    # Where the near end went first, as after an attempt that was given up,
    # nothing is lost.
    if _copy(far, near) and not gone.is_set():
      self.broken()

  def _connect(self) -> socket.socket | None:
    until = time.monotonic() + self._patience
    while time.monotonic() < until:
      with contextlib.suppress(OSError):
        far = socket.create_connection(self._target, timeout=5)
        far.settimeout(None)
        return far
      time.sleep(0.2)
    return None


def _copy(source: socket.socket, sink: socket.socket) -> bool:
  """Hands on until an end closes; whether it was the source."""
  while True:
    try:
      data = source.recv(1 << 16)
    except OSError:
      return True
    if not data:
      return True
    try:
      sink.sendall(data)
    except OSError:
      return False
