"""Writes the `.ipynb` of every notebook from the `.py` beside it.

  python notebooks/pair.py

The `.py` is the source. The `.ipynb` has its cells, no outputs, and nothing
that differs from one writing to the next.
"""

import pathlib

import jupytext

HERE = pathlib.Path(__file__).parent


def sources() -> list[pathlib.Path]:
  """The notebooks in this folder."""
  found = sorted(HERE.glob("*.py"))
  return [path for path in found if path.name != pathlib.Path(__file__).name]


def paired(source: pathlib.Path) -> str:
  """The text of a notebook's `.ipynb`."""
  notebook = jupytext.read(source)
  # Which version of jupytext read it.
  notebook.metadata["jupytext"].pop("text_representation", None)
  for i, cell in enumerate(notebook.cells):
    # Drawn at random otherwise.
    cell["id"] = f"cell-{i}"
    # How many blank lines were between two cells.
    cell["metadata"] = {}
  return jupytext.writes(notebook, "ipynb")


if __name__ == "__main__":
  for path in sources():
    path.with_suffix(".ipynb").write_text(paired(path), encoding="utf-8")
