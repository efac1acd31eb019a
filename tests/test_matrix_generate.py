"""generate(): with a state it writes what it writes without one, in every mode (the models compute in float64)."""

import copy

import pytest
import torch
from common.batches import left_padded, tokens
from common.caches import CACHE_NAME
from common.families import (
    CAUSAL,
    FIRST,
    FIRST_STATES,
    HYBRIDS,
    causal_number_rows,
    causal_rows,
    first_rows,
    first_state_rows,
    rows_and,
    state_rows,
)
from common.generation import (
    NEW,
    PROMPT,
    assert_same_text,
    check_batch_operations,
    check_cache,
    check_rows_alone,
    generate,
    texts,
)
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from hf_linear_attn import RecurrentCache

pytestmark = pytest.mark.long

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 4},
    "beam-several-returns": {"num_beams": 4, "num_return_sequences": 2},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "several-returns": {"do_sample": True, "num_return_sequences": 3},
}


@rows_and("mode", MODES, CAUSAL, lambda row, mode: row in FIRST or mode == "greedy")
def test_state_or_not_gives_the_same_text(row, mode):
    check_cache(row.causal_lm(torch.float64), **mode)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam"])
@causal_number_rows
def test_left_padded_batch(row, mode):
    model = row.causal_lm(torch.float64)
    check_cache(model, padded=True, **mode)
    check_rows_alone(model, **mode)


@first_rows
def test_beams_change_places(row):
    """Without this, agreement of beam search would say nothing about reordering."""
    beams = generate(row.causal_lm(torch.float64), tokens(3, PROMPT), num_beams=4).beam_indices
    assert (beams.diff(dim=1) != 0).any()


@pytest.mark.parametrize("size", [1, 4])
@state_rows
def test_prefill_in_chunks(row, size):
    model = row.causal_lm(torch.float64)
    ids, mask = left_padded(texts())
    assert_same_text(generate(model, ids, prefill_chunk_size=size), generate(model, ids))
    assert_same_text(generate(model, ids, mask, prefill_chunk_size=size), generate(model, ids, mask))


CACHE_USES = {"greedy": {}, "beam": {"num_beams": 3}, "chunks": {"prefill_chunk_size": 4}}


def seldom(row, kind, use) -> bool:
    """Whether it is a slow test: all nine run every time for a row of each family, one for the others."""
    return row not in FIRST and (kind, use) != ("static", "chunks" if row in HYBRIDS else "beam")


@pytest.mark.parametrize(
    ("row", "kind", "use"),
    [
        pytest.param(row, kind, use, id=f"{row.name}-{kind}-{use}", marks=[pytest.mark.slow] * seldom(row, kind, use))
        for row in CAUSAL + HYBRIDS
        for kind in ("dynamic", "static", "offloaded")
        for use in CACHE_USES
    ],
)
def test_cache_implementations(row, kind, use):
    if kind == "offloaded" and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("Transformers' offloaded cache makes a stream, which a CUDA build of PyTorch has on a GPU alone")
    options = CACHE_USES[use]
    model = row.causal_lm(torch.float64)
    ids, mask = left_padded(texts())
    assert_same_text(
        generate(model, ids, mask, cache_implementation=kind, **options), generate(model, ids, mask, **options)
    )


@pytest.mark.parametrize("kind", [RecurrentCache, DynamicCache, StaticCache])
@state_rows
def test_a_cache_of_the_users_own(row, kind):
    model = row.causal_lm(torch.float64)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    ids = tokens(3, PROMPT)
    whole = generate(model, ids)
    begun = generate(model, ids, new=5, cache=cache)
    assert begun.cache is cache
    written = torch.ones_like(begun.sequences)  # the id of padding may be among what was written
    ended = generate(model, begun.sequences, written, new=NEW - 5, cache=cache)
    ended.logits = begun.logits + ended.logits
    assert_same_text(ended, whole)


@first_rows
def test_quantized_cache_is_refused(row):
    with pytest.raises(ValueError, match=r"[Qq]uantized"):
        generate(row.causal_lm(), tokens(1, 4), cache_implementation="quantized")


@state_rows
def test_going_on_from_a_cache(row):
    model = row.causal_lm(torch.float64)
    ids = tokens(3, PROMPT)
    whole = generate(model, ids)
    begun = generate(model, ids, new=5)
    assert isinstance(begun.cache, RecurrentCache)
    assert begun.cache.get_seq_length() == PROMPT + 5 - 1
    fork, copied = begun.cache.fork(), copy.deepcopy(begun.cache)
    written = torch.ones_like(begun.sequences)  # the id of padding may be among what was written
    for cache in (begun.cache, fork, copied):
        ended = generate(model, begun.sequences, written, new=NEW - 5, cache=cache)
        assert torch.equal(ended.sequences, whole.sequences)


