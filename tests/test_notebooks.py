"""Notebooks: paired with their text, honest, and run from a clean kernel."""

import ast
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import jupytext
import nbclient
import pytest

from mhil import config

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
PAIR = runpy.run_path(str(FOLDER / "pair.py"))
SOURCES = PAIR["sources"]()
MAY_IMPORT = {"jax", "matplotlib", "mhil", "numpy"}
each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(source: pathlib.Path, kind: str) -> list[str]:
  """The sources of a notebook's cells of one kind, in order."""
  found = jupytext.read(source).cells
  return [cell.source for cell in found if cell.cell_type == kind]


def test_there_is_one_a_paper_and_one_for_all():
  papers = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
  assert {path.stem for path in SOURCES} == papers | {"together"}
  assert {path.stem for path in FOLDER.glob("*.ipynb")} == {
    path.stem for path in SOURCES
  }


class TestPairing:
  @each
  def test_both_agree(self, source):
    written = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert written == PAIR["paired"](source), "run python notebooks/pair.py"

  @each
  def test_nothing_of_a_run_or_a_machine_is_stored(self, source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    assert set(notebook["metadata"]) == {"jupytext", "kernelspec"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
      assert cell["metadata"] == {}
      if cell["cell_type"] == "code":
        assert cell["outputs"] == [] and cell["execution_count"] is None

  def test_a_changed_cell_would_be_found(self, tmp_path):
    copy = tmp_path / SOURCES[0].name
    text = SOURCES[0].read_text(encoding="utf-8")
    copy.write_text(text)
    assert PAIR["paired"](copy) == PAIR["paired"](SOURCES[0])
    copy.write_text(text + "\n# %%\nprint(1)\n")
    assert PAIR["paired"](copy) != PAIR["paired"](SOURCES[0])

  def test_it_writes_them(self, tmp_path):
    """As a program, in a copy of the folder."""
    for path in FOLDER.glob("*.py"):
      shutil.copy(path, tmp_path)
    subprocess.run([sys.executable, tmp_path / "pair.py"], check=True)
    for source in SOURCES:
      written = tmp_path / f"{source.stem}.ipynb"
      assert written.read_text() == PAIR["paired"](source)
    assert not (tmp_path / "pair.ipynb").exists()


class TestText:
  @each
  def test_it_explains_and_draws_the_line(self, source):
    text = "\n".join(cells(source, "markdown"))
    assert text.startswith("# ") and len(re.findall(r"^# ", text, re.M)) == 1
    assert text.count("$$") >= 2 and text.count("$$") % 2 == 0
    assert re.search(
      r"\*\*What is the papers?'s?, and what is ours\.\*\*", text
    )
    assert "## The picture" in text and "## Try" in text
    # A badge would need an address, which the project does not have.
    assert "badge" not in text and "https://" not in text

  @each
  def test_what_it_names_exists(self, source):
    text = source.read_text(encoding="utf-8")
    paths = re.findall(r"\b(?:docs|configs)/[\w/.-]+\.(?:md|py)\b", text)
    assert paths
    for path in paths:
      assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m (experiments\.\w+)", text):
      assert importlib.util.find_spec(module), module
    known = config.flatten(dataclasses.asdict(config.Config()))
    for field in re.findall(r"--config\.([a-z_.]+)=", text):
      assert field in known, field

  @each
  def test_it_uses_the_library_and_checks_its_claims(self, source):
    _, *code = cells(source, "code")
    tree = ast.parse("\n".join(code))
    roots = set()
    for node in ast.walk(tree):
      if isinstance(node, ast.Import):
        roots |= {alias.name.split(".")[0] for alias in node.names}
      assert not isinstance(node, ast.ImportFrom)
    assert roots - sys.stdlib_module_names <= MAY_IMPORT
    assert "mhil" in roots
    assert sum(isinstance(x, ast.Assert) for x in ast.walk(tree)) >= 3
    assert any(isinstance(x, ast.Assert) for x in ast.parse(code[-1]).body)


class TestInstall:
  """The first cell, which all share."""

  code = cells(SOURCES[0], "code")[0]

  @each
  def test_it_is_the_same_everywhere(self, source):
    assert cells(source, "code")[0] == self.code

  @pytest.fixture
  def asked(self, monkeypatch):
    """What pip was asked for, on a machine without mhil or accelerators."""
    found = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    exists = pathlib.Path.exists
    monkeypatch.setattr(
      pathlib.Path,
      "exists",
      lambda path: path.parts[1:2] != ("dev",) and exists(path),
    )
    run = lambda command, check: found.append(command[-1])  # noqa: E731
    monkeypatch.setattr(subprocess, "run", run)
    return found

  def test_what_is_there_is_not_installed(self, monkeypatch):
    run = lambda *given, **how: pytest.fail("installs")  # noqa: E731
    monkeypatch.setattr(subprocess, "run", run)
    exec(self.code, {})

  def test_from_the_checkout_around_it(self, asked, monkeypatch):
    monkeypatch.chdir(FOLDER)
    exec(self.code, {})
    assert asked == [f"mhil @ {ROOT.as_uri()}"]

  def test_elsewhere_it_says_what_to_fill_in(
    self, asked, monkeypatch, tmp_path
  ):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="fill in REPOSITORY"):
      exec(self.code, {})
    assert not asked
    address = "git+https://host/owner/name"
    filled = self.code.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
    exec(filled, {})
    assert asked == [f"mhil @ {address}"]

  def test_an_accelerator_gets_its_packages(self, asked, monkeypatch):
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    exec(self.code, {})
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: True)
    exec(self.code, {})
    here = ROOT.as_uri()
    assert asked == [f"mhil[cuda12] @ {here}", f"mhil[tpu] @ {here}"]


def execute(notebook, folder: pathlib.Path):
  """Runs a notebook in a kernel of its own, in an empty folder.

  What one has compiled, a later one need not compile again.
  """
  kept = {
    name: value
    for name, value in os.environ.items()
    if name not in ("XLA_FLAGS", "MPLBACKEND")
  }
  kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])
  kept["IPYTHONDIR"] = str(folder / "ipython")
  # Nearly all of the time is compilation of programs that run for moments.
  kept["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  kept["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")
  kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  where = {"metadata": {"path": str(folder)}}
  client = nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources=where
  )
  return client.execute(env=kept)


@pytest.mark.slow
@each
def test_it_runs_from_a_clean_kernel(source, tmp_path):
  done = execute(jupytext.read(source), tmp_path)
  outputs = [out for cell in done.cells for out in cell.get("outputs", [])]
  told = [out.text for out in outputs if out.get("name") == "stderr"]
  assert not told
  pictures = [out for out in outputs if "image/png" in out.get("data", {})]
  assert len(pictures) == 1
  numbers = [n for c in done.cells if (n := c.get("execution_count"))]
  assert numbers == list(range(1, len(cells(source, "code")) + 1))


@pytest.mark.slow
def test_a_claim_that_fails_would_be_seen(tmp_path):
  """The control: the last claim of a notebook, without what it rests on."""
  last = cells(SOURCES[0], "code")[-1]
  code = 'sent = dict.fromkeys(["D-CE", "distributed CE", "CE"], 0)\n'
  code += "results = {}\n" + last
  text = "# %%\n" + code
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="assert"):
    execute(jupytext.reads(text, "py:percent"), tmp_path)
