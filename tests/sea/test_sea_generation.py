"""What a new token reads of the cache, and which caches are refused; that a cache changes no text is in the matrix."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_linear_attn.modeling.sea import sparse_attention
from hf_linear_attn.modeling.shared.states.cache import RecurrentCache

from .hosts import make_ids, make_student


def test_a_new_token_reads_k_keys_a_head_however_long_the_text(monkeypatch):
    """The keys are chosen before any is read, and the state beside keys and values keeps its size."""
    options = {"k": 4, "predictor_length": 128, "max_positions": 512, "backend": "chunked"}
    student = make_student("llama", host={"max_position_embeddings": 512}, **options)
    expand, pairs = sparse_attention.expand_pairs, []

    def counting(*arguments):
        found = expand(*arguments)
        pairs.append(len(found[1]))
        return found

    monkeypatch.setattr(sparse_attention, "expand_pairs", counting)
    read, sizes = [], []
    with torch.no_grad():
        for length in (100, 200, 400):
            cache = student(make_ids(1, length)).cache
            pairs.clear()
            student(make_ids(1, 1, seed=1), cache=cache)
            read.append(sum(pairs) / 2 / 4)  # of a layer and head: two layers, four heads
            sizes.append([tuple(x.shape) for x in cache.layers[0].get_state()])
    assert all(abs(keys - 4) <= 1 for keys in read), read
    assert sizes[0] == sizes[1] == sizes[2]


def test_caches_that_do_not_fit_are_refused():
    student, ids = make_student("llama"), make_ids()
    with pytest.raises(ValueError, match="does not belong to this model"):
        student(ids, cache=DynamicCache())
    cache = RecurrentCache(config=student.config)
    student(ids, cache=cache)
    with pytest.raises(ValueError, match="holds 2 rows"):
        student(ids[:1], cache=cache)
    small = StaticCache(config=student.config, max_cache_len=10)
    with pytest.raises(ValueError, match="static cache of 10 tokens"):
        student(ids, cache=small)
    with pytest.raises(ValueError, match="needs a causal host"):
        make_student("bert")(ids, cache=cache)
