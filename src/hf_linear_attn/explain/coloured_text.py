"""A text whose tokens are coloured by a number: as HTML, for a terminal, as a picture."""

import html
import re
import textwrap
from dataclasses import dataclass

import torch

from ..terminal_text import printable
from .reading import ReadText

# White to orange. Black letters keep a contrast of at least 5 on every shade.
RAMP = ((255, 255, 255), (255, 226, 168), (255, 160, 64), (232, 100, 24))
TERMINAL_RAMP = (231, 230, 223, 222, 215, 208, 202)  # the same in the 256 colours that terminals have
STYLE = (
    "background:#ffffff;color:#111111;border:1px solid #d0d0d0;border-radius:6px;padding:12px 14px;"
    "font:15px/1.75 Georgia,serif;max-width:60em;overflow-wrap:anywhere"
)
SMALL = "font:12px/1.5 system-ui,sans-serif;color:#333333"


@dataclass(frozen=True)
class Scale:
    """Which number gets the first and which the last colour."""

    low: float
    high: float
    exceeded: bool = False  # by some numbers, which have the last colour, too

    @classmethod
    def of(cls, scores: torch.Tensor) -> "Scale":
        """From the smallest number to the one that 2 % exceed, so that one outlier does not leave all others white."""
        low, high = float(scores.min()), float(torch.quantile(scores.float(), 0.98))
        return cls(low, high, float(scores.max()) - high > 0.005) if high > low else cls(low, low + 1.0)

    @property
    def end(self) -> str:
        """What the last colour stands for."""
        return f"{self.high:.2f}{'+' * self.exceeded}"

    def share(self, score: float) -> float:
        """Place in the ramp, 0 to 1."""
        return min(1.0, max(0.0, (score - self.low) / (self.high - self.low)))


def shade(share: float) -> tuple[int, int, int]:
    """Colour at a place of the ramp: red, green and blue, 0 to 255."""
    place = share * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (place - index)) for a, b in zip(RAMP[index], RAMP[index + 1]))
    return red, green, blue


def _pieces(read: ReadText, scores: torch.Tensor):
    """(characters, score or None, token's name or None) over the whole text; special tokens have no characters."""
    reached = 0
    for (start, end), name, special, score in zip(read.spans, read.names, read.special.tolist(), scores.tolist()):
        if start > reached:
            yield read.text[reached:start], None, None
        if end > start or special:
            yield read.text[start:end], score, name if special else None
        reached = max(reached, end)
    if reached < len(read.text):
        yield read.text[reached:], None, None


def to_html(read: ReadText, scores: torch.Tensor, title: str, caption: str) -> str:
    """A box of HTML with its own style: the text, each token's number where the pointer rests, and the scale."""
    scale, spans = Scale.of(scores), []
    for characters, score, special in _pieces(read, scores):
        shown = html.escape(special or characters).replace("\n", "<br>")
        if score is None:
            spans.append(shown)
            continue
        red, green, blue = shade(scale.share(score))
        chip = "border:1px solid #999999;border-radius:4px;padding:0 3px;margin:0 2px;font-size:75%;" if special else ""
        spans.append(
            f'<span style="{chip}background:rgb({red},{green},{blue})" title="{html.escape(repr(special or characters))}: '
            f'{score:.3g}">{shown}</span>'
        )
    ramp = ",".join(f"rgb({r},{g},{b})" for r, g, b in RAMP)
    bar = (
        "display:inline-block;width:9em;height:0.9em;vertical-align:middle;border:1px solid #999999;"
        f"background:linear-gradient(to right,{ramp})"
    )
    return (
        f'<div style="{STYLE}"><div style="{SMALL};font-weight:600;margin-bottom:6px">{html.escape(title)}</div>'
        f'<div style="white-space:pre-wrap">{"".join(spans)}</div>'
        f'<div style="{SMALL};margin-top:8px">{scale.low:.2f} <span style="{bar}"></span> {scale.end} '
        f"&nbsp; {html.escape(caption)}</div></div>"
    )


