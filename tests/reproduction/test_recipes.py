"""The recipes have one form, their commands are understood, and their results are there."""

import ast
import json
import re
import sys

import pytest

from reproduction import recipe
from reproduction.recipe import DATA, RECIPES, command, load, run_together


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_reproduces_and_how(name):
    found, about = load(name)
    assert about
    assert found.reproduces
    assert all(function.__doc__ for function in found.stages)
    assert name == "corpora" or "table" in {function.__name__ for function in found.stages}


@pytest.mark.parametrize("name", RECIPES)
def test_commands_of_a_recipe_are_understood(name):
    """Those of its docstring; and the words for a run of its own say the same as the options that they are made of."""
    found, about = load(name)
    parser = found.parser(name, about)
    commands = [line.split("  ")[0].split()[4:] for line in re.findall(rf"python -m reproduction {name} .*", about)]
    assert commands or name in ("distributed", "corpora")
    for words in commands:
        options = parser.parse_args(words)
        assert parser.parse_args([str(word) for word in command(name, options)[2:]]) == options


@pytest.mark.parametrize("name", RECIPES)
def test_results_of_a_recipe_are_committed(name):
    """Each file that it names can be read, and says where it was measured."""
    found, _ = load(name)
    for pattern in found.results:
        files = sorted(DATA.glob(pattern))
        assert files, pattern
        for file in files:
            assert '"machine"' in json.dumps(json.loads(file.read_text())), file


def test_every_recipe_is_listed_with_its_results():
    """In the folder's README, and nothing else trains a model by a loop of its own."""
    folder = DATA.parents[1] / "reproduction"
    readme = (folder / "README.md").read_text()
    for name in RECIPES:
        assert f"| `{name}` |" in readme
    for file in [*folder.glob("*.py"), *(folder.parent / "benchmarks").rglob("*.py")]:
        functions = [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        assert "train" not in functions or file.name in ("training.py", "leap.py", "danet.py"), file


def test_runs_are_spread_over_the_devices(monkeypatch, tmp_path):
    """Each run is a real process here: one that writes down its device and waits for the others."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path(r'{tmp_path}', sys.argv[-1] + '.gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        f"while len(list(pathlib.Path(r'{tmp_path}').glob('*.gpu'))) < 4: time.sleep(0.01)\n"
    )
    real = recipe.subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, str(script), command[-1]], **options)

    monkeypatch.setattr(recipe.subprocess, "Popen", popen)
    run_together({tmp_path / name: [name] for name in "abcd"}, 4, ["5", "7"])
    assert sorted(file.read_text() for file in tmp_path.glob("*.gpu")) == ["5", "5", "7", "7"]
