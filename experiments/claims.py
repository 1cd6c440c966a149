"""Whose a run's folder is: one run's at a time, with one configuration."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

from experiments import build, cli, longer
from mhil import config as config_lib

# Bytes that figures, report and events take at least.
LEAST = 4 << 20
CONFIG, DATA, METRICS = "config.json", "data.sha256", "metrics.json"


@contextlib.contextmanager
def claimed(
  folder: pathlib.Path,
  config: config_lib.Config,
  resume: bool,
  fingerprint: str,
  parts: build.Parts,
) -> Iterator[None]:
  """Makes the folder this run's own, and keeps others out while it is at work.

  Args:
    folder: the work directory.
    config, parts: of the run.
    resume: go on with the run that the folder holds, or a longer one.
    fingerprint: of its data.

  Raises:
    UserError: if it cannot be written, holds another run, or is in use.
  """
  # Of a longer run the samples of the shorter one are hashed once.
  begins = functools.cache(functools.partial(longer.begins, parts.dataset))
  given = folder, config, resume, fingerprint, parts, begins
  with cli.writing("workdir", folder):
    _check(*given)
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
  try:
    # The system lets go of it after a kill.
    _lock(folder, place)
    with cli.writing("workdir", folder):
      # Another may have come and gone in between.
      began = _check(*given)
      before = longer.before(folder, began, parts)
      if before:
        (folder / METRICS).unlink(missing_ok=True)
      # First, for it says what the others were, until something is learnt.
      replace(
        folder / longer.STREAM, longer.told(parts, fingerprint, began, before)
      )
      replace(folder / DATA, fingerprint + "\n")
      replace(folder / CONFIG, config_lib.to_json(config))
    if before:
      count, known = len(parts.stream.tasks), len(before["tasks"])
      print(f"stream: {count} tasks, of which {known} were there before")
    yield
  finally:
    os.close(place)


def _check(folder, config, resume, fingerprint, parts, begins):
  if not (folder / CONFIG).exists():
    _check_empty(folder, resume)
    return None
  if not resume:
    raise cli.UserError(
      f"--workdir={folder} holds a run already; add --resume to go on with "
      "it, or name another folder"
    )
  began, there = longer.read(folder), parts.dataset.classes
  known = longer.classes(began["tasks"]) if began else there
  if there < known:
    raise cli.UserError(
      f"data.name={config.data.name} has {there} classes, the run in "
      f"--workdir={folder} {known}, and a stream only grows; bring the data "
      "back, or name another folder"
    )
  old = began.get("config") if began else None
  if there > known:
    check_same(folder, config, but=longer.FIELDS, text=old)
    longer.check(folder, began, config, parts, begins)
    return began
  check_same(folder, config, text=old)
  check_data(folder, fingerprint, began=old and began["data_sha256"])
  if began:
    longer.check_plain(folder, began, config, parts)
  return began


def _check_empty(folder, resume):
  if resume:
    raise cli.UserError(
      f"--resume: --workdir={folder} holds no run; start one without --resume"
    )
  if (folder / "checkpoints").exists():
    raise cli.UserError(
      f"--workdir={folder} holds checkpoints, but no config.json that says "
      "of what; name another folder"
    )


def _lock(folder, place):
  try:
    fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise cli.UserError(
      f"--workdir={folder} is in use by another run; wait for its end, or name "
      "another folder. Several processes of one run need --coordinator"
    ) from None
  except OSError:
    pass  # Not every file system over a network can lock a folder.


def check_same(
  folder: pathlib.Path,
  config: config_lib.Config,
  but: Sequence[str] = (),
  text: str | None = None,
) -> None:
  """Raises `UserError` unless a folder's run has this configuration.

  Args:
    folder: the work directory.
    config: to be held against its own.
    but: fields that may differ.
    text: its own configuration; None for what the folder says.
  """
  path = folder / CONFIG
  try:
    old = config_lib.flatten(json.loads(text or path.read_text()))
  except (ValueError, AttributeError):
    raise cli.UserError(
      f"--resume: {path} is damaged; restore it, or name another folder"
    ) from None
  new = config_lib.flatten(json.loads(config_lib.to_json(config)))
  # A field that is younger than the run had its default.
  usual = json.loads(config_lib.to_json(config_lib.Config()))
  old = config_lib.flatten(usual) | old
  # A mesh may change: heads are dealt anew. What is between stages may not.
  for field in sorted(new.keys() | old.keys()):
    if field in ("mesh.data", "mesh.head", "mesh.subnet", *but):
      continue
    if old.get(field) != new.get(field):
      raise cli.UserError(
        f"--workdir={folder} holds a run with {field}={old.get(field)!r}, not "
        f"{new.get(field)!r}; use {cli.override(field, old.get(field))} or "
        "another folder"
      )


def check_data(
  folder: pathlib.Path,
  fingerprint: str,
  flag: str = "workdir",
  began: str | None = None,
) -> None:
  """Raises `UserError` if the data are not those that the run began with."""
  began = began or data_hash(folder, flag)
  if began != fingerprint:
    raise cli.UserError(
      f"--{flag}={folder} began with data {began[:12]}, not "
      f"{fingerprint[:12]}; bring them back, or name another folder"
    )


def data_hash(folder: pathlib.Path, flag: str = "workdir") -> str:
  """The hash of the data that a folder's run began with.

  Raises:
    UserError: if the folder has lost it.
  """
  path = folder / DATA
  if not path.exists():
    raise cli.UserError(
      f"--{flag}={folder} has lost {DATA}; restore it, or name another folder"
    )
  return path.read_text(errors="replace").strip()


@contextlib.contextmanager
def room(folder: pathlib.Path) -> Iterator[None]:
  """Turns a disk that is full, now or within, into one line.

  Raises:
    UserError: says what to do.
  """
  try:
    free = shutil.disk_usage(folder).free
    if free < LEAST:
      raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
      raise
    raise cli.UserError(
      f"--workdir={folder} has no room left ({error.strerror}); make room and "
      "go on with --resume"
    ) from None


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file, all of it or nothing."""
  # A reader, or a run after a kill, sees all of the text or none of it.
  draft = path.with_name(f".{path.name}.draft")
  draft.write_text(text)
  draft.rename(path)
