"""Tables and figures of the pages, written again from docs/data: nothing between the marks is typed by hand.

    python -m benchmarks.pages             writes the pages named in PAGES
    python -m benchmarks.pages --check     changes nothing; exit code 1 where something is out of date

In a page, what stands between `<!-- table: python -m MODULE ARGUMENTS -->` and `<!-- end of table -->` is what that command
prints. A figure in a sentence stands between `<!--{EXPRESSION:FORMAT}-->` and `<!--.-->`; `benchmarks.figures` says which
expressions there are. Both read docs/data alone.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from unittest import mock

from . import figures

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKED = re.compile(r"(<!-- table: python -m (\S+)([^\n]*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
FIGURE = re.compile(r"(<!--(\{[^\n]+?\})-->)[^\n]*?(<!--\.-->)")


@cache
def printed(module: str, arguments: str) -> str:
    """What the command prints, run in this process from the root of the checkout."""
    out, words = io.StringIO(), [module, *shlex.split(arguments)]
    found = importlib.import_module(module)
    if not hasattr(found, "main"):  # a package
        found = importlib.import_module(f"{module}.__main__")
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.chdir(ROOT):
        found.main()
    return out.getvalue().strip()


def figure(field: str) -> str:
    """What a replacement field of an f-string gives with the functions of `benchmarks.figures`."""
    try:
        return eval(f'f"""{field}"""', dict(vars(figures)))
    except Exception as error:
        raise ValueError(f"the figure {field}: {error!r}") from error


def filled(text: str) -> str:
    """The page with every marked table and figure made anew; ValueError where a mark is not understood."""
    marks, tables = len(re.findall("<!-- table", text)), len(MARKED.findall(text))
    if marks != tables:
        raise ValueError(
            f"{marks} marks begin a table, {tables} have the form '<!-- table: python -m MODULE ARGUMENTS -->' with an end"
        )
    marks, found = text.count("<!--{"), len(FIGURE.findall(text))
    if not marks == found == text.count("<!--.-->"):
        raise ValueError(f"{marks} marks begin a figure, {found} have the form <!--{{EXPRESSION:FORMAT}}-->...<!--.-->")
    if found := re.search(r"^\s*(<!--\{.*)", text, re.MULTILINE):
        raise ValueError(
            f"a line that begins with a mark is no text for Markdown; put a word before it: {found[1][:60]}"
        )
    text = FIGURE.sub(lambda m: f"{m[1]}{figure(m[2])}{m[3]}", text)
    return MARKED.sub(lambda m: f"{m[1]}\n{printed(m[2], m[3])}\n\n{m[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 where something is out of date"
    )
    options = parser.parse_args(arguments)
    stale = 0
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if after != before:
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
            if not options.check:
                page.write_text(after)
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
