"""Causal DANet: the state against the whole text, and every mode of generate() with the cache against without."""

import pytest
import torch
import torch._dynamo.testing
from transformers import DynamicCache, StaticCache, set_seed

from hf_linear_attn import DanetForCausalLM, RecurrentCache
from hf_linear_attn.modeling import danet_block, danet_context
from tests.danet.models import DECODERS, VOCAB, config, decoder, pad, tokens

TOL = {"rtol": 1e-9, "atol": 1e-9}
PURE = [name for name in DECODERS if "softmax" not in name]
MIXED = "l_sl_sw cosine"


@pytest.mark.parametrize("cuts", [[5, 1, 1, 1, 6], [4, 4, 6], [1] * 14, [13, 1]])
@pytest.mark.parametrize("name", DECODERS)
def test_any_pieces_equal_the_whole(name, cuts):
    model = decoder(name)
    ids = tokens(2, 14)
    whole = model(ids, use_cache=False).logits
    cache, outs = RecurrentCache(config=model.config), []
    for part in ids.split(cuts, dim=1):
        outs.append(model(part, cache=cache).logits)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, **TOL)


@pytest.mark.parametrize("side", ["left", "right", "both", "inside"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_state_after_a_padded_prompt_is_that_of_the_unpadded(name, side):
    if "@softmax" in name and side != "left":
        pytest.skip("padding that the softmax windows would count is refused")
    model = decoder(name)
    rows, more = [tokens(n, seed=n) for n in (11, 6, 3)], tokens(3, 4, seed=8)
    ids, mask = pad(rows, side, 13)
    cache = RecurrentCache(config=model.config)
    model(ids, attention_mask=mask, cache=cache)
    for step in range(4):
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
        out = model(more[:, step : step + 1], attention_mask=mask, cache=cache).logits[:, 0]
    for i, row in enumerate(rows):
        alone = model(torch.cat((row, more[i]))[None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(out[i], alone, **TOL)


@pytest.mark.parametrize("name", PURE)
def test_after_packed_documents_the_last_one_goes_on(name):
    model = decoder(name)
    lengths = [6, 2, 5]
    rows = [tokens(n, seed=n) for n in lengths]
    cache = RecurrentCache(config=model.config)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model(torch.cat(rows)[None], position_ids=positions, cache=cache)
    more = tokens(1, 3, seed=7)
    out = model(more, cache=cache).logits
    alone = model(torch.cat((rows[-1], more[0]))[None], use_cache=False).logits[:, -3:]
    torch.testing.assert_close(out, alone, **TOL)


@pytest.mark.parametrize("name", PURE)
def test_the_state_does_not_grow(name):
    model = decoder(name, max_position_embeddings=600)
    sizes = []
    for length in (10, 500):
        cache = RecurrentCache(config=model.config)
        model(tokens(1, length), cache=cache)
        sizes.append(cache.state_size())
    assert sizes[0] == sizes[1] > 0


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "returns": {"do_sample": True, "num_return_sequences": 3},
}


def generate(model, ids, mask=None, seed=0, new=9, **kwargs):
    set_seed(seed)
    model.generation_config.eos_token_id = None
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


def assert_same(a, b):
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)


# The other modes run on three decoders in every run (test_matrix_generate).
OFTEN = ("greedy", "beam")


@pytest.mark.parametrize("mode", [pytest.param(x, marks=[pytest.mark.slow] * (x not in OFTEN)) for x in MODES])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_the_cache_equals_without(name, mode):
    model = decoder(name)
    rows = [tokens(n, seed=n) for n in (9, 5, 2)]
    ids, mask = pad(rows, "left", 9)
    with_cache = generate(model, ids, mask, **MODES[mode])
    assert_same(with_cache, generate(model, ids, mask, use_cache=False, **MODES[mode]))
    if mode in ("greedy", "beam"):
        returns = MODES[mode].get("num_return_sequences", 1)
        for i, row in enumerate(rows):
            alone = generate(model, row[None], **MODES[mode]).sequences[:, len(row) :]
            assert torch.equal(with_cache.sequences[i * returns : (i + 1) * returns, 9:], alone)


def test_control_windows_that_count_columns_are_seen(monkeypatch):
    """Broken on purpose: without the order that puts real tokens first, padding shifts the windows."""
    layout = danet_context.token_layout

    def by_columns(*args):
        return layout(*args)._replace(order=None, slots=None)

    monkeypatch.setattr(danet_context, "token_layout", by_columns)
    for name in (MIXED, "l_sl_g learned"):
        with pytest.raises(AssertionError):
            test_generation_with_the_cache_equals_without(name, "greedy")


def test_control_documents_that_share_a_state_are_seen(monkeypatch):
    """Broken on purpose: a state that forgets which tokens are of its document is noticed."""
    monkeypatch.setattr(danet_block.DenseAttentionState, "count", property(lambda state: state[1] + 1))
    with pytest.raises(AssertionError):
        test_after_packed_documents_the_last_one_goes_on(MIXED)


def test_beams_really_change_rows():
    assert (generate(decoder(MIXED), tokens(2, 6), num_beams=4).beam_indices.diff(dim=1) != 0).any()


@pytest.mark.parametrize(
    "how", ["prefill_chunk_size=4", "prefill_chunk_size=1", "static", "static chunks", "offloaded"]
)
@pytest.mark.parametrize("name", [MIXED, "sw_sw_g swiglu", "g_softmax_sw", "swa@softmax_g_l", "l@softmax_sl@softmax_g"])
def test_ways_to_hold_the_state_agree(name, how):
    if how == "offloaded" and not torch.cuda.is_available() and "softmax" in name:
        pytest.skip("Transformers offloads keys and values with CUDA streams")
    model = decoder(name)
    ids, mask = pad([tokens(n, seed=n) for n in (9, 5)], "left", 9)
    options = {
        "prefill_chunk_size=4": {"prefill_chunk_size": 4},
        "prefill_chunk_size=1": {"prefill_chunk_size": 1},
        "static": {"cache_implementation": "static"},
        "static chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
        "offloaded": {"cache_implementation": "offloaded"},
    }[how]
    assert_same(generate(model, ids, mask, **options), generate(model, ids, mask))


@pytest.mark.parametrize("cache_class", [RecurrentCache, DynamicCache, StaticCache])
def test_a_conversation_goes_on_from_its_cache(cache_class):
    model = decoder("sw_sw_g swiglu")
    ids = tokens(2, 7)
    whole = generate(model, ids, new=12)
    options = {"max_cache_len": 64} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    first = generate(model, ids, new=5, cache=cache)
    second = generate(model, first.sequences, new=7, cache=first.cache)
    assert torch.equal(second.sequences, whole.sequences)


@pytest.mark.parametrize("name", [*PURE, "g_softmax_sw"])
def test_assisted_decoding_equals_greedy(name):
    model, helper = decoder(name), decoder(name)
    with torch.no_grad():
        for parameter in helper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ids = tokens(1, 7)
    greedy = generate(model, ids, new=12)
    assert torch.equal(generate(model, ids, new=12, assistant_model=helper).sequences, greedy.sequences)
    assert torch.equal(generate(model, ids, new=12, prompt_lookup_num_tokens=2).sequences, greedy.sequences)


@pytest.mark.parametrize("remove", [1, 3, 6])
@pytest.mark.parametrize("name", PURE)
def test_undone_tokens_leave_no_trace(name, remove):
    model = decoder(name)
    rows = [tokens(n, seed=n) for n in (9, 5)]
    ids, mask = pad(rows, "left", 9)
    tail, other = tokens(2, 6, seed=3), tokens(2, 3, seed=4)
    cache = RecurrentCache(config=model.config)
    cache.activate_past_recording()
    model(ids, attention_mask=mask, cache=cache)
    cache.crop(0)
    model(tail[:, :2], cache=cache)
    model(tail[:, 2:], cache=cache)
    cache.crop(-remove)
    out = model(other, cache=cache).logits
    for i, row in enumerate(rows):
        text = torch.cat((row, tail[i, : 6 - remove], other[i]))[None]
        torch.testing.assert_close(out[i], model(text, use_cache=False).logits[0, -3:], **TOL)


@torch.no_grad()
def test_a_saved_conversation_resumes_and_forks(tmp_path):
    model = decoder("g_softmax_sw")
    ids, more = tokens(2, 7), tokens(2, 2, seed=5)
    cache = RecurrentCache(config=model.config)
    model(ids, cache=cache)
    cache.save(tmp_path / "state.safetensors")
    fork = cache.fork()
    expected = model(more, cache=cache).logits
    loaded = RecurrentCache.load(tmp_path / "state.safetensors", model.config)
    assert torch.equal(model(more, cache=loaded).logits, expected)
    assert torch.equal(model(more, cache=fork).logits, expected)


def test_embeddings_in_place_of_tokens():
    model = decoder("sw_sw_g swiglu")
    ids = tokens(2, 6)
    from_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, pad_token_id=0)
    assert torch.equal(from_embeddings, model.generate(ids, max_new_tokens=5, pad_token_id=0)[:, 6:])


def test_logits_to_keep():
    model = decoder("g")
    ids = tokens(2, 6)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:], **TOL)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]], **TOL)


