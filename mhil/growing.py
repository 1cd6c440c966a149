"""A stream that turns out longer than planned: what was learnt goes on in it.

The heads that are there keep their parameters, statistics and optimisers; new
ones are drawn as a run that knew of them from the start draws them, for head
`i` depends on the root key and on `i` alone. Steps, batches and what a
`balanced` or `reservoir` memory holds depend on the classes seen and not on
those to come, so the longer run ends as if it had been planned.

A `per_class` memory is the exception: it deals its slots to all classes of the
stream, and gives some back when there are more; see `moving.widen`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mhil import across, partitions, programs, progress, streams
from mhil import run as run_lib

Tasks = Sequence[Sequence[int]]


def grow(
  run: run_lib.Run,
  state: programs.State,
  done: progress.Progress,
  like: programs.State,
) -> tuple[programs.State, progress.Progress]:
  """State and progress of a shorter stream, or another mesh, in this run.

  Args:
    run: whose stream begins with the tasks of `done`. Its data set begins with
      the samples of those tasks, in both splits, and prepares pixels alike.
    state: finished, or stopped within a task; may be overwritten.
    done: what was measured until then.
    like: shapes of the run's state; see `run.shapes`.

  Raises:
    ValueError: if the stream does not go on where those tasks end, or what is
      saved does not fit it.
  """
  check(done.tasks, run.stream)
  check_step(run, done)
  if done.tasks and run.stream.tasks[len(done.tasks) :]:
    check_partition(run.partition)
  held = run_lib.refit(run, state, like)
  held = jax.tree.map(_placed, held, like)
  entries = max(len(run.stream.tasks), run.numbers.size)
  return held, progress.widen(done, run.stream, entries)


def check(tasks: Tasks, stream: streams.Stream) -> None:
  """Raises ValueError unless a stream goes on where these tasks end.

  Args:
    tasks: classes of each; none for a run that did not note them.
    stream: which begins with them.
  """
  if not tasks or stream.tasks == tuple(map(tuple, tasks)):
    return
  if stream.fixed:
    raise ValueError(
      "network.fixed=true has one head for the classes that were planned, and "
      f"stream.sizes={stream.sizes} has other tasks; train it anew, or use "
      "network.fixed=false from the start"
    )
  sizes, known = tuple(map(len, tasks)), [c for task in tasks for c in task]
  width = max(sizes)
  if len(known) > len(stream.order):
    raise ValueError(
      f"stream.sizes={stream.sizes} is shorter than the {sizes} of the run "
      "that it is to go on with; bring the missing classes back"
    )
  if stream.sizes[: len(sizes)] != sizes:
    more = _sizes(len(stream.order) - len(known), width)
    raise ValueError(
      f"stream.sizes={stream.sizes} does not begin with the {sizes} of the run "
      f"that it is to go on with; use stream.sizes={sizes + more}"
    )
  if stream.head_width > width:
    more = _sizes(len(stream.order) - len(known), width)
    raise ValueError(
      f"stream.sizes={stream.sizes} has a task of {stream.head_width} classes, "
      f"and the heads that are there have room for {width}; use "
      f"stream.sizes={sizes + more}"
    )
  if list(stream.order[: len(known)]) != known:
    order = *known, *(c for c in stream.order if c not in set(known))
    raise ValueError(
      f"stream.order={streams.short(stream.order)} gives the {len(tasks)} "
      f"tasks that are there other classes; use stream.order={order}"
    )


def check_step(run: run_lib.Run, done: progress.Progress) -> None:
  """Raises ValueError if a run here was elsewhere after as many tasks."""
  t, of_task = len(done.tallies), run.phases_of(len(done.tallies))
  last = of_task[-1].steps.stop if of_task else run.phases[-1].steps.stop
  first = of_task[0].steps.start if of_task else last
  if not first <= done.step <= last:
    raise ValueError(
      f"step={done.step} of the run that is to go on is not in task {t}, whose "
      f"steps are {first} to {last} here; use its train.epochs, train.batch "
      "and data"
    )


def check_partition(partition: partitions.Partition) -> None:
  """Raises ValueError where new heads cannot join: units lie where others'.

  All heads of a run are cut alike, by a table that changes with each exchange.
  """
  if partition.units:
    raise ValueError(
      f"mesh.subnet={partition.parts} with subnets.method={partition.name} has "
      "dealt the units of the heads that are there, and new heads cannot join; "
      "train the longer stream anew, or use mesh.subnet=1 from the start"
    )


def lifted(state: programs.State) -> Any:
  """A state as it would be read from a save: on the host, and copied."""
  return jax.tree.map(np.array, across.fetch(state))


def _sizes(classes: int, width: int) -> tuple[int, ...]:
  """Tasks of so many classes, none wider than the heads."""
  whole, rest = divmod(classes, width)
  return (width,) * whole + (rest,) * bool(rest)


def _placed(x: Any, like: Any) -> Any:
  if isinstance(x, jax.Array) or isinstance(like, np.ndarray):
    return x
  return across.put(x, like.sharding)
