"""What a save says of itself: its step, its run, the hash of each file.

Beside the saves of a run lies its mark, drawn once; every save repeats it, so
that one of another run is noticed. The mark goes along when the folder is
copied or moved, and when the run goes on with more tasks or on another mesh.
"""

import json
import pathlib
import secrets
from typing import Any

MANIFEST = "manifest.json"
MARK = "ID"
# Orbax writes the time of the commit into it after the hashes are taken.
STAMP = "_CHECKPOINT_METADATA"


def write(save: pathlib.Path, step: int, hashes: dict[str, str]) -> None:
  """Writes the manifest of a save, and its run's mark before the first.

  Args:
    save: the folder of the save, in that of its run.
    step: of the save.
    hashes: of its files.
  """
  path = save.parent / MARK
  run = run_of(save.parent) or secrets.token_hex(16)
  if not path.is_file() or not path.read_bytes():
    # All of it or nothing: a run that is killed here has no save yet.
    draft = path.with_name(f".{MARK}.draft")
    draft.write_text(run + "\n")
    draft.replace(path)
  told = {"step": step, "run": run, "sha256": hashes}
  (save / MANIFEST).write_text(json.dumps(told, indent=1))


def check(
  save: pathlib.Path, step: int, run: str | None, hashes: dict[str, str]
) -> None:
  """Raises ValueError unless a save is whole and of this step and run.

  Args:
    save: the folder of the save.
    step: that its name says.
    run: the mark of its run; saves older than marks have none.
    hashes: of the files that are there.
  """
  if not (save / MANIFEST).is_file():
    raise ValueError(f"{MANIFEST} was removed")
  told = _object(save / MANIFEST)
  if (of := told.get("step", step)) != step:
    raise ValueError(f"it is that of step {of}")
  if told.get("run", run) != run:
    raise ValueError("it is of another run")
  listed = told.get("sha256")
  if not isinstance(listed, dict) or not listed:
    raise ValueError(f"{MANIFEST} lists no files")
  for name, digest in listed.items():
    if hashes.get(name) != digest:
      raise ValueError(
        f"{name} was {'changed' if name in hashes else 'removed'}"
      )
  for name in hashes.keys() - listed.keys():
    # Beside its parts Orbax says of a save that it is whole, later.
    if "/" in name:
      raise ValueError(f"{name} is not in {MANIFEST}")


def run_of(folder: pathlib.Path) -> str | None:
  """The mark of the run whose saves a folder holds; None before the first.

  A mark that is lost is that of the oldest save.

  Raises:
    ValueError: if no save has the run's mark, but that of another.
  """
  path = folder / MARK
  mark = path.read_text(errors="replace").strip() if path.is_file() else ""
  marks = _marks(folder)
  if mark and marks and mark not in marks:
    raise ValueError(
      f"{folder} holds saves of another run and none of its own; bring these "
      f"back, or remove {path} to go on with what is there"
    )
  return mark or next(iter(marks), None)


def unreadable(folder: pathlib.Path) -> list[int]:
  """Steps of the saves whose stamp Orbax would not understand."""
  found = []
  for step, save in _saves(folder):
    try:
      if (save / STAMP).exists():
        _object(save / STAMP)
    except (OSError, ValueError):
      found.append(step)
  return found


def _marks(folder: pathlib.Path) -> list[str]:
  """Marks of the saves that have one, the oldest first."""
  found = []
  for _, save in _saves(folder):
    try:
      found.append(_object(save / MANIFEST).get("run"))
    except (OSError, ValueError):
      continue  # It is damaged, or a save that is being removed.
  return [mark for mark in found if isinstance(mark, str)]


def _saves(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
  return sorted(
    (int(save.name), save) for save in folder.glob("*") if save.name.isdecimal()
  )


def _object(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text())
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise ValueError(f"{path.name} was changed")
  return found