def test_the_loss_shifts_inside_documents_and_texts():
    model = decoder("sw_sw_g swiglu")
    rows = [tokens(n, seed=n) for n in (6, 4)]
    each = [(model(row[None], labels=row[None]).loss, len(row) - 1) for row in rows]
    expected = sum(loss * n for loss, n in each) / sum(n for _, n in each)
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    torch.testing.assert_close(model(packed, position_ids=positions, labels=packed).loss, expected)
    ids, mask = pad(rows, "left", 8)
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=ids).loss, expected)


@torch.no_grad()
def test_decoding_compiles_once():
    torch._dynamo.reset()
    model = decoder("sw_sw_g swiglu", dtype=torch.float32)
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = tokens(1, 12)
    model(ids[:, :6], cache=cache)
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    outs = [step(ids[:, t : t + 1], cache=cache).logits for t in range(6, 12)]
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(outs, dim=1), model(ids, use_cache=False).logits[:, 6:], rtol=1e-4, atol=1e-4)


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
    model = decoder("sw_sw_g swiglu", dtype=torch.float32)
    out = generate(model, tokens(1, 3), new=60)
    assert out.sequences.shape == (1, 63)
    assert out.sequences.max() < VOCAB
    assert all(torch.isfinite(x).all() for x in out.logits)


def test_learned_positions_end():
    with pytest.raises(ValueError, match="position 64"):
        generate(decoder("l_sl_g learned"), tokens(1, 60), new=9)
