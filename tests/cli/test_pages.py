"""The commands of the pages run, in a page's order, with fewer steps.

Some pages run elsewhere: serve.md in tests/integrations/test_serving.py, and the commands that distil, with smaller teachers than
those of families/sea.md, families/hedgehog.md and howto/linearize.md, in tests/sea/test_distill_command.py and
tests/hedgehog/test_hedgehog_distillation.py.
"""

import re
import shlex
from pathlib import Path

import pytest
from hub.conftest import point_to
from hub.fake_hub import FakeHub
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from hf_linear_attn import PACKAGED_MODEL
from hf_linear_attn.cli.main import main

pytestmark = pytest.mark.thorough

DOCS = Path(__file__).parents[2] / "docs"
ELSEWHERE = {
    DOCS / name for name in ("howto/serve.md", "families/sea.md", "families/hedgehog.md", "howto/linearize.md")
}
PAGES = [page for page in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))] if page not in ELSEWHERE]


def commands(page: Path) -> list[str]:
    """Lines that begin with our command, continued ones joined."""
    text = page.read_text().replace("\\\n", " ")
    return re.findall(r"^(?: {4}|\$ )?(hf-linear-attn .*)$", text, flags=re.MULTILINE)


def shortened(command: str) -> list[str]:
    """Its words, with two steps where it trains for longer, and a sample where it reads whole texts to measure itself."""
    words = shlex.split(re.sub(r"--(steps|epochs) \d+", "--steps 2", command))[1:]
    samples = {"train": ["--eval-tokens", "2048", "--final-eval-tokens", "2048"], "evaluate": ["--max-tokens", "2048"]}
    return words + ([] if "classification" in words else samples.get(words[0], []))


def test_nothing_is_left_out():
    """A page that shows our command in a way that `commands` does not see would run nowhere."""
    for page in PAGES:
        seen = re.findall(r"^\s*(?:\$ )?hf-linear-attn ", page.read_text(), flags=re.MULTILINE)
        assert len(commands(page)) == len(seen), page


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: str(p.relative_to(DOCS.parent)))
def test_page(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with FakeHub(user="me") as hub:
        point_to(hub, monkeypatch, tmp_path / "hub-cache")
        teacher = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=1024)
        AutoModelForCausalLM.from_config(teacher).push_to_hub("openai-community/gpt2")
        AutoTokenizer.from_pretrained(PACKAGED_MODEL).push_to_hub("openai-community/gpt2")
        for command in commands(page):
            capsys.readouterr()
            assert main(shortened(command)) == 0, (command, capsys.readouterr().err)
            assert capsys.readouterr().out.strip(), command
