"""What the pages under docs/ show runs, prints what they say, and is whole."""

import ast
import dataclasses
import inspect
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

import mhil
from mhil import config, limits

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = runpy.run_path(str(DOCS / "make_api.py"))
RUN = [DOCS / "concepts.md", *sorted((DOCS / "how-to").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
  """Fenced blocks of one language, in order."""
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.M)


def same_output(told: str, printed: str, apart: float = 0.05) -> bool:
  """Whether two texts agree, but for line breaks and a little in decimals.

  Accuracies of tiny sets differ by a few samples between platforms, whose
  sums are in another order.
  """
  told, printed = told.split(), printed.split()
  return len(told) == len(printed) and all(
    a == b or close(a, b, apart) for a, b in zip(told, printed)
  )


def close(a: str, b: str, apart: float) -> bool:
  decimal = r"-?\d+\.\d+"
  if not re.search(decimal, a) or re.sub(decimal, "", a) != re.sub(
    decimal, "", b
  ):
    return False
  numbers = zip(re.findall(decimal, a), re.findall(decimal, b))
  return all(abs(float(x) - float(y)) <= apart for x, y in numbers)


@pytest.mark.parametrize(
  ("told", "printed", "same"),
  [
    ("a line\nof words", "a line of\nwords", True),
    ("accuracy 0.93,", "accuracy 0.95,", True),
    ("accuracy 0.93,", "accuracy 0.85,", False),
    ("accuracy 0.93,", "accuracy 0.93", False),
    ("3 heads", "4 heads", False),
    ("3 heads", "3 heads more", False),
    ("1,280 bytes", "1,281 bytes", False),
    ("nothing", "0.9", False),
    ("0.9", "nothing", False),
  ],
)
def test_outputs_are_held_against_the_text(told, printed, same):
  assert same_output(told, printed) == same


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_says(page, tmp_path):
  text = page.read_text(encoding="utf-8")
  code, told = blocks(text, "python"), blocks(text, "text")
  assert code and told
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  # From an empty folder, but with this mhil even if another is installed.
  env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", "\n".join(code)],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert same_output("".join(told), done.stdout), done.stdout


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_code_of_a_page_is_in_order(page):
  """Every output follows code; names of commands and fields exist."""
  text = page.read_text(encoding="utf-8")
  kinds = re.findall(r"^```(\w+)$", text, re.M)
  assert set(kinds) <= {"python", "text", "sh"}
  assert all(
    kinds[i - 1] == "python" for i, k in enumerate(kinds) if k == "text"
  )
  known = config.flatten(dataclasses.asdict(config.Config()))
  for field in re.findall(r"--config\.([a-z_.]+)=", text):
    assert field in known
  for path in re.findall(r"--config=(\S+)", text):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
  ("page", "field"), [("network", "network.name"), ("objective", None)]
)
def test_places_that_a_page_names_are_where_choices_are(page, field):
  text = (DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8")
  assert (field or "objective.name") in limits.CHOICES
  build = ast.parse((ROOT / "experiments" / "build.py").read_text())
  functions = {n.name for n in build.body if isinstance(n, ast.FunctionDef)}
  named = re.findall(r"`(make_\w+)` of\n?\s*\[experiments/build.py\]", text)
  assert named and set(named) <= functions


def test_every_fault_names_tests_that_there_are():
  rows = re.findall(r"^\| (.*) \|$", (DOCS / "faults.md").read_text(), re.M)[2:]
  assert len(rows) > 15
  for row in rows:
    tests = row.rsplit(" | ", 1)[1]
    files = re.findall(r"`(test_\w+)`", tests)
    assert files, row
    for file, names in re.findall(r"`(test_\w+)`:([^;]*)", tests):
      text = (ROOT / "tests" / f"{file}.py").read_text()
      found = re.findall(r"^ *def (test_\w+)", text, re.MULTILINE)
      for name in re.findall(r"`(\w+)`", names):
        assert any(name in test for test in found), (file, name)
    for file in files:
      assert (ROOT / "tests" / f"{file}.py").is_file(), file


class TestIndex:
  text = (DOCS / "README.md").read_text(encoding="utf-8")

  def test_every_page_is_linked(self):
    linked = {
      (DOCS / target).resolve()
      for target in re.findall(r"\]\(([^)#]+)\)", self.text)
    }
    pages = [p for p in DOCS.rglob("*.md") if p.parent.name != "results"]
    missing = {p for p in pages if p.resolve() not in linked}
    assert missing == {DOCS / "README.md"}

  def test_the_front_page_leads_here(self):
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/README.md)" in front

  def test_what_is_unknown_of_every_paper_is_told(self):
    text = (DOCS / "unknown.md").read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.M)[1:]
    methods = sorted((DOCS / "methods").glob("*.md"))
    assert len(parts) == len(methods) + 1
    for part, method in zip(parts, methods):
      assert f"](methods/{method.name})" in part
      assert part.count("\n- ") >= 2


