"""A conversation's state on disk: saved through safetensors, resumed in another process, refused where it does not belong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import resume
from common.batches import tokens
from common.families import CAUSAL, causal_rows, first_rows
from common.generation import NEW, PROMPT, generate
from safetensors.torch import save_file

from hf_linear_attn import RecurrentCache

BEFORE = 5


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Folder -> for each row a conversation that was begun here and ended in one other process."""
    folder = tmp_path_factory.mktemp("conversations")
    for row in CAUSAL:
        model = row.causal_lm(torch.float64)
        here = folder / row.name
        model.save_pretrained(here)
        begun = generate(model, tokens(2, PROMPT), new=BEFORE)
        begun.cache.save(here / "cache.safetensors")
        torch.save(begun.sequences, here / "begun.pt")
    source = str(Path(__file__).parents[1] / "src")
    subprocess.run(
        [sys.executable, resume.__file__, str(folder), str(NEW - BEFORE)],
        env={**os.environ, "PYTHONPATH": source},
        check=True,
        capture_output=True,
    )
    return folder


@causal_rows
def test_resumes_in_another_process(row, resumed):
    ended = torch.load(resumed / row.name / "ended.pt")
    assert torch.equal(ended, generate(row.causal_lm(torch.float64), tokens(2, PROMPT)).sequences)


@causal_rows
def test_saved_state_is_the_same_to_the_bit(row, tmp_path):
    model = row.causal_lm()
    with torch.no_grad():
        cache = model(tokens(2, 9), use_cache=True).cache
        cache.save(tmp_path / "c.safetensors")
        loaded = RecurrentCache.load(tmp_path / "c.safetensors", model.config)
        assert loaded.get_seq_length() == cache.get_seq_length() == 9
        step = tokens(2, 3, seed=1)
        first, second = (model(step, cache=c).logits for c in (cache, loaded))
    assert torch.equal(first, second)


@first_rows
def test_refuses_files_and_models_that_do_not_fit(row, tmp_path):
    model = row.causal_lm()
    with pytest.raises(ValueError, match="not seen a token"):
        RecurrentCache(config=model.config).save(tmp_path / "empty.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not a saved cache"):
        RecurrentCache.load(tmp_path / "other.safetensors", model.config)
    with torch.no_grad():
        model(tokens(2, 4), use_cache=True).cache.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"3 layers.*describes 2"):
        RecurrentCache.load(tmp_path / "c.safetensors", row.config(**row.layers(2)))
    wider = row.causal_lm(hidden_size=32)
    cache = RecurrentCache.load(tmp_path / "c.safetensors", wider.config)
    with pytest.raises(ValueError, match="another model"):
        wider(tokens(2, 1), cache=cache)
