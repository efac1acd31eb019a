"""Figures in the sentences of the pages, from docs/data: docs/claims.toml says which, in tables alone.

A claim names a page, a sentence or a distinctive part of one with its figures left open, and where each figure comes from:

    [[claim]]
    page = "README.md"
    sentence = "GPT-2 overtakes ({gpt2:.2f} bits per byte, windowed LEAP {leap:.2f}, same command)"
    gpt2 = { of = "lm", corpus = "docs8", model = "gpt2" }
    leap = { of = "lm", corpus = "docs8", model = "leap-windowed" }

`of` is a function of `benchmarks.figures.LOOKUPS`, which takes the other keys as its arguments, or one of `OPERATIONS`, which
takes `values`: tables like these or numbers. `scale` multiplies what comes out. An argument that is a list asks for one value
for each of its members, and a hole names the member:

    sentence = "{times[128]:.1f} times at 128 tokens and {times[1024]:.1f} at 1,024"
    times = { of = "times", suite = "encoder", ours = "DANet, ours", theirs = "BERT", length = [128, 1024] }

A line break counts as a space, in the page and here. `python -m benchmarks.pages` writes the figures, and a test compares them.
"""

import re
import statistics
import string
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .figures import LOOKUPS

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims.toml"
NUMBER = r"[-+]?\d(?:[\d.,]*\d)?%?"
OPERATIONS: dict[str, Callable[[list[float]], float]] = {
    "ratio": lambda values: values[0] / values[1],
    "difference": lambda values: values[0] - values[1],
    "above": lambda values: values[0] / values[1] - 1,  # as a share of the second
    "below": lambda values: 1 - values[0] / values[1],
    "min": min,
    "max": max,
    "median": statistics.median,
}


class Claim(NamedTuple):
    """A sentence of a page with its figures left open, and the table of each figure."""

    page: str
    sentence: str
    sources: dict[str, Any]

    def holes(self) -> list[str]:
        """The replacement fields, as in "{gpt2:.2f}"."""
        fields = [(name, form) for _, name, form, _ in string.Formatter().parse(self.sentence) if name is not None]
        return [f"{{{name}:{form}}}" if form else f"{{{name}}}" for name, form in fields]

    def figures(self) -> list[str]:
        """What docs/data gives for each hole, as it is written; ValueError where that is not a number."""
        try:
            values = {name: value(source) for name, source in self.sources.items()}
            found = [hole.format_map(values) for hole in self.holes()]
        except Exception as error:
            raise ValueError(f"{self.page}, {self.sentence!r}: {error!r}") from error
        unused = [name for name in self.sources if not re.search(rf"{{{name}[\[:}}]", self.sentence)]
        other = [figure for figure in found if not re.fullmatch(NUMBER, figure)]
        if unused or other or not found:
            raise ValueError(f"{self.page}, {self.sentence!r}: no place for {unused}, no numbers {other}")
        return found

    def match(self, text: str) -> re.Match[str]:
        """The one place of a page where the sentence stands, with any figures; ValueError where there is none, or a second."""
        pattern = ""
        for literal, name, *_ in string.Formatter().parse(self.sentence):
            pattern += r"\s+".join(map(re.escape, re.split(r"\s+", literal))) + ("" if name is None else f"({NUMBER})")
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            raise ValueError(f"{self.page}: {len(found)} sentences, not one, have the form {self.sentence!r}")
        return found[0]


def claims(page: str | None = None) -> list[Claim]:
    """Those of docs/claims.toml, of one page or of all."""
    each = tomllib.loads(CLAIMS.read_text())["claim"]
    found = [Claim(claim.pop("page"), " ".join(claim.pop("sentence").split()), claim) for claim in each]
    return [claim for claim in found if page in (None, claim.page)]


def value(source: Any) -> Any:
    """Of a table of docs/claims.toml: a number, or numbers by the members of the argument that is a list."""
    if not isinstance(source, dict):
        return source
    arguments = dict(source)
    name, scale = arguments.pop("of"), arguments.pop("scale", 1)
    if name in OPERATIONS:
        given = arguments.pop("values")
        if arguments:
            raise ValueError(f"{name} takes `values` alone, not {', '.join(arguments)}")
        values = [value(each) for each in given] if isinstance(given, list) else list(value(given).values())
        return OPERATIONS[name](values) * scale
    several = [key for key, argument in arguments.items() if isinstance(argument, list) and key != "path"]
    if not several:
        found = LOOKUPS[name](**arguments)
        return found if scale == 1 else found * scale
    return {_key(each): value({**source, several[0]: each}) for each in source[several[0]]}


def _key(member: Any) -> Any:
    """As a hole names it: `str.format` takes digits for a number, all else for a string."""
    return member if isinstance(member, int) else str(member)


def wrong_figures(text: str, page: str) -> Iterator[str]:
    """What a page says otherwise than docs/data, one line a claim."""
    for claim in claims(page):
        expected, found = claim.figures(), list(claim.match(text).groups())
        if expected != found:
            yield f"{page}: {claim.sentence!r} has {', '.join(found)}; docs/data gives {', '.join(expected)}"


def written(text: str, page: str) -> str:
    """The page with the figures of docs/data in its sentences."""
    for claim in claims(page):
        match = claim.match(text)
        for number, figure in reversed(list(enumerate(claim.figures(), 1))):
            text = text[: match.start(number)] + figure + text[match.end(number) :]
    return text
