"""What processes tell each other, with a store in place of the real one."""

import socket
import threading
import time
import types

import jax
import numpy as np
import pytest

from experiments import joining
from mhil import across, connecting, processes, relaying, sharding
from tests import program

P = jax.P


class Store:
  """The key-value store of a coordinator, in this process."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self.values and not allow_overwrite:
      raise jax.errors.JaxRuntimeError("ALREADY_EXISTS: it is set")
    self.values[key] = value

  def key_value_try_get(self, key):
    if key not in self.values:
      raise jax.errors.JaxRuntimeError("NOT_FOUND: no such key")
    return self.values[key]

  def blocking_key_value_get(self, key, timeout_in_ms):
    return self.values[key]

  def key_value_dir_get(self, key):
    return [pair for pair in self.values.items() if pair[0].startswith(key)]


class Ended(Exception):
  pass


@pytest.fixture
def store(monkeypatch):
  """A store, a short patience, and a process that does not really end."""
  made = Store()
  monkeypatch.setattr(processes, "_store", lambda: made)
  monkeypatch.setattr(processes, "PATIENCE", 0.5)
  monkeypatch.setattr(processes, "BEAT", 0.02)
  monkeypatch.setattr(processes.atexit, "register", lambda *_: None)

  def end(status):
    raise Ended(status)

  monkeypatch.setattr(processes.os, "_exit", end)
  return made


def quiet(index, count=3):
  """Processes of which no thread is at work."""
  together = processes.Together()
  together.count, together.index = count, index
  together._heard, together.begun = time.monotonic(), True
  return together


def listened(together, seconds=2, ear="_listen"):
  """The status with which a listening process ended; None if it did not."""
  found = []

  def work():
    try:
      getattr(together, ear)()
    except Ended as ended:
      found.extend(ended.args)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join(seconds)
  together._over.set()
  thread.join(5)
  return found[0] if found else None


def beating(store, indices, stop):
  def work():
    count = 0
    while not stop.wait(0.02):
      count += 1
      for i in indices:
        store.values[f"mhil/beat/{i}"] = str(count)

  threading.Thread(target=work, daemon=True).start()


def test_the_first_finds_who_beats_no_more(store, capsys):
  stop = threading.Event()
  beating(store, [0, 1], stop)
  first = quiet(0)
  first.what = lambda process: f"heads of {process}"
  threading.Thread(target=first._beat, daemon=True).start()
  assert listened(first) == processes.LOST
  stop.set()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: process 2 with heads of 2 is gone; ")
  assert store.values["mhil/lost"] == "process 2 with heads of 2 is gone"


def test_nobody_is_missed_while_all_beat(store, capsys):
  stop = threading.Event()
  beating(store, [0, 1, 2], stop)
  first = quiet(0)
  threading.Thread(target=first._beat, daemon=True).start()
  assert listened(first, 1.5) is None
  stop.set()
  assert capsys.readouterr().err == ""


def test_the_others_learn_of_it(store, capsys):
  store.values["mhil/lost"] = "process 2 is gone"
  other = quiet(1)
  threading.Thread(target=other._beat, daemon=True).start()
  assert listened(other) == processes.LOST
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: process 2 is gone; ") and "--resume" in line


def test_a_store_that_is_silent_means_that_the_first_is_gone(store, capsys):
  other = quiet(1)
  # It waits for an answer that does not come.
  store.key_value_set = lambda *_, **__: time.sleep(5)
  threading.Thread(target=other._beat, daemon=True).start()
  assert listened(other, ear="_doubt") == processes.LOST
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: process 0 has not answered for ")


def test_what_failed_before_there_was_a_run_has_nothing_to_resume(
  store, capsys
):
  store.values["mhil/lost"] = "process 2 ended: no data"
  other = quiet(1)
  other.begun = False
  assert listened(other) == 2
  assert capsys.readouterr().err == "error: process 2 ended: no data\n"
  # The first one has said itself what holds for all.
  store.values["mhil/lost"] = "process 0 ended: no folder"
  other = quiet(1)
  other.begun = False
  assert listened(other) == 2
  assert capsys.readouterr().err == ""


def test_a_mistake_is_told_to_the_others_once(store):
  first, other = quiet(0), quiet(1)
  assert first.failed("no such\n file", 2)
  assert store.values["mhil/lost"] == "process 0 ended: no such file"
  # It is what holds for all; another mistake is worth its own line.
  assert not other.failed("no such file", 2)
  assert quiet(2).failed("another", 2)


def test_what_all_must_agree_on(store):
  quiet(0).agree({"seed": 1, "data_sha256": "abc"})
  quiet(1).agree({"seed": 1, "data_sha256": "abc"})
  words = 'data_sha256="abd" in process 2, and "abc" in process 0; give all'
  with pytest.raises(ValueError, match=words):
    quiet(2).agree({"seed": 1, "data_sha256": "abd"})
  with pytest.raises(ValueError, match="seed=2 in process 1, and 1 in process"):
    quiet(1).agree({"seed": 2, "data_sha256": "abc"})


def test_one_process_waits_for_none():
  processes.ALONE.agree({"seed": 1})
  processes.ALONE.wait("here")
  processes.ALONE.over()
  assert processes.ALONE.first and processes.ALONE.failed("why")


@pytest.mark.parametrize(
  "coordinator, count, index, words",
  [
    ("here", 2, 0, "coordinator=here is not HOST:PORT"),
    ("here:x", 2, 0, "is not HOST:PORT"),
    ("here:1", None, 0, "needs num_processes and process_id"),
    ("here:1", 2, None, "needs num_processes and process_id"),
    ("here:1", 2, 2, "process_id=2 is not one of num_processes=2; use 0 to 1"),
    ("here:1", 2, -1, "process_id=-1"),
    ("here:1", 0, 0, "num_processes=0"),
    ("auto", 2, None, "num_processes=2 and process_id=None are found by"),
  ],
)
def test_faults_of_an_address(coordinator, count, index, words):
  with pytest.raises(ValueError, match=words):
    connecting.join(coordinator, count, index)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--num_processes=2"], ["--num_processes=2", "add --coordinator="]),
    (["--process_id=0"], ["--process_id=0", "add --coordinator="]),
    (["--coordinator=a:1"], ["--coordinator=a:1", "add --workdir=DIR"]),
    (["--coordinator=a", "--workdir=x"], ["coordinator=a is not HOST:PORT"]),
    (
      ["--coordinator=a:1", "--workdir=x", "--heads=1"],
      ["--heads=1", "without a link", "use one of the two"],
    ),
  ],
)
def test_flags_that_do_not_fit(flags, words, tmp_path):
  done = program.forked(flags, tmp_path)
  assert (done.status, done.out) == (2, "")
  (line,) = done.err.splitlines()
  for word in words:
    assert word in line


def test_which_heads_a_process_has():
  class Device:
    def __init__(self, process):
      self.process_index = process

  devices = np.array([Device(0), Device(0), Device(1), Device(1)])
  mesh = types.SimpleNamespace(
    shape={"head": 4}, devices=devices.reshape(1, 4, 1, 1)
  )
  what = joining.heads_of(mesh, 6)
  assert (what(0), what(1)) == ("heads 0, 1, 4, 5", "heads 2, 3")
  assert joining.heads_of(mesh, 1)(0) == "head 0"
  assert joining.heads_of(mesh, 100)(1) == "50 of 100 heads"


def test_a_relay_hands_on_and_stays_open():
  with socket.create_server(("127.0.0.1", 0)) as server:
    relay = relaying.Relay(f"127.0.0.1:{server.getsockname()[1]}", 5)
    broken = threading.Event()
    relay.broken = broken.set
    host, _, port = relay.address.rpartition(":")
    near = socket.create_connection((host, int(port)), timeout=5)
    far, _ = server.accept()
    far.settimeout(5)
    near.sendall(b"there" * 1000)
    assert far.recv(5000, socket.MSG_WAITALL) == b"there" * 1000
    far.sendall(b"back")
    assert near.recv(4, socket.MSG_WAITALL) == b"back"
    assert not broken.is_set()
    far.close()
    assert broken.wait(5)
    near.settimeout(0.3)
    # A line that is closed would give an empty answer at once.
    with pytest.raises(TimeoutError):
      near.recv(1)
    near.close()
    relay.close()


def test_an_attempt_that_was_given_up_breaks_nothing():
  """As when process 0 comes later than another."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  relay = relaying.Relay(f"127.0.0.1:{port}", 20)
  broken = threading.Event()
  relay.broken = broken.set
  near = int(relay.address.rpartition(":")[2])
  with socket.create_connection(("127.0.0.1", near), timeout=5) as first:
    first.sendall(b"hello")
  second = socket.create_connection(("127.0.0.1", near), timeout=5)
  with socket.create_server(("127.0.0.1", port)) as late:
    lines = [late.accept()[0] for _ in range(2)]
    second.sendall(b"again")
    for line in lines:
      line.settimeout(2)
    found = {line.recv(5): line for line in lines}
    assert set(found) == {b"hello", b"again"}
    assert found[b"hello"].recv(1) == b""
    found[b"hello"].close()
    assert not broken.wait(0.5)
    found[b"again"].close()
    assert broken.wait(5)
  second.close()
  relay.close()


