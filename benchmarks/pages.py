"""Tables and figures of the pages, written again from docs/data: no measured figure is typed by hand.

    python -m benchmarks.pages             writes README.md and the pages of docs/
    python -m benchmarks.pages --check     changes nothing; exit code 1 where something is out of date

In a page, what stands between `<!-- table: python -m MODULE ARGUMENTS -->` and `<!-- end of table -->` is what that command
prints; the modules are those in `COMMANDS`. A figure in a sentence has no mark: docs/claims.toml names its sentence
(`benchmarks.sentences`). Both read docs/data alone.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import cache
from unittest import mock

from .sentences import ROOT, written, wrong_figures

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKED = re.compile(r"(<!-- table: python -m (\S+)([^\n]*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# what a mark can name -> the module whose `main` prints the table
COMMANDS = {
    "benchmarks": "benchmarks.__main__",
    "benchmarks.claims": "benchmarks.claims",
    "benchmarks.sea_on_cpu": "benchmarks.sea_on_cpu",
    "reproduction": "reproduction.__main__",
}


@cache
def printed(command: str, arguments: str) -> str:
    """What the command prints, run in this process from the root of the checkout; ValueError where there is no such command."""
    if command not in COMMANDS:
        raise ValueError(f"a mark names {command!r}; tables are printed by {', '.join(COMMANDS)}")
    out, words = io.StringIO(), [command, *shlex.split(arguments)]
    found = importlib.import_module(COMMANDS[command])
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.chdir(ROOT):
        found.main()
    return out.getvalue().strip()


def filled(text: str) -> str:
    """The page with every marked table made anew; ValueError where a mark is not understood."""
    marks, tables = len(re.findall("<!-- table", text)), len(MARKED.findall(text))
    if marks != tables:
        raise ValueError(
            f"{marks} marks begin a table, {tables} have the form '<!-- table: python -m MODULE ARGUMENTS -->' with an end"
        )
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
        name, before = str(page.relative_to(ROOT)), page.read_text()
        after = written(filled(before), name)
        if after != before:
            stale += 1
            print(*wrong_figures(before, name), f"{name}: {'out of date' if options.check else 'written'}", sep="\n")
            if not options.check:
                page.write_text(after)
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
