"""A small text and small options, so that a whole training run takes a second or two."""

from pathlib import Path

import pytest

from hf_linear_attn.training.options import TrainingOptions

SENTENCES = (
    "The people of this country ask for peace and for work. ",
    "We have paid a part of the public debt this year. ",
    "A new road leads from the river to the western states. ",
    "Congress will find the report of the secretary with this message. ",
)


@pytest.fixture(autouse=True)
def cache_in_temporary_folder(tmp_path_factory, monkeypatch):
    """Tokenizers and ids go to a folder of the test session, not to the user's cache."""
    monkeypatch.setenv("HF_LINEAR_ATTN_CACHE", str(tmp_path_factory.getbasetemp() / "hf-linear-attn-cache"))


@pytest.fixture
def draws():
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def pictures_stay_blank(request, monkeypatch):
    """A picture takes half a second, longer than a run. The others write an empty file."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: Path(file).touch())


@pytest.fixture
def text_file(tmp_path):
    """About 25 kB of four sentences in changing order."""
    file = tmp_path / "messages.txt"
    file.write_text("".join(SENTENCES[(i * i) % 4] + f"This is message {i}. " for i in range(350)))
    return file


@pytest.fixture
def tiny(tmp_path, text_file):
    """Options of a tiny run, with changes."""

    def make(**changes):
        values = {
            "family": "gpt2",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "data": [str(text_file)],
            "vocab_size": 300,
            "block_length": 16,
            "batch_size": 4,
            "steps": 6,
            "log_every": 1,
            "eval_every": 3,
            "eval_tokens": 64,
            "final_eval_tokens": 128,
            "save_every": 3,
            "cpu": True,
            "quiet": True,
            "output": str(tmp_path / "run"),
        }
        return TrainingOptions(**(values | changes))

    return make
