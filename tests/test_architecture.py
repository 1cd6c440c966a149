"""Who may import whom, and what no file may hold."""

import ast
import fnmatch
import graphlib
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("mhil", "experiments", "configs")

# A paper's own file gets its parts from below and knows no other paper.
PAPER = {
  "across",
  "bank",
  "layers",
  "losses",
  "manual",
  "networks",
  "objectives",
  "sharding",
}
# The loop knows no paper but the first, and neither files nor figures.
ENGINE = {
  "across",
  "alone",
  "assembly",
  "augment",
  "bank",
  "compiling",
  "data",
  "facts",
  "growing",
  "heads",
  "inputs",
  "herding",
  "losses",
  "measuring",
  "metrics",
  "networks",
  "objectives",
  "optimizers",
  "parting",
  "partitions",
  "phases",
  "pipeline",
  "plan",
  "prepare",
  "programs",
  "progress",
  "recipe",
  "run",
  "scoring",
  "served",
  "sharding",
  "stages",
  "streams",
  "transforms",
}
LAW = {
  "__init__": {"version"},
  "alone": ENGINE,
  "across": set(),
  "abreast": ENGINE
  | {"chain", "coupling", "guessing", "stage_programs", "stage_steps"},
  "assembly": ENGINE,
  "augment": set(),
  "auxnet": {"auxiliary", "chain", "layers", "networks", "pieces"},
  "bank": {"across", "manual", "sharding"},
  "blocks": PAPER | {"cutting", "partitions"},
  "auxiliary": {"layers", "objectives"},
  "buffer": {"across"},
  "chain": {"cuts", "networks"},
  "charts": set(),
  "checkpoint": {"manifest"},
  "choose": set(),
  "comparison": {"plots"},
  "compiling": set(),
  "config": set(),
  "connecting": {"processes", "relaying"},
  "convolution": {"manual"},
  "cutting": {"dealing"},
  "cuts": {"networks", "sharding"},
  "coupling": {"chain", "objectives"},
  "data": {"sharding", "sources"},
  "dealing": {"manual"},
  "drawing": {"buffer", "choose", "exchange"},
  "exchange": {"choose", "manual"},
  "facts": ENGINE,
  "frozen": {"layers", "networks"},
  "growing": ENGINE,
  "guessing": {"auxnet", "chain", "manual", "objectives"},
  "heads": PAPER,
  "herding": set(),
  "hosted": {"buffer", "drawing", "exchange", "populate", "transforms"},
  "inputs": ENGINE,
  "layer_parallel": PAPER | {"chain", "coupling", "guessing"},
  "layers": {"convolution", "manual"},
  "limits": set(),
  "local": PAPER | {"auxiliary", "cuts", "modules"},
  "losses": {"sharding"},
  "manifest": set(),
  "manual": set(),
  "measuring": ENGINE,
  "metrics": set(),
  "modules": {"auxiliary", "cuts", "networks", "pieces"},
  "moving": {"across", "buffer"},
  "counting": set(),
  "networks": {"counting", "layers", "pieces", "sharding"},
  "objectives": {"manual", "networks", "sharding"},
  "optimizers": set(),
  "parting": ENGINE,
  "partitions": {"across", "bank", "heads", "objectives"},
  "phases": ENGINE,
  "pieces": set(),
  "pipeline": {"sharding"},
  "plan": {"pipeline", "recipe", "streams"},
  "plots": set(),
  "populate": {"buffer", "choose"},
  "prepare": ENGINE,
  "probe": set(),
  "processes": set(),
  "programs": ENGINE,
  "progress": {"across", "metrics", "streams"},
  "recipe": {"optimizers"},
  "relay": ENGINE | {"staged"},
  "relaying": set(),
  "rehearsal": PAPER
  | {"buffer", "drawing", "exchange", "hosted", "moving", "populate"}
  | {"room", "transforms"},
  "report": {"charts", "report_learning", "version", "webpage"},
  "report_learning": {"charts", "metrics", "webpage"},
  "room": {"buffer"},
  "run": ENGINE,
  "scoring": ENGINE,
  "serving": ENGINE,
  "served": ENGINE,
  "sharding": {"across"},
  "settings": set(),
  "sources": {"settings"},
  "staged": ENGINE,
  "stages": {"across", "bank"},
  "stage_programs": ENGINE
  | {"chain", "coupling", "guessing", "manual", "staged"},
  "stage_steps": ENGINE | {"coupling"},
  "streams": {"sharding"},
  "subnets": PAPER | {"cutting", "partitions"},
  "trainer": ENGINE,
  "transforms": set(),
  "validation": {"config", "limits"},
  "version": set(),
  "webpage": set(),
}


