"""Flags and user mistakes, alike for every program: one line, exit 2."""

import contextlib
import difflib
import dis
import os
import pathlib
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from mhil import config as config_lib
from mhil import limits, trainer

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
OURS = {pathlib.Path(m).resolve().parent for m in (__file__, trainer.__file__)}
HELP = "-h", "-help", "--help", "--helpshort", "--helpfull"


class UserError(Exception):
  """A mistake in what the user asked for; its text is all they need."""


class Stopped(Exception):
  """A signal came; its text, if any, says how to go on."""


def run(main: Callable[[], None], *, config: bool = False) -> None:
  """Runs a program; a user's mistake ends in one line and status 2.

  A run that diverged ends in one line and status 1, and one that a signal
  stopped with status 75: a scheduler is to start it again. What nobody foresaw
  shows its traceback.
  """
  logging.set_verbosity(logging.ERROR)
  try:
    app.run(
      lambda argv: _guarded(main),
      flags_parser=lambda argv: _parse(argv, config),
    )
  except KeyboardInterrupt:
    _fail("interrupted", 130)


@contextlib.contextmanager
def checking():
  """Turns errors that our own checks raise into `UserError`."""
  try:
    yield
  except (ValueError, RuntimeError) as error:
    if _no_room(error):
      raise UserError(
        f"the devices have no room for this run ({_line(error)}); use smaller "
        "network.widths=, train.batch= or memory.size=, or more of mesh.head="
      ) from error
    if isinstance(error, trainer.Diverged) or not _is_check(error):
      raise
    raise UserError(str(error)) from error


@contextlib.contextmanager
def writing(flag: str, place: pathlib.Path) -> Iterator[None]:
  """Turns what the system says of a place into a line that names its flag.

  Raises:
    UserError: if it cannot be written.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f"--{flag}={place} cannot be written ({error.strerror or error}); name "
      "another place"
    ) from None


def define_config() -> None:
  """Defines `--config=FILE` and `--config.FIELD=VALUE`.

  Raises:
    UserError: for a file that is missing or broken, or an unknown field.
  """
  if "config" in flags.FLAGS:
    return
  path = config_file()
  _check_fields(sys.argv)
  # The flag's own errors are of many kinds and many lines; ours come first.
  load_config(path)
  config_flags.DEFINE_config_file(
    "config", str(path), "File in configs/; override with --config.FIELD=."
  )


def load_config(path: str | os.PathLike[str]) -> config_lib.Config:
  """The configuration that a file in `configs/` returns.

  Raises:
    UserError: if the file is broken; names the line.
  """
  scope: dict[str, Any] = {"__name__": "config", "__file__": str(path)}
  try:
    source = pathlib.Path(path).read_text(encoding="utf-8")
    exec(compile(source, str(path), "exec"), scope)
    config = scope["get_config"]() if "get_config" in scope else None
  except Exception as error:  # Whatever the file does is the user's.
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == str(path)
    ]
    line = [getattr(error, "lineno", None), *lines][-1]
    where = f" at line {line}" if line else ""
    raise UserError(
      f"--config={path} fails{where} ({type(error).__name__}: {error}); "
      "correct the file"
    ) from None
  if not isinstance(config, config_lib.Config):
    found = f"get_config() returns {type(config).__name__}"
    raise UserError(
      f"--config={path}: {found if 'get_config' in scope else 'no get_config'}"
      "; define get_config() and return a mhil.config.Config from it"
    )
  return config


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


def override(field: str, value: Any) -> str:
  """The flag, as a shell takes it, that gives a field this value."""
  if isinstance(value, (tuple, list)):
    value = "".join(f"{x}," for x in value) or "()"
  if isinstance(value, bool):
    value = str(value).lower()
  return f"--config.{field}={shlex.quote(str(value))}"


def _parse(argv: list[str], config: bool) -> list[str]:
  try:
    if config:
      define_config()
    if any(word in HELP for word in argv[1:]):
      print(_help(config))
      sys.exit(0)
    rest = flags.FLAGS(argv)
  except UserError as error:
    _fail(error)
  except flags.IllegalFlagValueError as error:
    _fail(_wrong_value(str(error)))
  except config_flags.FlagOrderError as error:
    _fail(f"{error}; write --config=FILE first")
  except (flags.Error, OSError, ValueError, TypeError) as error:
    _fail(f"{error}; see --help")
  if len(rest) > 1:
    _fail(f"{rest[1]!r} is not a flag; write --NAME=VALUE, see --help")
  return rest


def _guarded(main: Callable[[], None]) -> None:
  try:
    main()
  except UserError as error:
    _fail(error)
  except trainer.Diverged as error:
    _fail(error, 1)
  except Stopped as stopped:
    if how := str(stopped):
      print(how)
    sys.exit(os.EX_TEMPFAIL)


def _fail(message: object, status: int = 2) -> NoReturn:
  print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
  sys.exit(status)


def _no_room(error: Exception) -> bool:
  # How much a program takes is known once it is compiled or runs.
  ours = isinstance(error, jax.errors.JaxRuntimeError)
  return ours and "Out of memory" in str(error)


def _line(error: Exception) -> str:
  """The first line of what a library says."""
  return str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _is_check(error: Exception) -> bool:
  # What a library raises, or an expression of ours sets off, is a bug.
  last = error.__traceback__
  while last is not None and last.tb_next:
    last = last.tb_next
  if last is None:
    return False
  code = last.tb_frame.f_code
  raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
  return raised and pathlib.Path(code.co_filename).resolve().parent in OURS


def _fields() -> dict[str, Any]:
  return config_lib.flatten(config_lib.to_dict(config_lib.Config()))


def _check_fields(argv: list[str]) -> None:
  known, given = _fields(), dict[str, str]()
  for word in argv[1:]:
    dashes, dot, rest = word.partition("config.")
    if dashes.removesuffix("no") not in ("-", "--") or not dot:
      continue
    field, _, value = rest.partition("=")
    if field not in known:
      near = difflib.get_close_matches(field, known, 1, 0.4) or ["mesh.head"]
      raise UserError(
        f"{field}={value} is not a field of the configuration; did you mean "
        f"--config.{near[0]}={value or 'VALUE'}?"
      )
    if field in given and isinstance(known[field], tuple):
      raise UserError(
        f"--config.{field} is given twice, as {given[field]} and {value}, "
        "which would be strung together; give it once"
      )
    given[field] = value


def _wrong_value(message: str) -> str:
  flag, _, _ = message.removeprefix("flag ").partition(": ")
  match = re.fullmatch(r"--config\.([\w.]+)=(.*)", flag, re.DOTALL)
  if match is None or match[1] not in _fields():
    return f"{flag} does not have that kind of value; see --help"
  field, value = match.groups()
  default = _fields()[field]
  return (
    f"{field}={value!r} is not {limits.KINDS[type(default)]}; use for "
    f"instance {override(field, default)}"
  )


def _help(config: bool) -> str:
  """The program's docstring, its flags and every field with its value."""
  main = sys.modules["__main__"]
  own = flags.FLAGS.get_key_flags_for_module(main)
  lines = [f"  --{f.name:<12} {f.help}" for f in own if f.name != "config"]
  if config:
    values = config_lib.flatten(config_lib.to_dict(load_config(config_file())))
    lines += [
      "  --config       File in configs/; these are its fields and values:",
      *(f"    {override(field, value)}" for field, value in values.items()),
    ]
  return "\n".join([(main.__doc__ or "").strip(), "\nFlags:", *lines])