def test_processes_that_do_not_come(tmp_path):
  script = """
import sys
from experiments import cli, train
from mhil import connecting
connecting.CONNECT = 1
sys.argv[0] = "train"
train.define_flags()
cli.run(train.main, config=True)
"""
  flags = ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1"]
  done = program.forked(
    [*flags, f"--workdir={tmp_path / 'run'}"], tmp_path, script
  )
  assert (done.status, done.out) == (2, "")
  (line,) = done.err.splitlines()
  assert line.startswith("error: coordinator=127.0.0.1:1 did not bring")
  assert "not all came in 1 s" in line and "all 2 are started" in line


def test_a_relay_without_an_end_closes():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  relay = relaying.Relay(f"127.0.0.1:{port}", 0.3)
  port = int(relay.address.rpartition(":")[2])
  with socket.create_connection(("127.0.0.1", port), timeout=5) as near:
    assert near.recv(1) == b""
  relay.close()


def test_arrays_of_one_process_go_where_they_should():
  mesh = sharding.make_mesh(data=2, head=2)
  tree = {"a": np.arange(8.0), "key": jax.random.key(3)}
  where = {"a": jax.NamedSharding(mesh, P("data")), "key": None}
  where["key"] = jax.NamedSharding(mesh, P())
  laid = across.put(tree, where)
  assert laid["a"].sharding == where["a"]
  np.testing.assert_array_equal(across.fetch(laid["a"]), tree["a"])
  assert across.rows_here(8, where["a"]) == slice(0, 8)
  again = across.put_rows(tree["a"], 8, where["a"])
  np.testing.assert_array_equal(again, tree["a"])
  other = sharding.make_mesh(data=2, head=2, devices=jax.devices()[4:])
  sent = across.send(laid["a"], other)
  assert sent.sharding == jax.NamedSharding(other, P("data"))
  np.testing.assert_array_equal(sent, tree["a"])


def test_as_many_devices_of_each_process(monkeypatch):
  class Device:
    def __init__(self, process, i):
      self.process_index, self.id = process, 10 * process + i

  found = [Device(p, i) for p in range(2) for i in range(3)]
  monkeypatch.setattr(jax, "devices", lambda: found)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert [d.id for d in across.devices(4)] == [0, 1, 10, 11]
  with pytest.raises(ValueError, match="a mesh of 5 devices cannot be shared"):
    across.devices(5)
  with pytest.raises(ValueError, match=r"mesh.stage=4 in one process.*use"):
    across.devices(4, stage=4)