class TestApi:
  names = API["public_modules"](API["source"]("__init__"))

  def test_the_page_is_up_to_date(self):
    page = API["page"]()
    assert (DOCS / "api.md").read_text(encoding="utf-8") == page, (
      "run python docs/make_api.py"
    )

  def test_public_modules_are_those_that_the_package_names(self):
    assert ["__version__", *self.names] == mhil.__all__
    assert sorted(self.names) == self.names
    for name in self.names:
      assert getattr(mhil, name).__name__ == f"mhil.{name}"

  @pytest.mark.parametrize("name", names)
  def test_every_public_symbol_is_documented(self, name):
    assert not undocumented(name, API["source"](name))

  @pytest.mark.parametrize("name", names)
  def test_every_public_symbol_is_on_the_page(self, name):
    _, _, rest = API["page"]().partition(f"\n### {name}\n")
    text = rest.partition("\n### ")[0].partition("\n## ")[0]
    whole = name in API["WHOLE"]
    line = rf"^#### {name}\.(\w+)$" if whole else r"^- `(\w+)\("
    shown = re.findall(line, text, re.M)
    module = vars(getattr(mhil, name))
    own = {
      key
      for key, value in module.items()
      if getattr(value, "__module__", None) == f"mhil.{name}"
      and isinstance(value, type(undocumented) | type)
      and not key.startswith("_")
    }
    assert own and set(shown) == own and len(shown) == len(own)

  @pytest.mark.parametrize("name", API["WHOLE"])
  def test_docstrings_of_a_whole_module_are_on_the_page(self, name):
    page = API["page"]()
    for key, value in vars(getattr(mhil, name)).items():
      own = getattr(value, "__module__", None) == f"mhil.{name}"
      if own and inspect.isfunction(value) and not key.startswith("_"):
        assert inspect.getdoc(value) in page, key

  def test_links_of_the_page_lead_somewhere(self):
    page = API["page"]()
    titles = re.findall(r"^#+ (.+)$", page, re.M)
    places = {title.lower().replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert {*self.names} <= {*links} <= places

  @pytest.mark.parametrize("name", names)
  def test_args_name_every_argument(self, name):
    for node in API["definitions"](ast.parse(API["source"](name)).body):
      told = ast.get_docstring(node)
      if isinstance(node, ast.FunctionDef) and "\nArgs:\n" in told:
        given = [*node.args.args, *node.args.kwonlyargs]
        assert not [x.arg for x in given if x.arg not in told], node.name


def undocumented(name: str, text: str) -> list[str]:
  """Public symbols of a module that have no docstring."""
  tree = ast.parse(text)
  found = [] if ast.get_docstring(tree) else [name]
  for node in API["definitions"](tree.body):
    found += [] if ast.get_docstring(node) else [f"{name}.{node.name}"]
    if isinstance(node, ast.ClassDef):
      for method in API["definitions"](node.body):
        if not ast.get_docstring(method):
          found.append(f"{name}.{node.name}.{method.name}")
  return found


SOURCE = '''"""First line.

More of it.
"""
P = 1


@decorated(
  1
)
def public(a: int, *rest, b="x", **more: int) -> int:
  """Does one thing
  or two.

  Args:
    a: number.
  """
  return a  # unseen


def bare(a):
  return a


def _private():
  """Hidden."""


class Kind(NamedTuple):
  """Is.

  Attributes:
    x: number.
  """

  x: int
  y: int = 2

  def method(self, z: int) -> int:
    """Gives."""
    return self.x

  @property
  def most(self) -> int:
    """Tells."""

  def _own(self):
    """Hidden."""


class Module:
  """Holds."""

  def __init__(self, size: int, *, rngs: Any):
    self.size = size

  def __call__(self, x):
    """Runs."""
'''
SECTION = """### some

First line.

#### some.public

```text
public(a, *rest, b='x', **more) -> int

Does one thing
or two.

Args:
  a: number.
```

#### some.bare

```text
bare(a)
```

#### some.Kind

```text
Kind(x, y=2)

Is.

Attributes:
  x: number.

.method(z) -> int
  Gives.

.most
  Tells.
```

#### some.Module

```text
Module(size, *, rngs)

Holds.

.__call__(x)
  Runs.
```"""
GLANCE = """### some

First line.

- `public(a, *rest, b='x', **more) -> int`: Does one thing or two.
- `bare(a)`: 
- `Kind(x, y=2)`: Is.
- `Module(size, *, rngs)`: Holds."""


class TestMaker:
  def test_a_section(self):
    assert API["section"]("some", SOURCE) == SECTION

  def test_a_glance(self):
    assert API["glance"]("some", SOURCE) == GLANCE

  def test_what_is_long_is_left_out_of_a_glance(self):
    text = f'def f({", ".join("abcdefgh")}): "Is."'
    assert "- `f(a, b, c, d, e, f, g, h)`: Is." in API["glance"]("some", text)
    names = ", ".join(f"argument{i}" for i in range(20))
    long = f'def f({names}): "Is."'
    assert API["glance"]("some", long).endswith("- `f(...)`: Is.")
    assert names in API["section"]("some", long)

  def test_what_lacks_a_docstring_is_found(self):
    assert undocumented("some", SOURCE) == ["some.bare"]
    assert undocumented("m", "class A:\n  def f(self): ...") == [
      "m",
      "m.A",
      "m.A.f",
    ]

  def test_a_package_without_names_is_refused(self):
    with pytest.raises(ValueError, match="name the public modules"):
      API["public_modules"]("x = 1")

  def test_it_writes_the_page_and_finds_an_old_one(self, tmp_path):
    """As a program, in a copy of the project."""
    names = ("__init__", *TestApi.names)
    for name in ("docs/make_api.py", *(f"mhil/{n}.py" for n in names)):
      target = tmp_path / name
      target.parent.mkdir(exist_ok=True)
      target.write_text((ROOT / name).read_text(encoding="utf-8"))
    page = tmp_path / "docs" / "api.md"

    def run(*flags):
      program = [sys.executable, tmp_path / "docs" / "make_api.py", *flags]
      return subprocess.run(
        program, capture_output=True, text=True, check=False
      )

    assert run("--check").returncode == 1 and not page.exists()
    assert run().returncode == 0
    assert page.read_text(encoding="utf-8") == API["page"]()
    assert run("--check").returncode == 0
    page.write_text(API["page"]() + "more", encoding="utf-8")
    old = run("--check")
    assert old.returncode == 1 and "run python docs/make_api.py" in old.stderr
    assert page.read_text(encoding="utf-8").endswith("more")
