"""The feature table, docs/features.md, from docs/data/features.json and the tests that there are.

    python -m benchmarks.feature_checks     measures
    python -m benchmarks.feature_table      writes the page; `--check` only says whether it is up to date

A "yes" of ours needs a passed check, where one measures the feature, and a test that covers the family; it links to that test, by
line. Which tests those are stands in `benchmarks/features/rows.py` alone: after renaming one, change it there and write the page.
A line may drift by `DRIFT` before the page counts as out of date, so that not every change of a test is one of the page, too.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .feature_checks import CHECKS, MORE, RESULTS, title
from .features.rows import GROUPS, Row

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "features.md"
LINE = re.compile(r"#L(\d+)$", re.MULTILINE)
DRIFT = 20
# column -> how the tests' parameters name it. Beside the matrix' own rows there are the families' folders.
OURS = {
    "LEAP": r"leap(?!-other)",
    "Fastformer": r"fastformer(?!-encoder)",
    "DANet": r"danet(?!-encoder)",
    "DANet encoder": r"danet-encoder",
    "SEA": r"sea",
}
FOLDERS = {"SEA": "tests/sea/", "DANet": "tests/danet/"}
OTHERS = ("GPT-2", "Mamba2", "Qwen3-Next")
FLA, FLA_MODELS = "fla", ("flash-linear-attention GLA", "flash-linear-attention GatedDeltaNet")
COLUMNS = (*OURS, *OTHERS, FLA)


@cache
def collected() -> dict[str, list[str]]:
    """`file::test` -> the parameters of each of its cases ("" for a test without), as pytest collects them."""
    files = sorted({test.partition("::")[0] for rows in GROUPS.values() for row in rows for test in row.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = by_test(line for line in done.stdout.splitlines() if "::" in line and line.startswith("tests/"))
    if not found:
        raise RuntimeError(f"pytest collected nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found


def by_test(cases: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of each of pytest's ids, by what stands before them."""
    found: dict[str, list[str]] = {}
    for case in cases:
        name, _, parameters = case.partition("[")
        found.setdefault(name, []).append(parameters.rstrip("]"))
    return found


