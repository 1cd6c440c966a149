"""Flags and user mistakes, alike for every program: one line, exit 2."""

import contextlib
import difflib
import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from mhil import config as config_lib

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


class UserError(Exception):
  """A mistake in what the user asked for; its text is all they need."""


def run(main: Callable[[], None]) -> None:
  """Runs a program; a user's mistake ends in one line and status 2."""
  logging.set_verbosity(logging.ERROR)
  try:
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)
  except KeyboardInterrupt:
    sys.exit("interrupted")


@contextlib.contextmanager
def checking():
  """Turns the errors of checks, made before training, into `UserError`."""
  try:
    yield
  except (ValueError, RuntimeError) as error:
    raise UserError(str(error)) from error


def define_config() -> None:
  """Defines `--config=FILE` and `--config.FIELD=VALUE`.

  Raises:
    UserError: for a missing file or an unknown field, with the nearest one.
  """
  if "config" in flags.FLAGS:
    return
  path = config_file()
  _check_fields(sys.argv)
  try:
    config_flags.DEFINE_config_file(
      "config", str(path), "File in configs/; override with --config.FIELD=."
    )
  except (ValueError, TypeError, flags.Error) as error:
    raise UserError(_one_line(error)) from None


def load_config(path: str | os.PathLike[str]) -> config_lib.Config:
  """The configuration that a file in `configs/` returns."""
  scope: dict = {}
  source = pathlib.Path(path).read_text(encoding="utf-8")
  exec(compile(source, str(path), "exec"), scope)
  return scope["get_config"]()


def _parse(argv: list[str]) -> list[str]:
  try:
    define_config()
    rest = flags.FLAGS(argv)
  except UserError as error:
    _fail(error)
  except flags.UnrecognizedFlagError as error:
    _fail(f"{_one_line(error)}; see --help")
  except (flags.Error, OSError, ValueError, TypeError) as error:
    _fail(_one_line(error))
  if len(rest) > 1:
    _fail(f"{rest[1]!r} is not a flag; write --NAME=VALUE, see --help")
  return rest


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
  del argv
  try:
    main()
  except UserError as error:
    _fail(error)


def _fail(message: object) -> None:
  print(f"error: {_one_line(message)}", file=sys.stderr)
  sys.exit(2)


def _one_line(message: object) -> str:
  return " ".join(str(message).split())


def config_file() -> pathlib.Path:
  """The file that `--config` names; it must exist before flags are read."""
  path, argv = CONFIGS / "digits.py", sys.argv
  for word, following in zip(argv, [*argv[1:], ""]):
    name, equals, value = word.lstrip("-").partition("=")
    if name == "config" and word.startswith("-"):
      path = pathlib.Path(value if equals else following)
  if not path.is_file():
    known = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem[0] != "_")
    raise UserError(
      f"--config={path} is not a file; use configs/NAME.py with NAME one of "
      + ", ".join(known)
    )
  return path


def _check_fields(argv: list[str]) -> None:
  known = config_lib.flatten(config_lib.to_dict(config_lib.Config()))
  for word in argv[1:]:
    if not word.startswith(("--config.", "-config.")):
      continue
    field, _, value = word.lstrip("-").removeprefix("config.").partition("=")
    if field not in known:
      near = difflib.get_close_matches(field, known, 1, 0.4) or ["mesh.head"]
      raise UserError(
        f"{field}={value} is not a field of the configuration; did you mean "
        f"--config.{near[0]}={value or 'VALUE'}?"
      )
