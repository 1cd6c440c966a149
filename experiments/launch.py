"""Runs `experiments.train` in several processes of this machine.

  python -m experiments.launch --num_processes=2 -- --config.mesh.head=4 \\
    --workdir=DIR

They share one mesh, as processes on several machines would: what stands after
`--` goes to each. To stop, or go on with --resume, is as with one process, and
the number of processes may be another then.
"""

import signal
import socket
import subprocess
import sys

from absl import flags

from experiments import cli


def define_flags() -> None:
  """Defines the flags; only for the program."""
  flags.DEFINE_integer("num_processes", 2, "How many processes.")


def main(rest: list[str]) -> None:
  """Starts the processes, waits for them and ends as they do."""
  count = flags.FLAGS.num_processes
  if count < 1:
    raise cli.UserError(f"--num_processes={count} is not positive; use 2")
  if not any(word.lstrip("-").split("=")[0] == "workdir" for word in rest):
    raise cli.UserError(
      "several processes write into one folder; add --workdir=DIR behind --"
    )
  started: list[subprocess.Popen] = []

  def stop(*_):
    for process in started:
      process.terminate()

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  port = free_port()
  for i in range(count):
    started.append(
      subprocess.Popen(
        [
          *(sys.executable, "-m", "experiments.train", *rest),
          f"--coordinator=127.0.0.1:{port}",
          f"--num_processes={count}",
          f"--process_id={i}",
        ],
        # Only the first has something to say.
        stdout=subprocess.DEVNULL if i else None,
        # A terminal's Ctrl-C comes to us alone, and is handed on once.
        start_new_session=True,
      )
    )
  status = [process.wait() for process in started]
  sys.exit(max(code if code >= 0 else 128 - code for code in status))


def free_port() -> int:
  """A port of this machine that nobody uses just now."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


if __name__ == "__main__":
  _at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
  _rest, sys.argv = sys.argv[_at + 1 :], sys.argv[:_at]
  define_flags()
  cli.run(lambda: main(_rest))
