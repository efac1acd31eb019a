"""The committed notebooks are what their sources say, have run, and name no folder of the machine that ran them."""

import ast
import importlib
from pathlib import Path

import nbformat
import pytest

from notebooks.build import FOLDER, machine_paths, read, sources

SOURCES = sources([])
each = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])


def test_each_source_has_its_notebook():
    assert [source.stem[0] for source in SOURCES] == ["1", "2", "3", "4", "5", "6"]
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == [source.stem for source in SOURCES]


@each
def test_notebook_and_source_agree(source: Path):
    """`python notebooks/build.py --sync` puts changed text in, `python notebooks/build.py` runs changed code."""
    committed, wanted = nbformat.read(source.with_suffix(".ipynb"), as_version=4), read(source)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == [
        (c.cell_type, c.source) for c in wanted.cells
    ]


@each
def test_outputs_are_there(source: Path):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert machine_paths(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from the top, once"


@each
def test_the_top_says_what_and_how_long(source: Path):
    top = read(source).cells[0].source
    assert top.startswith(f"# {source.stem[0]}. ")
    assert "**You will see**" in top
    assert "**It takes**" in top


@each
def test_what_it_imports_is_there(source: Path):
    """Of this package, by the names that the notebook uses: `make notebooks` takes minutes and is not part of `make test`."""
    found = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [
        (node.module, alias.name) for node in found for alias in node.names if node.module.startswith("hf_linear_attn")
    ]
    assert ours
    assert [name for module, name in ours if not hasattr(importlib.import_module(module), name)] == []
