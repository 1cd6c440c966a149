"""Heads that a process trains knowing nothing of the others.

With D-CE a head learns from the samples and from nothing else, so any scheduler
may train the heads of a network in processes without a link. Each reads the
whole stream, fills the same memory from it, and writes what its heads make of
the test images; put together, that is the run of one program, bit for bit.

  process p, with heads H_p:
    each step:    memory <- samples;  theta_m <- opt(theta_m), m in H_p
    after task t: z_m of the test images, m in H_p, m <= t

What is ours: all of it. The paper's nodes do not wait for each other, so that
they need not know of each other either is a reading, not a claim of its.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mhil import bank as bank_lib
from mhil import (
  inputs,
  losses,
  metrics,
  phases,
  programs,
  scoring,
  sharding,
  streams,
  transforms,
)
from mhil import run as run_lib


def check(
  heads_here: Sequence[int],
  mesh: Mesh,
  stream: streams.Stream,
  loss: losses.Loss,
  transform: transforms.Transform,
) -> None:
  """Raises ValueError unless these heads can do without the others."""
  if not heads_here:
    return
  told = f"heads={','.join(map(str, heads_here))}"
  known = range(len(stream.heads))
  if not set(heads_here) <= set(known) or len(set(heads_here)) < len(
    heads_here
  ):
    raise ValueError(
      f"{told} does not name heads of this stream, each once; use numbers "
      f"from 0 to {known[-1]}"
    )
  if mesh.shape["head"] > len(heads_here):
    raise ValueError(
      f"mesh.head={mesh.shape['head']} is more than the {len(heads_here)} of "
      f"{told}; use mesh.head={len(heads_here)} or less"
    )
  for axis in "stage", "subnet":
    if mesh.shape[axis] > 1:
      raise ValueError(
        f"mesh.{axis}={mesh.shape[axis]} cuts the branches of {told}, whose "
        f"parts nobody puts together; use mesh.{axis}=1"
      )
  if loss.share is not None:
    raise ValueError(
      f"loss.name={loss.name} couples all heads, and {told} has no link to the "
      "others; use loss.name=dce"
    )
  if transform.keep is not None:
    raise ValueError(
      "memory.selection=herding chooses by the features of each newest head, "
      f"and {told} has no link to the others; use memory.selection=stream"
    )


def scorer(run: run_lib.Run) -> Any:
  """The program that `scores` runs.

  Raises:
    ValueError: for a fixed network, which has no heads to put together.
  """
  if run.stream.fixed:
    raise ValueError(
      "stream.fixed=True has one head, and scores are kept of heads that are "
      "put together later; leave `scored` out"
    )
  return jax.jit(phases.class_scores(run))


def scores(
  run: run_lib.Run, state: programs.State, feed: inputs.Feed, program: Any
) -> np.ndarray:
  """Scores `[n, heads here, c]` of the test images of all classes seen.

  Images are in the order of `inputs.by_task`, and dealt to batches as `tally`
  deals them.

  Args:
    run, state, feed: as `evaluate` takes them.
    program: from `scorer`.
  """
  labels = run.dataset.test_labels
  order = inputs.by_task(run.stream, run.dataset)
  n = int(np.isin(labels, run.stream.seen(feed.phase.task)).sum())
  bank = phases.whole(run, state, feed.phase.task)
  batch = inputs.test_batch(run.mesh, run.recipe)
  count = -(-n // batch)
  table = np.empty((n, len(run.heads), run.stream.head_width), np.float32)
  for i in range(count):
    at = i + count * np.arange(batch)
    given = np.asarray(run.dataset.test_images[order[at % n]])
    out = program(bank, feed.task, sharding.replicated(given, run.mesh))
    there = at < n
    table[at[there]] = np.asarray(out)[there][:, list(run.heads)]
  return table


def tally(run: run_lib.Run, table: np.ndarray) -> metrics.Tally:
  """Counts of a test, from the scores of all heads.

  Args:
    run: for its stream and test set.
    table: `[n, heads, c]`, images as in `scores`.
  """
  labels = run.dataset.test_labels
  labels = labels[inputs.by_task(run.stream, run.dataset)][: len(table)]
  owners, columns = run.stream.head_of[labels], run.stream.column_of[labels]
  everyone = np.ones(len(table), bool)
  counts = scoring.count(table, owners, columns, everyone)
  return metrics.Tally(*map(np.asarray, counts))


def join(
  like: bank_lib.Bank, banks: Sequence[bank_lib.Bank], heads: Sequence[Any]
) -> bank_lib.Bank:
  """One bank of all heads.

  Args:
    like: a bank with an entry for each head, for its shapes and places.
    banks: of the processes.
    heads: of each process, the numbers of its heads.
  """

  def one(like, *parts):
    rows = np.array(like).reshape(-1, *like.shape[2:])
    for part, here in zip(parts, heads):
      rows[list(here)] = bank_lib.flatten(np.asarray(part))[: len(here)]
    return jax.device_put(rows.reshape(like.shape), like.sharding)

  return jax.tree.map(one, like, *banks)
