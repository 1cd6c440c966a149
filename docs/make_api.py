"""Writes docs/api.md from the docstrings of the public modules.

  python docs/make_api.py           writes the page
  python docs/make_api.py --check   fails if the page is not what it would write

Public are the modules that `mhil.__all__` names, and in them every function,
class and method without an underscore in front. The sources are read and not
imported, so the page depends on nothing that is installed.
"""

import argparse
import ast
import copy
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mhil"
PAGE = ROOT / "docs" / "api.md"
# What a run is made of; of the others the page has the first sentences only.
WHOLE = (
  "trainer",
  "data",
  "streams",
  "networks",
  "losses",
  "objectives",
  "recipe",
  "optimizers",
  "rehearsal",
  "local",
  "layer_parallel",
  "subnets",
  "sharding",
)
# More than this is no longer seen at a glance.
LONGEST = 120
HEAD = """# API

Made by `python docs/make_api.py` from the docstrings; edit those. Each module
is reached as `mhil.NAME` after `import mhil`. Letters in shapes are those of
the table in [mhil/__init__.py](../mhil/__init__.py).

[What a run is made of](#what-a-run-is-made-of) has its docstrings in full;
[the parts](#the-parts) have their first sentence, and `help(mhil.NAME)` has the
rest. A class is shown with its fields.
"""
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def page() -> str:
  """The whole page."""
  names = public_modules(source("__init__"))
  parts = [HEAD, "## What a run is made of", index(WHOLE)]
  parts += [section(name, source(name)) for name in WHOLE]
  rest = [name for name in names if name not in WHOLE]
  parts += ["## The parts", index(rest)]
  parts += [glance(name, source(name)) for name in rest]
  return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def source(name: str) -> str:
  """The text of a module."""
  return (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def public_modules(text: str) -> list[str]:
  """Names of modules in the `__all__` of a package."""
  for node in ast.parse(text).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__":
      names = ast.literal_eval(node.value)
      return [name for name in names if not name.startswith("_")]
  raise ValueError("mhil/__init__.py has no __all__; name the public modules")


def index(names: tuple[str, ...] | list[str]) -> str:
  """A line of links."""
  return ",\n".join(f"[{name}](#{name})" for name in names)


def definitions(body: list[ast.stmt]) -> Iterator[Definition]:
  """Public functions and classes of a module, or methods of a class."""
  for node in body:
    if isinstance(node, Definition) and not node.name.startswith("_"):
      yield node


def section(name: str, text: str) -> str:
  """A module with all that its public docstrings say."""
  tree = ast.parse(text)
  parts = [f"### {name}", first(tree)]
  for node in definitions(tree.body):
    told = [signature(node), "", ast.get_docstring(node) or ""]
    for method in methods(node):
      told += ["", f".{signature(method)}", f"  {first(method)}"]
    # Verbatim: shapes and formulas would not survive as Markdown.
    block = "\n".join(told).rstrip()
    parts += [f"#### {name}.{node.name}", f"```text\n{block}\n```"]
  return "\n\n".join(parts)


def glance(name: str, text: str) -> str:
  """A module with the first sentence of each public docstring."""
  tree = ast.parse(text)
  lines = []
  for node in definitions(tree.body):
    called = signature(node)
    if len(called) > LONGEST:
      called = f"{node.name}(...)"
    lines.append(f"- `{called}`: {first(node)}")
  return f"### {name}\n\n{first(tree)}\n\n" + "\n".join(lines)


def first(node: ast.Module | Definition) -> str:
  """The first paragraph of a docstring, on one line."""
  told = ast.get_docstring(node) or ""
  return " ".join(told.partition("\n\n")[0].split())


def methods(node: Definition) -> list[Definition]:
  """Public methods, and how an object is called."""
  if not isinstance(node, ast.ClassDef):
    return []
  call = [
    x for x in node.body if isinstance(x, FUNCTION) and x.name == "__call__"
  ]
  return [*call, *definitions(node.body)]


def signature(node: Definition) -> str:
  """Names and defaults of the arguments on one line; types are in the source.

  A class has its fields, or what makes it.
  """
  if isinstance(node, FUNCTION):
    if any(ast.unparse(x) == "property" for x in node.decorator_list):
      return node.name
    back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({_arguments(node.args)}){back}"
  for made in node.body:
    if isinstance(made, FUNCTION) and made.name == "__init__":
      return f"{node.name}({_arguments(made.args)})"
  fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
  return f"{node.name}({', '.join(map(_field, fields))})"


def _field(field: ast.AnnAssign) -> str:
  name = ast.unparse(field.target)
  return f"{name}={ast.unparse(field.value)}" if field.value else name


def _arguments(given: ast.arguments) -> str:
  given = copy.deepcopy(given)
  own = [*given.posonlyargs, *given.args, *given.kwonlyargs]
  for argument in [*own, given.vararg, given.kwarg]:
    if argument is not None:
      argument.annotation = None
  given.args = [x for x in given.args if x.arg not in ("self", "cls")]
  return ast.unparse(given)


def main() -> None:
  """Writes the page, or says that it is old."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--check", action="store_true", help="write nothing")
  if not parser.parse_args().check:
    PAGE.write_text(page(), encoding="utf-8")
  elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
    raise SystemExit("docs/api.md is old; run python docs/make_api.py")


if __name__ == "__main__":
  main()
