"""generate() with its cache equals generate() without one, in every mode; the cache is broken on purpose to show that
it matters.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_linear_attn.modeling import sparse_attention
from hf_linear_attn.modeling.recurrent_cache import RecurrentCache
from hf_linear_attn.modeling.sea_cache import SeaCacheLayer

from .hosts import CAUSAL_HOSTS, make_ids, make_student

MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 5},
    "beam": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


def generate(student, ids, **arguments):
    torch.manual_seed(3)
    return student.generate(ids, max_new_tokens=9, min_new_tokens=9, **arguments)


HOSTS_AND_MODES = [("llama", mode) for mode in MODES] + [
    ("opt", "greedy"),
    ("opt", "beam"),
    ("gpt2", "greedy"),
    ("gpt2", "beam"),
]


@pytest.mark.parametrize(("host", "mode"), HOSTS_AND_MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_cache_equals_generation_without(host, mode, padded):
    student = make_student(host, softmax_layers=[1] if host == "llama" and padded else [])
    ids, mask = make_ids(3, 14), torch.ones(3, 14, dtype=torch.long)
    if padded:
        mask[0, :5] = mask[2, :1] = 0
        ids = ids.masked_fill(mask == 0, 0)
    plain = {
        name: value for name, value in MODES[mode].items() if name not in ("prefill_chunk_size", "cache_implementation")
    }
    expected = generate(student, ids, attention_mask=mask, use_cache=False, **plain)
    assert torch.equal(generate(student, ids, attention_mask=mask, **MODES[mode]), expected)
    if mode == "greedy":
        for row in range(3):
            alone = generate(student, ids[row : row + 1, mask[row].bool()], do_sample=False)
            assert torch.equal(alone[0, -9:], expected[row, -9:])


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


@pytest.mark.parametrize("host", CAUSAL_HOSTS)
def test_logits_step_by_step_equal_the_full_forward(host):
    student, ids = make_student(host, backend="chunked"), make_ids(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :4] = 0
    full = student(ids, attention_mask=mask).logits
    cache, pieces, start = RecurrentCache(config=student.config), [], 0
    for size in (9, 1, 1, 6, 1, 12):
        stop = start + size
        out = student(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
        pieces.append(out.logits)
        start = stop
    logits = torch.cat(pieces, 1)
    torch.testing.assert_close(logits[mask.bool()], full[mask.bool()], atol=1e-4, rtol=1e-3)


class NoReorder(SeaCacheLayer):
    _layer_type = None

    def _map_rows(self, function):
        """Forget to reorder."""


class NoState(SeaCacheLayer):
    _layer_type = None

    def get_state(self):
        """Forget the estimator's past."""
        return None


@pytest.mark.parametrize(("broken", "mode"), [(NoReorder, "beam"), (NoState, "greedy")])
def test_a_broken_cache_is_noticed(broken, mode):
    student, ids = make_student("llama"), make_ids(3, 14)
    cache = DynamicCache(config=student.config)
    cache.layers = [broken() for _ in cache.layers]
    expected = generate(student, ids, use_cache=False, **MODES[mode])
    assert not torch.equal(generate(student, ids, cache=cache, **MODES[mode]), expected)


def test_generation_continues_from_a_cache_and_forks():
    student, ids = make_student("llama"), make_ids(1, 10)
    cache = RecurrentCache(config=student.config)
    first = student.generate(ids, max_new_tokens=6, do_sample=False, cache=cache)
    fork = cache.fork()
    longer = torch.cat([first, make_ids(1, 4, seed=8)], 1)
    expected = student.generate(longer, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(student.generate(longer, max_new_tokens=6, do_sample=False, cache=cache), expected)
    assert torch.equal(student.generate(longer, max_new_tokens=6, do_sample=False, cache=fork), expected)


def test_a_cache_can_be_saved_and_loaded(tmp_path):
    student, ids = make_student("gpt2", softmax_layers=[0]), make_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache = RecurrentCache(config=student.config)
    student(ids, attention_mask=mask, cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = RecurrentCache.load(tmp_path / "cache.safetensors", student.config)
    assert loaded.state_size() == cache.state_size()
    new = make_ids(2, 3, seed=4)
    expected = student(new, cache=cache).logits
    assert torch.equal(student(new, cache=loaded).logits, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_can_be_undone_exactly(padded):
    student, ids = make_student("llama", softmax_layers=[1]), make_ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    cache = RecurrentCache(config=student.config)
    cache.activate_past_recording()
    student(ids[:, :8], attention_mask=mask[:, :8], cache=cache)
    cache.crop(0)
    student(ids[:, 8:14], attention_mask=mask[:, :14], cache=cache)
    cache.crop(-4)
    after = student(ids[:, 10:], attention_mask=mask, cache=cache).logits
    expected = student(ids, attention_mask=mask).logits[:, 10:]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-3)


def test_prompt_lookup_decoding_equals_greedy():
    student = make_student("llama")
    ids = make_ids(1, 6).repeat(1, 3)
    expected = student.generate(ids, max_new_tokens=12, do_sample=False)
    looked_up = student.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, expected)


def test_state_beside_keys_and_values_has_a_fixed_size():
    student, sizes = make_student("llama"), []
    for length in (5, 20, 40):
        cache = RecurrentCache(config=student.config)
        student(make_ids(1, length), cache=cache)
        sizes.append(sum(s.numel() for layer in cache.layers for s in layer.get_state()))
    assert len(set(sizes)) == 1


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
