"""What an image set's meta.json says: normalisation and augmentation."""

import json
import pathlib
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

EXAMPLE = '{"scale": 255, "mean": [0.5], "std": [0.25], "pad": 4, "flip": true}'


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the fields that the file has, of `scale, mean, std, pad, flip`.

  Args:
    path: of the file.

  Raises:
    ValueError: one line that names file and field.
  """
  try:
    meta = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    told = " ".join(str(error).split())
    raise ValueError(
      f"{path} cannot be read ({told}); write for instance {EXAMPLE}"
    ) from None
  if not isinstance(meta, dict):
    raise ValueError(f"{path} holds no fields; write for instance {EXAMPLE}")
  for field, value in meta.items():
    if field not in FIELDS:
      raise ValueError(
        f"{path} holds {field!r}; it may hold {', '.join(FIELDS)}"
      )
    fits, kind = FIELDS[field]
    if not fits(value):
      raise ValueError(
        f"{path}: {field}={reprlib.repr(value)} is not {kind}; write for "
        f"instance {EXAMPLE}"
      )
  if ("mean" in meta) != ("std" in meta):
    raise ValueError(
      f"{path} has one of mean and std, which go together; write for instance "
      f"{EXAMPLE}"
    )
  return {field: _plain(value) for field, value in meta.items()}


def _number(value: Any) -> bool:
  # Inputs are of float32, and so is what they are divided by.
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  return abs(value) <= float(np.finfo(np.float32).max)


def _positive(value: Any) -> bool:
  return _number(value) and value >= float(np.finfo(np.float32).tiny)


def _numbers(value: Any) -> bool:
  return isinstance(value, list) and all(map(_number, value))


def _positives(value: Any) -> bool:
  return isinstance(value, list) and all(map(_positive, value))


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _switch(value: Any) -> bool:
  return isinstance(value, bool)


# What each must be, and how that is said.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
  "scale": (_positive, "a positive number of float32"),
  "mean": (_numbers, "a list of numbers of float32"),
  "std": (_positives, "a list of positive numbers of float32"),
  "pad": (_whole, "a whole number"),
  "flip": (_switch, "true or false"),
}


def _plain(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(float(x) for x in value)
  return float(value) if isinstance(value, float) else value
