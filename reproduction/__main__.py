"""Reproductions: python -m reproduction RECIPE STAGE [options]; `python -m reproduction RECIPE --help` says more."""

import ast
import sys
from pathlib import Path

from .recipe import RECIPES, load


def main(words: list[str] | None = None) -> None:
    """Run a stage of a recipe."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] not in RECIPES:
        print(__doc__, *(f"    {name:20}{first_line(name)}" for name in RECIPES), sep="\n")
        raise SystemExit(0 if words in ([], ["--help"], ["-h"]) else 2)
    recipe, about = load(words[0])
    options = recipe.parser(words[0], about).parse_args(words[1:])
    options.function(options)


def first_line(name: str) -> str:
    """Of what a recipe says of itself, without importing it."""
    file = Path(__file__).with_name(f"{name.replace('-', '_')}.py")
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]


if __name__ == "__main__":
    main()