def to_page(fragment: str, title: str) -> str:
    """A box of HTML as a page of its own."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title></head>"
        f'<body style="margin:24px;background:#f4f4f4">{fragment}</body></html>\n'
    )


def to_terminal(read: ReadText, scores: torch.Tensor, caption: str, width: int, color: bool) -> str:
    """Lines of at most `width` columns. Without colour the top fifth of the tokens stands in [brackets]."""
    scale = Scale.of(scores)
    pieces = [
        (printable(part), score, special and printable(special)) for part, score, special in _pieces(read, scores)
    ]
    if not color:
        bound = float(torch.quantile(scores.float(), 0.8))
        pieces = [_bracketed(piece) if piece[1] is not None and piece[1] >= bound else piece for piece in pieces]
        caption = f"[in brackets: the top fifth of the tokens] {caption}"
    lines = ["".join(_painted(part, score, scale, color) for part, score in line) for line in _lines(pieces, width)]
    if color:
        cell = " " * (2 if width > 24 else 1)
        bar = "".join(_painted(cell, scale.low + (scale.high - scale.low) * i / 6, scale, True) for i in range(7))
        lines += ["", f"{scale.low:.2f} {bar} {scale.end}"]
    return "\n".join([*lines, *textwrap.wrap(caption, width)])


def _bracketed(piece):
    characters, score, special = piece
    core = (special or characters).strip()
    if not core:
        return piece
    before, after = ("", "") if special else characters.split(core, 1)
    return f"{before}[{core}]{after}", score, None


def _painted(characters: str, score: float | None, scale: Scale, color: bool) -> str:
    if not color or score is None:
        return characters
    index = min(int(scale.share(score) * len(TERMINAL_RAMP)), len(TERMINAL_RAMP) - 1)
    return f"\x1b[38;5;16;48;5;{TERMINAL_RAMP[index]}m{characters}\x1b[0m"


def _lines(pieces, width: int) -> list[list[tuple[str, float | None]]]:
    """The pieces (characters, score, special token's name) in lines of at most `width` characters, broken at spaces."""
    lines: list[list[tuple[str, float | None]]] = [[]]
    column = 0
    for word in _words(pieces):
        if word[0][0] == "\n":
            lines.append([])
            column = 0
            continue
        if column and column + sum(len(part) for part, _ in word) > width:
            lines.append([])
            column = 0
        for part, score in word:
            part = part if column else part.lstrip(" ")
            while column + len(part) > width:  # a word that is longer than a line
                lines[-1].append((part[: width - column], score))
                part, column = part[width - column :], 0
                lines.append([])
            if part:
                lines[-1].append((part, score))
                column += len(part)
    return lines


def _words(pieces):
    """Runs of characters between which a line may end, each a list of (characters, score); a line's end is a run."""
    word: list[tuple[str, float | None]] = []
    for characters, score, special in pieces:
        for part in re.findall(r"\n|[^\S\n]?[^\s]+|[^\S\n]", f" {special} " if special else characters):
            if part[0].isspace() and word:
                yield word
                word = []
            if part == "\n":
                yield [(part, None)]
            else:
                word.append((part.replace("\t", " "), score))
    if word:
        yield word


def draw(read: ReadText, scores: torch.Tensor, title: str, caption: str, columns: int = 88):
    """The coloured text as a matplotlib figure, in letters of one width so that nothing overlaps or is cut off."""
    figure_class = require_figure()
    from matplotlib.patches import Rectangle

    scale, lines = Scale.of(scores), _lines(_pieces(read, scores), columns)
    letter, height_of_line = 0.0875, 0.23  # inches
    width, height = columns * letter + 0.4, len(lines) * height_of_line + 1.0
    figure = figure_class(figsize=(width, height), facecolor="white")
    axis = figure.add_axes((0.2 / width, 0.55 / height, 1 - 0.4 / width, 1 - 1.0 / height))
    axis.set(xlim=(0, columns), ylim=(len(lines), 0))
    axis.axis("off")
    letters = {"family": "monospace", "fontsize": 10, "ha": "center", "va": "center", "parse_math": False}
    for row, line in enumerate(lines):
        column = 0
        for characters, score in line:
            if score is not None:
                color = tuple(part / 255 for part in shade(scale.share(score)))
                axis.add_patch(Rectangle((column, row + 0.06), len(characters), 0.88, color=color, linewidth=0))
            for character in characters:
                axis.text(column + 0.5, row + 0.5, character, **letters)
                column += 1
    figure.text(0.2 / width, 1 - 0.28 / height, title, fontsize=10, weight="bold", parse_math=False)
    bar = figure.add_axes((0.65 / width, 0.22 / height, 1.2 / width, 0.13 / height))
    bar.imshow([[tuple(part / 255 for part in shade(i / 63)) for i in range(64)]], aspect="auto")
    bar.set(xticks=[], yticks=[])
    figure.text(0.2 / width, 0.23 / height, f"{scale.low:.2f}", fontsize=9)
    figure.text(1.92 / width, 0.23 / height, f"{scale.end}    {caption}", fontsize=9, parse_math=False)
    return figure


def require_figure():
    """Matplotlib's Figure, or an error that says how to get it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf-linear-attn[train]'") from error
    return Figure
