"""The documentation names what exists: functions and tests of the paper index, pages of the site, classes of the reference."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
INDEX = (ROOT / "docs" / "paper_index.md").read_text()
FUNCTIONS = sorted(set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)*)`(?= |\)| with)", INDEX)) - {"hf_linear_attn.modeling"})
TESTS = sorted(set(re.findall(r"`(tests/[^`]+)`", INDEX)))


def test_the_index_was_read():
    assert len(FUNCTIONS) > 25
    assert len(TESTS) > 25


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "leap.kernels.mechanism.leap_kernel"])
def test_functions_of_the_paper_index_exist(name):
    try:
        importlib.import_module(f"hf_linear_attn.modeling.{name}")
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"hf_linear_attn.modeling.{module}"), attribute)


@pytest.mark.parametrize("name", TESTS)
def test_tests_of_the_paper_index_exist(name):
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not function or function in functions


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "families").glob("*.md")), ids=lambda page: page.name)
def test_tests_of_the_family_pages_exist(page):
    """Files and functions that a page names as the proof of what it says."""
    files = {file.name: file for file in (ROOT / "tests").rglob("test_*.py")}
    written = {name: re.findall(r"def (test_\w+)\(", file.read_text()) for name, file in files.items()}
    every = {function for functions in written.values() for function in functions}
    for file, function in re.findall(r"`(?:tests/)?(?:\w+/)*(?:(test_\w+\.py))?(?:::)?(test_\w+)?`", page.read_text()):
        assert not file or file in files, file
        assert not function or function in (written[file] if file else every), function


def test_every_public_name_is_in_the_reference():
    """Either by itself, or by the module that it comes from."""
    import hf_linear_attn

    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    missing = [name for name in hf_linear_attn.__all__ if name[0] != "_" and not re.search(rf"\b{name}\b", pages)]
    assert not missing


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "model_cards").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    """Modules, scripts, make targets and commands that a page tells the reader to run."""
    from hf_linear_attn.cli.main import COMMANDS

    text = page.read_text()
    for module in re.findall(r"python -m ((?:benchmarks|reproduction|model_cards)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for script in re.findall(
        r"(?:python|torchrun [-\w ]*?) ((?:docs|examples|notebooks|benchmarks|reproduction)/[\w./]+\.py)", text
    ):
        assert (ROOT / script).exists(), script
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert target in targets, target
    for command in re.findall(r"(?:`|^ *|\$ )hf-linear-attn ([a-z]+)", text, flags=re.MULTILINE):
        assert command in COMMANDS, command


@pytest.mark.parametrize("page", sorted((ROOT / "model_cards").glob("*.md")), ids=lambda page: page.name)
def test_links_of_the_cards_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


SITE = ROOT / "docs"


@pytest.mark.parametrize("page", sorted(SITE.rglob("*.md")), ids=lambda page: str(page.relative_to(SITE)))
def test_links_of_the_site_stay_inside_it(page):
    """What lies outside of docs/ is not part of the site, and its strict build refuses such a link."""
    for target in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)):
        if "://" not in target:
            found = (page.parent / target).resolve()
            assert found.exists(), target
            assert found.is_relative_to(SITE), target


def test_tables_are_those_of_their_commands():
    """The pages hold what the commands print from docs/data now."""
    from benchmarks.pages import main

    assert main(["--check"]) == 0, "run `python -m benchmarks.pages`"


SENTENCE = "DANet guesses {words[danet]:.0%} of them and BERT {words[bert]:.0%};"  # of the README, in docs/claims.toml


def test_figures_in_sentences_are_those_of_the_data():
    """Each claim of docs/claims.toml stands in its page once, with what docs/data gives."""
    from benchmarks.sentences import claims, wrong_figures

    names = {claim.page for claim in claims()}
    assert names <= {str(page.relative_to(ROOT)) for page in PAGES}, "a claim about a page that is not there"
    wrong = [line for name in sorted(names) for line in wrong_figures((ROOT / name).read_text(), name)]
    assert not wrong, "\n".join(["run `python -m benchmarks.pages`", *wrong])


def test_a_figure_that_the_data_do_not_give_is_named_and_mended(monkeypatch):
    """By page and sentence, whether the page was changed or the data."""
    from benchmarks import sentences

    text = (ROOT / "README.md").read_text()
    place = re.search(r"DANet guesses (\S+) of them", text).span(1)
    changed = f"{text[: place[0]]}97%{text[place[1] :]}"
    found = list(sentences.wrong_figures(changed, "README.md"))
    assert len(found) == 1
    assert all(words in found[0] for words in ("README.md", SENTENCE, "has 97%, ", f"gives {text[slice(*place)]}, "))
    assert sentences.written(changed, "README.md") == text
    monkeypatch.setitem(sentences.LOOKUPS, "words", lambda family: 0.5)
    (found,) = sentences.wrong_figures(text, "README.md")
    assert SENTENCE in found
    assert "gives 50%, 50%" in found


def test_claims_that_cannot_be_compared_are_refused():
    """A sentence that is not there or there twice, and figures that are not to be had."""
    from benchmarks.sentences import Claim

    source = {"of": "words", "family": ["danet", "bert"]}
    claim = Claim("a page", SENTENCE, {"words": source})
    line = "DANet guesses 39% of\n  them and BERT 14%;"
    assert claim.match(f"So {line} and so on").groups() == ("39%", "14%")
    for text in ("DANet guesses some of them", f"{line} {line}"):
        with pytest.raises(ValueError, match=r"a page: [02] sentences, not one"):
            claim.match(text)
    with pytest.raises(ValueError, match="no_such"):
        claim._replace(sources={"words": {"of": "no_such"}}).figures()
    with pytest.raises(ValueError, match="albert"):
        claim._replace(sources={"words": {**source, "family": ["danet", "albert"]}}).figures()
    with pytest.raises(ValueError, match=r"no place for \['more'\]"):
        claim._replace(sources={"words": source, "more": 1}).figures()


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ({"of": "ratio", "values": [3, 2]}, 1.5),
        ({"of": "difference", "values": [3, 2], "scale": 100}, 100),
        ({"of": "above", "values": [3, 2]}, 0.5),
        ({"of": "below", "values": [1, 2]}, 0.5),
        ({"of": "min", "values": [3, 1, 2]}, 1),
        ({"of": "max", "values": [3, 1, 2]}, 3),
        ({"of": "median", "values": [3, 1, 9]}, 3),
        ({"of": "ratio", "values": {"of": "entry", "file": ["numbers", "others"], "path": ["four"]}}, 2),
        ({"of": "entry", "file": "numbers", "path": ["list", {"name": "b"}, "size"]}, 7),
        ({"of": "entry", "file": "numbers", "path": ["list", -1, "size"]}, 7),
    ],
)
def test_operations_of_a_claim(source, wanted, monkeypatch):
    from benchmarks import figures
    from benchmarks.sentences import value

    numbers = {"four": 4, "list": [{"name": "a", "size": 6}, {"name": "b", "size": 7}]}
    monkeypatch.setattr(figures, "data", lambda file: {"numbers": numbers, "others": {"four": 2}}[file])
    assert value(source) == wanted


def prose(text):
    """Numbered lines outside of tables, what commands print between marks, and fenced code."""
    text = re.sub(
        r"<!-- table: .*?<!-- end of table -->|^```.*?^```",
        lambda found: "\n" * found[0].count("\n"),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if not line.lstrip().startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_read_well_as_text(page):
    """No expression hides in a mark, and no line of prose is too long for a diff."""
    text = page.read_text()
    assert not re.findall(r"<!--\W*\{.*?-->|<!--\.-->", text)
    assert {mark.split(":")[0] for mark in re.findall(r"<!-- ?(.*?) ?-->", text)} <= {
        "table", "end of table", "feature table", "end of the feature table"
    }  # fmt: skip
    assert not [f"line {number}: {len(line)} characters" for number, line in prose(text) if len(line) > 200]


def test_marks_of_tables_name_commands_of_a_list():
    """Nothing else that a page says is run."""
    from benchmarks.pages import filled

    with pytest.raises(ValueError, match="a mark names 'antigravity'"):
        filled("<!-- table: python -m antigravity -->\n<!-- end of table -->")
    with pytest.raises(ValueError, match="1 marks begin a table, 0 have the form"):
        filled("<!-- table: python -m benchmarks.claims -->\n")


def written_commands(page):
    """Words of each command of ours in a page, continued lines joined, variables of the shell that the page sets filled in."""
    text = page.read_text().replace("\\\n", " ")
    variables = dict(re.findall(r'^\s+(\w+)="([^"]*)"$', text, flags=re.MULTILINE))
    lines = re.findall(
        r"^(?: {4}|\$ )?((?:python -m (?:benchmarks|reproduction|model_cards)|hf-linear-attn ).*)$", text, re.MULTILINE
    )
    lines += re.findall(r"`((?:python -m (?:benchmarks|reproduction|model_cards)|hf-linear-attn )[^`\n]*)`", text)
    for line in lines:
        for each in re.split(r" && | \|\| | ; | # | {2,}\(", re.sub(r"\$\(seq (\d+) (\d+)\)", r"\1 \2", line)):
            filled = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), each)
            words = shlex.split(filled, comments=True)
            if words and words[0] in ("python", "hf-linear-attn"):
                yield words


class Parsed(Exception):
    """The command line was understood."""


class Misunderstood(Exception):
    """Words were left that the parser does not know."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page, monkeypatch, tmp_path):
    """Every flag and value of a documented command is one that its parser takes."""
    monkeypatch.chdir(tmp_path)  # what lies in a developer's folder makes no difference
    real = argparse.ArgumentParser.parse_known_args

    def parse(self, *given, **named):
        """Ends the command before it does anything, whichever of argparse's methods was called."""
        _, rest = real(self, *given, **named)
        raise Misunderstood(rest) if rest else Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    for words in written_commands(page):
        if len(words) == (3 if words[0] == "python" else 2):
            continue  # a bare name in the text
        name, arguments = (words[2], words[3:]) if words[0] == "python" else ("hf_linear_attn", words[1:])
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_module(name, run_name="__main__")
        except Parsed:
            continue
        except SystemExit as stop:
            if stop.code in (None, 0):  # --help
                continue
        except Misunderstood:
            pass
        pytest.fail(f"not understood: {' '.join(words)}")


def test_types_of_the_reference_are_plain_words():
    """A docstring's marks are not shown inside of code; other pages stay as they are."""
    pytest.importorskip("mkdocs", reason="pip install 'hf-linear-attn[docs]'")
    hook = runpy.run_path(str(ROOT / "docs" / "scripts" / "site.py"))["on_page_content"]
    html = "<td><code>`(B, T)`, *optional*</code></td> returns [<code>Output</code>]"

    def page(name):
        return SimpleNamespace(file=SimpleNamespace(src_uri=name))

    assert hook(html, page("reference/models.md"), None, None) == (
        "<td><code>(B, T), optional</code></td> returns <code>Output</code>"
    )
    assert hook(html, page("quickstart.md"), None, None) == html
