"""Checkpoints: asynchronous, checked, elastic. The only file with Orbax.

A save is a folder that appears whole or not at all, with the hash of each of
its files inside; several processes write one together. A restore checks them,
says what is damaged or of another run and goes back to the newest sound save.
An array that was saved in another shape comes back in that shape, for whoever
knows what the shape means.
"""

import contextlib
import errno
import hashlib
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mhil import manifest

# Bytes that a save takes beside its arrays, at most.
ROOM = 1 << 20


class Checkpoints:
  """Saves and restores `(state, progress)` under one folder.

  Args:
    folder: made if it is missing.
    every: steps between two saves inside a task; 0 saves after tasks only.
    keep: how many of the newest saves stay.
    writes: False leaves the folder as it is, whatever is in it.
    say: told, in one line, what was damaged.

  Raises:
    ValueError: if `folder` is a file, or if it may not be written and holds
      what Orbax cannot read.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    every: int = 0,
    keep: int = 3,
    writes: bool = True,
    say: Callable[[str], None] = print,
  ):
    self.every = every
    self._folder = pathlib.Path(folder).absolute()
    self._say, self._writes = say, writes
    self._writing: int | None = None
    self._check_folder()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=writes,
        read_only=not writes,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_manifest
        ),
      ),
    )

  def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
    """Saves in the background; the arrays may be overwritten on return.

    Raises:
      FloatingPointError: if a number is NaN or infinite; nothing is saved.
      OSError: if the disk is full; the saves before stay.
    """
    self._check_finite(step, state)
    if step in self._manager.all_steps():
      return
    self._wait()
    self._check_room(state)
    self._writing = step
    shapes = [list(x.shape) for x in jax.tree.leaves(state)]
    with _full_disk():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          progress=ocp.args.JsonSave({"progress": progress, "shapes": shapes}),
        ),
      )

  def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest sound save, laid out like `like`; None without one.

    Args:
      like: arrays, or their shapes with where they lie.

    Arrays that have another shape there come back as numpy arrays.

    Damaged saves, and those of another run, are named and set aside, so that
    their steps can be saved again.

    Raises:
      ValueError: if all are of another run; none is set aside.
    """
    self._wait()
    step = -1
    if jax.process_index() == 0:
      step = self._newest_sound()
    if jax.process_count() > 1:
      step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
      self._manager.reload()
    return None if step < 0 else self._read(step, like)

  def newest(self) -> int | None:
    """Step of the newest save; None without one."""
    self._wait()
    return self._manager.latest_step()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Waits until the last save is whole."""
    self._wait()
    self._manager.close()

  def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    restored = self._manager.restore(
      step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
    )
    shapes = restored["progress"]["shapes"]
    leaves, tree = jax.tree.flatten(like)
    if len(leaves) != len(shapes):
      raise ValueError(
        f"checkpoint {step} has {len(shapes)} arrays, and this run "
        f"{len(leaves)}; use the network, optimizer, objective and memory of "
        "the run that saved it"
      )
    wanted = [_abstract(x, tuple(s)) for x, s in zip(leaves, shapes)]
    state = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.unflatten(tree, wanted))
      ),
    )["state"]
    return state, restored["progress"]["progress"]

  def _check_folder(self) -> None:
    """Sets aside what Orbax, which reads every stamp, would stumble over."""
    if self._folder.exists() and not self._folder.is_dir():
      raise ValueError(
        f"{self._folder} is a file, and saves need a folder; move it away"
      )
    for step in manifest.unreadable(self._folder):
      if not self._writes:
        raise ValueError(
          f"{self._folder / str(step) / manifest.STAMP} is damaged; remove it, "
          "nothing that it holds is needed"
        )
      if jax.process_index() == 0:
        self._set_aside(step)
        self._say(
          f"checkpoint {step} is damaged ({manifest.STAMP} was changed); it is "
          "set aside"
        )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoints")

  def _newest_sound(self) -> int:
    """The step to go back to, or -1; damaged saves are set aside."""
    run = manifest.run_of(self._folder)
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step, before in zip(steps, [*steps[1:], None]):
      try:
        save = self._folder / str(step)
        manifest.check(save, step, run, _hashes(save))
      except (OSError, ValueError) as error:
        if self._writes:
          self._set_aside(step)
          self._manager.reload()
        fix = "the start" if before is None else f"checkpoint {before}"
        self._say(
          f"checkpoint {step} is damaged ({error}); going back to {fix}"
        )
      else:
        return step
    return -1

  def _wait(self) -> None:
    with _full_disk():
      self._manager.wait_until_finished()

  def _check_room(self, state: Any) -> None:
    # Found out in the middle of a save, it is told by a thread of Orbax.
    size = ROOM + sum(x.nbytes for x in jax.tree.leaves(state))
    free = shutil.disk_usage(self._folder).free
    if size > free:
      told = f"a save takes up to {size:,} bytes, {free:,} are free"
      raise OSError(errno.ENOSPC, told)

  def _check_finite(self, step: int, state: Any) -> None:
    # The loss of a step is taken before its update, which may be what fails.
    # What the host holds are samples, not results.
    found = [
      (path, leaf)
      for path, leaf in jax.tree.leaves_with_path(state)
      if isinstance(leaf, jax.Array)
    ]
    finite = _finite_of([leaf for _, leaf in found])
    for (path, leaf), good in zip(found, finite):
      if not good:
        last = self.newest()
        where = "none was saved" if last is None else f"step {last}"
        raise FloatingPointError(
          f"{_place(path, leaf)} became NaN or infinite by step {step}; last "
          f"good checkpoint: {where}; lower optimizer.learning_rate or look "
          "at the data"
        )

  def _set_aside(self, step: int) -> None:
    aside = self._folder / f"{step}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    (self._folder / str(step)).rename(aside)

  def _write_manifest(self) -> None:
    # Everything is written; the folder gets its final name right after this.
    (folder,) = self._folder.glob(f"{self._writing}.orbax-checkpoint-tmp*")
    assert self._writing is not None
    manifest.write(folder, self._writing, _hashes(folder))


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
  """Makes of what Orbax says of a full disk what the system says of it."""
  try:
    yield
  except ValueError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _hashes(folder: pathlib.Path) -> dict[str, str]:
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name not in (manifest.MANIFEST, manifest.STAMP)
  }


def _finite_of(leaves: list[jax.Array]) -> list[bool]:
  """Whether each is finite; stages of a branch lie on devices of their own."""
  places = [frozenset(leaf.sharding.device_set) for leaf in leaves]
  good = [True] * len(leaves)
  for place in dict.fromkeys(places):
    here = [i for i, other in enumerate(places) if other == place]
    found = jax.device_get(_finite([leaves[i] for i in here]))
    for i, finite in zip(here, found):
      good[i] = bool(finite)
  return good


@jax.jit
def _finite(tree: Any) -> Any:
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def _place(path: Any, leaf: jax.Array) -> str:
  """Name of an array with a bad number, and of the first head that has it."""
  if not leaf.is_fully_addressable:
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  rows = np.asarray(leaf).reshape(math.prod(leaf.shape[:2]), -1)
  bad = ~np.isfinite(rows).all(1)
  name = jax.tree_util.keystr(path, simple=True, separator=".")
  return f"{name} of head {bad.argmax()}" if leaf.ndim > 1 else name


def _abstract(like: Any, shape: tuple[int, ...]) -> Any:
  # No device need have room for all of what several held.
  if shape != like.shape or isinstance(like, np.ndarray):
    return np.empty(shape, like.dtype)
  return jax.ShapeDtypeStruct(shape, like.dtype, sharding=like.sharding)