def imports(source: str, package: str = "mhil") -> set[str]:
  """Dotted names of all that a module imports, wherever it does so."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        base = f"{package}.{base}".rstrip(".")
      found |= {f"{base}.{alias.name}" for alias in node.names}
  return found


def of_mhil(found: set[str]) -> set[str]:
  """Modules of mhil among imported names; `mhil` alone stands for all."""
  parts = [name.split(".") for name in found]
  return {(p[1:] or ["*"])[0] for p in parts if p[0] == "mhil"}


def modules(package: str) -> dict[str, str]:
  files = (ROOT / package).rglob("*.py")
  return {f.stem: f.read_text(encoding="utf-8") for f in files}


def project_files() -> list[pathlib.Path]:
  """All files that are not ignored; there may be no git to ask."""
  ignored = (ROOT / ".gitignore").read_text().split()
  ignored = [".git", *(pattern.rstrip("/") for pattern in ignored)]

  def walk(folder):
    for path in sorted(folder.iterdir()):
      if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
        continue
      if path.is_dir():
        yield from walk(path)
      else:
        yield path

  return list(walk(ROOT))


FILES = project_files()
MHIL = modules("mhil")


@pytest.mark.parametrize(
  "source",
  [
    "import mhil.local",
    "import mhil.local as l",
    "from mhil import losses, local",
    "from mhil.local import step",
    "from . import local",
    "from .local import step",
    "def f():\n  from mhil import local",
    "if TYPE_CHECKING:\n  import mhil.local",
  ],
)
def test_the_parser_sees_every_spelling(source):
  assert "local" in of_mhil(imports(source))


def test_the_parser_sees_only_imports():
  assert of_mhil(imports("import numpy\nx = 'import mhil.local'")) == set()
  assert of_mhil(imports("import mhil")) == {"*"}


@pytest.mark.parametrize("module", MHIL)
def test_import_law(module):
  assert module in LAW, f"say in LAW what mhil/{module}.py may import"
  wrong = of_mhil(imports(MHIL[module])) - LAW[module]
  assert not wrong, f"mhil/{module}.py must not import {wrong}"


def test_law_holds_what_the_design_says():
  papers = {"rehearsal", "local", "layer_parallel", "subnets", "blocks"}
  assert not any(LAW[module] & papers for module in LAW)
  for module in "metrics", "plots", "config", "manifest":
    assert LAW[module] == set()
  assert LAW["checkpoint"] == {"manifest"}
  assert not ENGINE & {"checkpoint", "config", "plots", "report", "trainer"}


def test_no_circle_of_imports():
  graph = {name: of_mhil(imports(text)) for name, text in MHIL.items()}
  list(graphlib.TopologicalSorter(graph).static_order())


def test_outer_packages_are_not_imported():
  for name, text in MHIL.items():
    roots = {found.split(".")[0] for found in imports(text)}
    assert not roots & {"experiments", "configs", "tests", "notebooks"}, name
  for name, text in modules("configs").items():
    assert of_mhil(imports(text, "configs")) <= {"config"}, name
    assert "experiments" not in str(imports(text, "configs")), name


def test_only_checkpoint_imports_orbax():
  users = {
    f"{package}.{name}"
    for package in PACKAGES
    for name, text in modules(package).items()
    if any(found.startswith("orbax") for found in imports(text))
  }
  assert users == {"mhil.checkpoint"}


def test_nnx_defines_modules_and_nothing_else():
  # Splitting the graph at every step costs several times the step itself.
  for package in PACKAGES:
    for name, text in modules(package).items():
      assert not re.search(r"nnx\.(jit|grad|Optimizer)\b", text), name


def test_what_is_imported_is_a_dependency():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  names = project["dependencies"] + project["optional-dependencies"]["tfds"]
  declared = {re.split(r"[^\w.-]", name)[0] for name in names}
  declared = {normal(name) for name in declared}
  homes = importlib.metadata.packages_distributions()
  for package in PACKAGES:
    for module, text in modules(package).items():
      roots = {found.split(".")[0] for found in imports(text, package)}
      if (package, module) == ("experiments", "torch_resnet"):
        # What one suite compares with, where a user happens to have it.
        assert "except ImportError" in text
        roots.discard("torch")
      for root in roots - sys.stdlib_module_names - set(PACKAGES):
        home = {normal(name) for name in homes.get(root, [root])}
        assert home & declared, f"{package}/{module}.py imports {root}"


def normal(name: str) -> str:
  return name.lower().replace("_", "-")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_file_holds_one_thing(package):
  lines = {f: len(t.splitlines()) for f, t in modules(package).items()}
  long = {name: n for name, n in lines.items() if n > 300}
  assert not long, "files past 300 lines hold two things"


@pytest.mark.parametrize("package", ["mhil", "experiments"])
def test_public_names_are_documented(package):
  bare = []
  for module, text in modules(package).items():
    for node in ast.parse(text).body:
      bare += [f"{module}.{name}" for name in undocumented(node)]
  assert not bare


def undocumented(node: ast.stmt) -> list[str]:
  kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
  if not isinstance(node, kinds) or node.name.startswith("_"):
    return []
  found = [] if ast.get_docstring(node) else [node.name]
  if isinstance(node, ast.ClassDef):
    for method in node.body:
      found += [f"{node.name}.{name}" for name in undocumented(method)]
  return found


def test_undocumented_names_are_found():
  source = "class A:\n  '''Doc.'''\n  def f(self): ...\n  def _g(self): ..."
  assert undocumented(ast.parse(source).body[0]) == ["A.f"]


# Spelt so that this file does not hold what it forbids.
FORBIDDEN = {
  "a machine's path": r"(^|[^\w.])/(work|farm|root|Users|home/\w+)/",
  "a registry": r"pythonhos[t]ed|pypi[.]or[g]|index.ur[l]|find.link[s]",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_files_name_no_place(what):
  pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
  found = []
  for path in FILES:
    try:
      text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
      continue
    if pattern.search(text):
      found.append(str(path.relative_to(ROOT)))
  assert not found, f"these files name {what}"


def test_forbidden_places_would_be_found():
  place = "/".join(["see ", "root", "project"])
  assert re.search(FORBIDDEN["a machine's path"], place)
  assert re.search(FORBIDDEN["a registry"], "py" + "pi.org")


def test_the_walk_sees_the_project():
  names = {str(path.relative_to(ROOT)) for path in FILES}
  assert {"README.md", ".ci/run", "mhil/heads.py", "pyproject.toml"} <= names
  assert not any("__pycache__" in name for name in names)


def test_nothing_is_unpickled():
  loaders = []
  for path in FILES:
    if path.suffix == ".py":
      source = path.read_text(encoding="utf-8")
      for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and unpickles(node):
          loaders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
      if {name.split(".")[0] for name in imports(source)} & PICKLERS:
        loaders.append(str(path.relative_to(ROOT)))
  assert not loaders


PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}


def unpickles(call: ast.Call) -> bool:
  """A call with `allow_pickle`, other than a save, that is not False."""
  if ast.unparse(call.func).endswith("save"):
    return False  # Tests make the bad file that must be refused.
  given = [k.value for k in call.keywords if k.arg == "allow_pickle"]
  if ast.unparse(call.func) in ("np.load", "numpy.load"):
    given += call.args[2:3]
  return any(ast.unparse(value) != "False" for value in given)


def test_unpickling_would_be_found():
  for source, bad in ("True", True), ("False", False), ("x", True):
    call = ast.parse(f"np.load(f, allow_pickle={source})").body[0].value
    assert unpickles(call) == bad
  assert imports("from pickle import load") == {"pickle.load"}
  (loaded,) = ast.parse("np.load(f, None, True)").body
  assert unpickles(loaded.value)
