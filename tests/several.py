"""Runs `experiments.train` in several processes that share a mesh."""

import pathlib
import subprocess
import sys
import time

from experiments import launch
from tests import program

SCRIPT = pathlib.Path(__file__).with_name("namespaces.sh")
ROOM = "unshare", "--map-root-user", "--net", "--mount"


def start(count, flags, cache):
  """Starts the processes; `flags` may be one list for all, or one for each."""
  address = f"127.0.0.1:{launch.free_port()}"
  if not flags or isinstance(flags[0], str):
    flags = [flags] * count
  return [
    program.start([*flags[i], *joins(address, count, i)], cache)
    for i in range(count)
  ]


def joins(address, count, index):
  """The flags of one of the processes."""
  return [
    f"--coordinator={address}",
    f"--num_processes={count}",
    f"--process_id={index}",
  ]


def finish(processes):
  """What each said, without the lines of a library underneath."""
  return [told(program.finish(process)) for process in processes]


def told(done):
  """The same without the lines that Gloo prints."""
  out = [line for line in done.out.splitlines() if "peer ranks" not in line]
  return done._replace(out="\n".join(out))


def run(count, flags, cache):
  """Runs the processes to their end."""
  return finish(start(count, flags, cache))


def roomy():
  """Whether namespaces with addresses of their own can be made here."""
  tried = subprocess.run(
    [*ROOM, "sh", "-c", "ip link add name hub type bridge && unshare -nm true"],
    capture_output=True,
  )
  return tried.returncode == 0


def apart(count, flags, cache, folder):
  """Starts each process in a network namespace of its own."""
  folder.mkdir(parents=True)
  address = "10.77.0.1:4000"
  words = [*flags, *joins(address, count, "INDEX")[:2]]
  inner = [
    "sh",
    "-c",
    'exec "$0" -m experiments.train "$@" --process_id=$INDEX',
    *(sys.executable, *words),
  ]
  return subprocess.Popen(
    [*ROOM, "bash", str(SCRIPT), str(count), str(folder), *inner],
    cwd=program.ROOT,
    env=program.environment(cache),
  )


def gathered(process, count, folder):
  """What each of `apart` said."""
  assert process.wait(180) == 0
  return [
    told(
      program.Done(
        int((folder / f"status.{i}").read_text()),
        (folder / f"out.{i}").read_text(),
        (folder / f"err.{i}").read_text(),
      )
    )
    for i in range(count)
  ]


def wait_for(condition, processes, seconds=90):
  """Waits until the condition holds; False if a process ended before."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    if condition():
      return True
    if any(process.poll() is not None for process in processes):
      return False
    time.sleep(0.02)
  raise TimeoutError
