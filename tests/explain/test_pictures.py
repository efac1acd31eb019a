"""Coloured texts: every letter is there, unchanged, and the scale goes with it."""

import re
from html.parser import HTMLParser

import pytest
import torch
from common.families import ROWS

from explain.keyword_task import word_tokenizer
from hf_linear_attn.explain import attention_maps, importance, influence
from hf_linear_attn.explain.coloured_text import RAMP, Scale, draw, shade, to_html, to_terminal
from hf_linear_attn.explain.reading import read_text
from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

TEXT = "We owe $5 & <b>more</b> to “Zoë” naïve 日本 $x_1$!\n\nA second paragraph\twith a verylongwordthatfillsaline."
CAPTION = "focus weight; 1 is the average token of the text"


@pytest.fixture(scope="module")
def read():
    tokenizer = train_bpe_tokenizer(["We owe more to the second paragraph with a word that fills a line"], 300)
    return read_text(tokenizer, TEXT)


@pytest.fixture(scope="module")
def scores(read):
    return torch.rand(len(read), generator=torch.Generator().manual_seed(0)) * 3


def leap():
    row = next(row for row in ROWS if row.name == "leap")
    return row.build("AutoModelForCausalLM")


class Letters(HTMLParser):
    """The text of a page, with <br> as a new line."""

    def __init__(self):
        super().__init__()
        self.text, self.titles = "", []

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.text += "\n" if tag == "br" else ""
        self.titles += [value for name, value in attributes if name == "title"]


def test_every_letter_belongs_to_one_token(read):
    """Byte-level tokens: a letter of several bytes comes as several tokens with the same place in the text."""
    assert len(read) > 70
    reached = 0
    for start, end in read.spans:
        assert start in (reached, end)
        reached = max(reached, end)
    assert reached == len(TEXT)
    assert "".join(TEXT[start:end] for start, end in read.spans) == TEXT


def test_html_has_the_text_and_the_scale(read, scores):
    page = Letters()
    page.feed(to_html(read, scores, "a title <1>", CAPTION))
    assert TEXT in page.text
    scale = Scale.of(scores)
    assert page.text.startswith("a title <1>")
    assert re.search(rf"{scale.low:.2f}\s+{scale.high:.2f}\+\s+{CAPTION}$", page.text)  # one outlier is above it
    shown = sum(end > start for start, end in read.spans)
    assert len(page.titles) == shown
    assert page.titles[0] == f"'We': {scores[0]:.3g}"


def test_terminal_lines_keep_to_the_width_and_to_the_text(read, scores):
    for width in (24, 47, 200):
        colored = to_terminal(read, scores, CAPTION, width, color=True)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", colored).split("\n")
        assert "\x1b[38;5;16;48;5;" in colored
        assert max(map(len, lines)) <= width
        assert re.sub(r"\s", "", TEXT) in re.sub(r"\s", "", "".join(lines))
        assert colored.count("\x1b[0m") == colored.count("\x1b[38")
    plain = to_terminal(read, scores, CAPTION, 60, color=False)
    assert "\x1b" not in plain
    best = int(scores.argmax())
    start, end = read.spans[best]
    if TEXT[start:end].strip():
        assert f"[{TEXT[start:end].strip()}]" in plain


def test_colours_go_from_white_to_orange_and_letters_stay_readable():
    scale = Scale.of(torch.tensor([1.0, 2.0, 3.0]))
    assert shade(scale.share(1.0)) == RAMP[0]
    assert shade(scale.share(99.0)) == RAMP[-1]
    assert Scale.of(torch.ones(4)).share(1.0) == 0.0  # all alike: nothing is coloured

    def luminance(color):
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    shades = [luminance(shade(i / 20)) for i in range(21)]
    assert shades == sorted(shades, reverse=True)
    assert (shades[-1] + 0.05) / 0.05 > 4.5, "black letters on the last colour"


def test_pictures_are_drawn_and_nothing_is_cut_off(read, scores, tmp_path):
    figure = draw(read, scores, "a title", CAPTION, columns=60)
    width, height = figure.get_size_inches() * figure.dpi
    for text in [*figure.texts, *figure.axes[0].texts]:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    letters = "".join(text.get_text() for text in figure.axes[0].texts)
    assert re.sub(r"\s", "", letters) == re.sub(r"\s", "", TEXT)


def test_an_importance_shows_itself(tmp_path):
    text = "w5 w9 w33 w12 w8"
    found = importance(leap(), word_tokenizer(), text)
    assert found.to_html().startswith("<!doctype html>")
    assert found._repr_html_() == found.to_html(page=False)
    assert "leap (LeapForCausalLM)" in found.to_html()
    assert found.save_html(tmp_path / "new" / "map.html").read_text("utf-8") == found.to_html()
    assert "w33" in found.to_terminal(color=False)
    with pytest.raises(ValueError, match="at least 24"):
        found.to_terminal(width=3)
    for name, figure in {
        "text": found.draw(),
        "layers": found.draw_layers(),
        "influence": influence(leap(), word_tokenizer(), text).draw(),
        "maps": attention_maps(leap(), word_tokenizer(), text).draw(layers=[0, 2], heads=[1]),
    }.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 3000
    with pytest.raises(ValueError, match="layers 0 to 2 and heads 0 to 1"):
        attention_maps(leap(), word_tokenizer(), text).draw(layers=[3])


def test_special_tokens_are_shown_but_are_never_the_top():
    tokenizer = word_tokenizer()
    found = importance(leap(), tokenizer, "w5 <eos> w9 w4")
    place = found.tokens.index("<eos>")
    assert place == 1
    assert "&lt;eos&gt;" in found.to_html()
    assert place not in [i for _, _, i in found.top(9)]
