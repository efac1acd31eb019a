"""Causal DANet: what its caches, scales and positions refuse, and how far they reach; the rest is in the matrix."""

import pytest
import torch
from common.generation import generate
from danet.models import VOCAB, config, decoder, tokens

from hf_linear_attn import DanetForCausalLM, RecurrentCache


def test_a_cache_of_another_model_or_batch_is_refused():
    model = decoder("sw_sw_g swiglu")
    other = decoder("g", num_hidden_layers=2)
    with pytest.raises(ValueError, match="does not belong"):
        model(tokens(1, 3), cache=RecurrentCache(config=other.config))
    cache = RecurrentCache(config=model.config)
    model(tokens(2, 3), cache=cache)
    with pytest.raises(ValueError, match="2 rows"):
        model(tokens(3, 1), cache=cache)


def test_the_scale_of_the_whole_text_has_no_state():
    model = DanetForCausalLM(config(is_causal=True, scale_mode="valid_length")).eval()
    assert model.config.use_cache is False
    with pytest.raises(ValueError, match="scale_mode"):
        model(tokens(1, 3), use_cache=True)
    out = model.generate(tokens(1, 4), max_new_tokens=3, use_cache=False, pad_token_id=0)
    assert out.shape == (1, 7)


def test_generation_goes_beyond_the_scale_length():
    model = decoder("sw_sw_g swiglu", dtype=torch.float32, eos_token_id=None)
    out = generate(model, tokens(1, 3), new=60)
    assert out.sequences.shape == (1, 63)
    assert out.sequences.max() < VOCAB
    assert all(torch.isfinite(x).all() for x in out.logits)


def test_learned_positions_end():
    with pytest.raises(ValueError, match="position 64"):
        generate(decoder("l_sl_g learned", eos_token_id=None), tokens(1, 60), new=9)
