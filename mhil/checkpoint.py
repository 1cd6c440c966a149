"""Checkpoints: asynchronous, checked, elastic. The only file with Orbax.

A save is a folder that appears whole or not at all, with the hash of each of
its files inside. A restore checks them, says what is damaged and goes back to
the newest sound save. Arrays `[l, h, ...]` that were
saved on a mesh with another `head` axis are dealt anew, in order.
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

MANIFEST = "manifest.json"
# Orbax writes the time of the commit into it after the hashes are taken.
STAMP = "_CHECKPOINT_METADATA"


class Checkpoints:
  """Saves and restores `(state, progress)` under one folder.

  Args:
    folder: made if it is missing.
    every: steps between two saves inside a task; 0 saves after tasks only.
    keep: how many of the newest saves stay.
    say: told, in one line, what was damaged.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    every: int = 0,
    keep: int = 3,
    say: Callable[[str], None] = print,
  ):
    self.every = every
    self._folder = pathlib.Path(folder).absolute()
    self._say = say
    self._writing: int | None = None
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_manifest
        ),
      ),
    )

  def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
    """Saves in the background; the arrays may be overwritten on return."""
    if step in self._manager.all_steps():
      return
    self._manager.wait_until_finished()
    self._writing = step
    shapes = [list(x.shape) for x in jax.tree.leaves(state)]
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        progress=ocp.args.JsonSave({"progress": progress, "shapes": shapes}),
      ),
    )

  def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest sound save, laid out like `like`; None without one.

    Damaged saves are named and removed, so that their steps can be saved
    again.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        self._verify(step)
        return self._read(step, like)
      except Exception as error:  # Orbax has no common class for damage.
        why = (str(error) or type(error).__name__).splitlines()[0][:160]
        self._say(
          f"checkpoint {step} is damaged ({why}); going back to the one before"
        )
        shutil.rmtree(self._folder / str(step))
        self._manager.reload()
    return None

  def newest(self) -> int | None:
    """Step of the newest save; None without one."""
    self._manager.wait_until_finished()
    return self._manager.latest_step()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Waits until the last save is whole."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    restored = self._manager.restore(
      step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
    )
    shapes = restored["progress"]["shapes"]
    leaves, tree = jax.tree.flatten(like)
    wanted = [_abstract(x, tuple(s)) for x, s in zip(leaves, shapes)]
    state = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.unflatten(tree, wanted))
      ),
    )["state"]
    return jax.tree.map(_deal, state, like), restored["progress"]["progress"]

  def _write_manifest(self) -> None:
    # Everything is written; the folder gets its final name right after this.
    (folder,) = self._folder.glob(f"{self._writing}.orbax-checkpoint-tmp*")
    text = json.dumps({"sha256": _hashes(folder)}, indent=1)
    (folder / MANIFEST).write_text(text)

  def _verify(self, step: int) -> None:
    folder = self._folder / str(step)
    wanted = json.loads((folder / MANIFEST).read_text())["sha256"]
    found = _hashes(folder)
    for name, digest in wanted.items():
      if found.get(name) != digest:
        raise ValueError(
          f"{name} was {'changed' if name in found else 'removed'}"
        )


def _hashes(folder: pathlib.Path) -> dict[str, str]:
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name not in (MANIFEST, STAMP)
  }


def _abstract(like: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  sharding = like.sharding
  if shape != like.shape:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(shape, like.dtype, sharding=sharding)


def _deal(saved: jax.Array, like: jax.Array) -> jax.Array:
  """Rows of `[l, h, ...]` in another `[l', h', ...]`; new ones stay `like`."""
  if saved.shape == like.shape:
    return saved
  rows = np.array(like).reshape(-1, *like.shape[2:])
  old = np.asarray(saved).reshape(-1, *saved.shape[2:])
  n = min(len(rows), len(old))
  rows[:n] = old[:n]
  return jax.device_put(rows.reshape(like.shape), like.sharding)