@state_rows
def test_forks_are_independent(row):
    model = row.causal_lm(torch.float64)
    with torch.no_grad():
        cache = model(tokens(2, 9), use_cache=True).cache
        fork = cache.fork()
        model(tokens(2, 5, seed=1), cache=fork)
        logits = model(tokens(2, 1, seed=2), cache=cache).logits
        expected = model(torch.cat([tokens(2, 9), tokens(2, 1, seed=2)], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


# Static layers of Transformers themselves cannot be written outside of inference mode if they were made in it.
ROWS_AND_KINDS = [(row, RecurrentCache) for row in FIRST_STATES] + [(row, StaticCache) for row in FIRST]


@pytest.mark.parametrize("change", ["as it is", "rows", "fork", "reset"])
@pytest.mark.parametrize(
    ("row", "kind"), [pytest.param(row, kind, id=f"{row.name}-{kind.__name__}") for row, kind in ROWS_AND_KINDS]
)
def test_a_cache_from_inference_mode_serves_outside_of_it(row, kind, change):
    model = row.causal_lm(torch.float64)
    ids = tokens(2, 9)
    with torch.inference_mode():
        cache = kind(config=model.config, **({} if kind is RecurrentCache else {"max_cache_len": 32}))
        model(ids, cache=cache)
        if change == "rows":
            cache.reorder_cache(torch.tensor([1, 0]))
            ids = ids.flip(0)
        cache = copy.deepcopy(cache) if change == "fork" else cache
    if change == "reset":
        cache.reset()
        with torch.no_grad():
            model(ids, cache=cache)
    step = tokens(2, 1, seed=2)
    with torch.no_grad():
        logits = model(step, cache=cache).logits
        expected = model(torch.cat([ids, step], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


@first_state_rows
def test_a_copy_of_a_recording_cache_has_no_copy_of_the_model(row):
    model = row.causal_lm()
    cache = RecurrentCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(1, 5), cache=cache)
        copied = cache.fork()
        for ours, theirs in zip(cache.layers, copied.layers):
            assert [advance for advance, _ in getattr(ours, "_replay", [])] == [
                advance for advance, _ in getattr(theirs, "_replay", [])
            ]
        for one in (cache, copied):
            one.crop(-2)
        step = tokens(1, 1, seed=2)
        assert torch.equal(*(model(step, cache=one).logits for one in (cache, copied)))


@causal_rows
def test_inputs_embeds(row):
    model = row.causal_lm(torch.float64)
    ids, mask = left_padded(texts())
    embeds = model.get_input_embeddings()(ids)
    output = generate(model, mask=mask, inputs_embeds=embeds)
    assert torch.equal(output.sequences, generate(model, ids, mask).sequences[:, PROMPT:])


@causal_rows
def test_inputs_embeds_are_not_cut_into_chunks(row):
    """Transformers cuts token ids alone: embeddings are read in one call, and the text is the same."""
    model = row.causal_lm(torch.float64)
    embeds = model.get_input_embeddings()(tokens(2, PROMPT))
    expected = generate(model, inputs_embeds=embeds)
    assert_same_text(generate(model, inputs_embeds=embeds, prefill_chunk_size=4), expected)


@state_rows
def test_reset(row):
    model = row.causal_lm(torch.float64)
    for cache in (RecurrentCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        with torch.no_grad():
            model(tokens(2, 9, seed=1), cache=cache)
            cache.reset()
            assert cache.get_seq_length() == 0
            logits = model(tokens(2, 7), cache=cache).logits
            torch.testing.assert_close(logits, model(tokens(2, 7), use_cache=False).logits, atol=1e-9, rtol=0)


@state_rows
def test_batch_operations(row):
    check_batch_operations(row.causal_lm(torch.float64))


@causal_rows
def test_state_does_not_grow(row):
    model = row.causal_lm(max_position_embeddings=10_000)
    sizes = []
    with torch.no_grad():
        for length in (10, 10_000):
            sizes.append(model.model(tokens(1, length), use_cache=True).cache.state_size())
    assert sizes[0] == sizes[1] > 0


@causal_rows
def test_only_static_caches_are_compiled_unasked(row):
    """On a GPU generate() compiles for static caches; with its own cache it starts at once, as Transformers' models do."""
    model = row.causal_lm()
    options = GenerationConfig(compile_config=CompileConfig())
    options.compile_config._compile_all_devices = True  # the CPU, too, so that the choice shows here
    static = StaticCache(config=model.config, max_cache_len=16)
    if static.is_compileable:
        assert model._valid_auto_compile_criteria({CACHE_NAME: static}, options)
    assert not model._valid_auto_compile_criteria({CACHE_NAME: RecurrentCache(config=model.config)}, options)