@cache
def left_out() -> set[str]:
    """Names of tests that SEA's rows of the test matrix skip, each with its reason in `tests/common/families.py`."""
    tree = ast.parse((ROOT / "tests" / "common" / "families.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SEA_LEAVES_OUT":
            return {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    raise ValueError("tests/common/families.py has no SEA_LEAVES_OUT any more")


def proof(row: Row, column: str) -> str | None:
    """The first test of the row that covers the column; the check's own test counts only for this check."""
    name = OURS[column]
    for test in row.tests:
        cases = collected().get(test)
        if cases is None:
            raise ValueError(f"the row {row_title(row)!r} names {test}, which pytest does not collect")
        if column == "SEA" and test.rpartition("::")[2] in left_out():
            continue
        if test.endswith("test_check"):
            wanted = f"{column.lower().replace(' ', '-')}-{row.check}"
            if wanted in cases:
                return test
            continue
        folder = any(test.startswith(place) for place in FOLDERS.values())
        if folder and not test.startswith(FOLDERS.get(column, "-")):
            continue
        # A family's Hub code is the same whether it is built as an encoder or not.
        pattern = "danet" if column == "DANet encoder" and test.startswith("tests/hub/") else name
        if folder or cases == [""] or not _names_a_family(cases):
            return test
        if any(re.search(rf"(?:^|-){pattern}(?:-|$)", case) for case in cases):
            return test
    return None


def _names_a_family(cases: list[str]) -> bool:
    """Whether the parameters distinguish families; otherwise the test holds for all."""
    return any(re.search(r"(?:^|-)(?:leap|fastformer|danet|sea)(?:-|$)", case) for case in cases)


def row_title(row: Row) -> str:
    """The row's own title, or its check's."""
    return row.title or title(row.check)


def verdict(row: Row, column: str, results: dict) -> tuple[str, str]:
    """("yes", test), ("no", reason), ("-", "") for not measured, or other words."""
    if column not in OURS:
        return _verdict_of_others(row, column, results)
    measured = results[column]["checks"].get(row.check) if row.check else None
    if column in row.by_tests_alone:
        measured = None
    if measured is not None and measured["passed"] is None:
        return "no", measured["reason"]
    if measured is not None and not measured["passed"]:
        return "no", row.no.get(column) or reason(measured["reason"])
    if column in row.no:
        return "no", row.no[column]
    test = proof(row, column)
    if test is not None:
        return "yes", test
    raise ValueError(f"{row_title(row)!r}: {column} has neither a test nor a reason why not")


def _verdict_of_others(row: Row, column: str, results: dict) -> tuple[str, str]:
    if not row.check:
        return (row.others or "-", "") if column in OTHERS else ("-", "")
    models = FLA_MODELS if column == FLA else (column,)
    checks = [results[m]["checks"][row.check] for m in models if m in results and row.check in results[m]["checks"]]
    if not checks:
        return "-", ""
    passed = [check["passed"] for check in checks]
    if len(set(passed)) > 1:
        return "one of two", ""
    return ("yes", "") if passed[0] else ("no", reason(checks[0]["reason"]))


def reason(message: str) -> str:
    """An error's message as words for a reader: without the class, in one line, not too long."""
    kind, _, text = message.partition(": ")
    text = re.sub(r"\s+", " ", text if kind.endswith(("Error", "Exception")) else message).strip()
    text = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", text).split(". ")[0].rstrip(".:")
    return (text[:157] + "...") if len(text) > 160 else text


@cache
def place(test: str) -> tuple[str, int]:
    """The file of `file::Class::test`, and the line on which it begins."""
    file, *names = test.split("::")
    node: ast.Module | ast.ClassDef | ast.FunctionDef = ast.parse((ROOT / file).read_text())
    for name in names:
        named = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
        if not named:
            raise ValueError(f"{test}: there is no {name} in {file}")
        node = named[-1]
    return file, node.lineno


def label(test: str) -> str:
    """How the page calls a test in its links."""
    return re.sub(r"\btest_", "", Path(test.partition("::")[0]).stem + "." + test.partition("::")[2].replace("::", "."))


def table(results: dict) -> str:
    """The groups as tables in Markdown, the numbered reasons, and where the links lead."""
    reasons: dict[str, int] = {}
    tests: set[str] = set()
    parts = []
    for group, rows in GROUPS.items():
        parts += [
            f"**{group}**",
            "",
            "| |" + "|".join(f" {c} " for c in COLUMNS) + "|",
            "|---|" + ":-:|" * len(COLUMNS),
        ]
        for row in rows:
            cells = []
            for column in COLUMNS:
                word, why = verdict(row, column, results)
                if word == "yes" and column in OURS:
                    tests.add(why)
                    word = f"[yes][{label(why)}]"
                elif word == "no" and why and column in OURS:
                    word = f"no ({reasons.setdefault(why, len(reasons) + 1)})"
                cells.append(word)
            parts.append(f"| {row_title(row)} | " + " | ".join(cells) + " |")
        parts.append("")
    parts += [f"{number}. {why}" for why, number in reasons.items()]
    if len({label(test) for test in tests}) < len(tests):
        raise ValueError("two tests have one label")
    links = [f"[{label(test)}]: ../{place(test)[0]}#L{place(test)[1]}" for test in sorted(tests)]
    return "\n".join([*parts, "", *links])


def counts(results: dict) -> str:
    """How many of the 31 checks each model passes."""
    words = []
    for name in (*OURS, *OTHERS, *FLA_MODELS):
        if name in results:
            checks = [each["passed"] for check, each in results[name]["checks"].items() if check in CHECKS]
            asked = sum(each is not None for each in checks)
            words.append(f"{name} {checks.count(True)}" + ("" if asked == len(CHECKS) else f" of {asked}"))
    return wrapped(f"Of the {len(CHECKS)} checks pass: {', '.join(words)}.")


def wrapped(line: str) -> str:
    """A line of prose, or of a list, in lines of the pages' width."""
    return textwrap.fill(
        line,
        130,
        subsequent_indent="  " if line.startswith("* ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def machines(results: dict) -> str:
    """Where the columns were measured."""
    places: dict[str, list[str]] = {}
    for name in (*OURS, *OTHERS, *FLA_MODELS):
        if name in results:
            places.setdefault(results[name]["measured on"], []).append(name)
    return "\n".join(f"* {', '.join(names)}: {place}" for place, names in places.items())


EXPLANATION = """\
The 31 checks, and those other rows that all models can be asked, are measured: the same code runs on a tiny random model of each
kind, and says yes only where the numbers agree (`python -m benchmarks.feature_checks`; within 1e-4 in float32). The other rows
concern what only our tests look at: a dash means not measured, and a plain word there is what Transformers has for all its
models. SEA is measured over a small Llama. fla is flash-linear-attention (GLA and GatedDeltaNet), whose kernels run on GPUs
only: what was measured of either, within 2e-2, because they multiply in TF32. GatedDeltaNet refuses to train with this Triton
on this GPU, so its training was left out."""


def page(results: dict) -> str:
    """docs/features.md: the table, where it was measured, and what the others said."""
    lines = [
        "# Features", "", counts(results), "", EXPLANATION, "", machines(results), "", "## Table", "",
        table(results), "",
    ]  # fmt: skip
    lines += ["## Why the others do not pass", ""]
    for name in (*OTHERS, *FLA_MODELS):
        if name in results:
            checks = results[name]["checks"]
            lines += [f"### {name}", ""]
            failed = [
                (c, checks[c]["reason"]) for c in (*CHECKS, *MORE) if c in checks and checks[c]["passed"] is False
            ]
            lines += [wrapped(f"* {title(check)}: {reason(why) or 'the numbers differ'}") for check, why in failed] + [
                ""
            ]
    return "\n".join(lines).rstrip() + "\n"


def up_to_date(text: str, wanted: str) -> bool:
    """Whether a page is what it should be; lines of tests may have moved a little."""
    if LINE.sub("", text) != LINE.sub("", wanted):
        return False
    return all(abs(int(has) - int(is_at)) <= DRIFT for has, is_at in zip(LINE.findall(text), LINE.findall(wanted)))


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 where the page is out of date"
    )
    options = parser.parse_args(arguments)
    wanted = page(json.loads(RESULTS.read_text()))
    if options.check:
        stale = not PAGE.exists() or not up_to_date(PAGE.read_text(), wanted)
        print(f"{PAGE.relative_to(ROOT)}: {'out of date' if stale else 'up to date'}")
        return int(stale)
    PAGE.write_text(wanted)
    print(f"{PAGE.relative_to(ROOT)}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
