"""The small LEAP in the package: there, small, trained, and what `generate` takes when no model is named."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_linear_attn import PACKAGED_MODEL
from hf_linear_attn.cli.main import main
from hf_linear_attn.training.text_data import EXCERPT_FOLDER


def test_it_is_below_five_megabytes_and_holds_what_loading_needs():
    files = {file.name: file.stat().st_size for file in Path(PACKAGED_MODEL).iterdir() if file.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_report.json"} <= set(files)
    assert sum(files.values()) < 5_000_000


def test_it_is_trained():
    """On a speech that it has not seen, one token in forty-odd is a fair guess; an untrained model has one in 4096."""
    model = AutoModelForCausalLM.from_pretrained(PACKAGED_MODEL).eval()
    assert model.dtype == torch.float32
    speech = (EXCERPT_FOLDER / "1863-Lincoln-1.txt").read_text()[:4000]  # years in 3 are test
    ids = AutoTokenizer.from_pretrained(PACKAGED_MODEL)(speech, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 150


def test_generate_without_a_model_takes_it(capsys):
    started = time.perf_counter()
    assert main(["generate", "My fellow citizens", "--max-new-tokens", "8", "--greedy"]) == 0
    assert time.perf_counter() - started < 60
    printed = capsys.readouterr().out
    assert printed.startswith("My fellow citizens")
    assert "8 tokens" in printed


def test_a_folder_without_a_prompt_is_not_taken_for_a_prompt(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", PACKAGED_MODEL])
    assert stop.value.code == 2
    assert "give the text to continue" in capsys.readouterr().err


@pytest.mark.slow
def test_the_small_models_are_rebuilt_with_their_cards(tmp_path):
    """`make models` in a few steps: folders that the Auto classes load, with a card and without a pickle."""
    from model_cards.build_models import RECIPES
    from model_cards.build_models import main as build

    build(["--quick", "--cpu", "--threads", "1", "--output", str(tmp_path)])
    for name, _ in RECIPES.values():
        assert (tmp_path / name / "README.md").read_text().startswith("---\n")
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert not list((tmp_path / name).rglob("*.bin"))
