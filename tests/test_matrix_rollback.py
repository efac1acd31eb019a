"""Undoing tokens, and what builds on it: assisted decoding and prompt lookup write exactly what greedy decoding writes."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import transformers
from common.batches import left_padded, tokens
from common.caches import CACHE_NAME, is_hybrid, skip_recording_windows
from common.families import (
    CAUSAL,
    FIRST,
    HYBRIDS,
    NUMBERS,
    STATES,
    causal_rows,
    first_rows,
    first_state_rows,
    state_rows,
)
from common.generation import PROMPT, assert_same_text, generate, texts
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from hf_linear_attn import RecurrentCache
from hf_linear_attn.modeling.shared.states.state_layer import RecurrentStateLayer

# The calls that come after recording starts (number of tokens each), and how many of their tokens are undone.
CALLS = {
    "part-of-a-chunk": ([7], 3),
    "a-whole-chunk": ([7], 7),
    "steps": ([1, 1, 1, 1], 2),
    "a-chunk-and-steps": ([6, 1, 1], 4),
    "steps-and-a-chunk": ([1, 1, 9], 2),
    "nothing": ([4, 1], 0),
}


def states(cache):
    return [state for layer in cache.layers if hasattr(layer, "get_state") for state in layer.get_state() or ()]


def run(model, cache, ids, lengths, mask=None):
    """Feed ids to the cache in calls of these lengths, after what it has seen."""
    for part in ids.split(lengths, dim=1):
        seen = cache.get_seq_length()
        begin = 0 if is_hybrid(cache) else seen
        part_mask = None if mask is None else mask[:, begin : seen + part.shape[1]]
        model(part, attention_mask=part_mask, cache=cache)


def check_rollback(model, lengths, undone, prompt: int, padded: bool, kind=RecurrentCache) -> None:
    """After `crop` the cache goes on like one that never saw the undone tokens."""
    skip_recording_windows(model)
    total = prompt + sum(lengths)
    ids, mask = tokens(3, total), None
    if padded:
        ids, mask = left_padded([row[: total - cut] for row, cut in zip(ids, (0, 2, total - 2))])
        if prompt and not is_hybrid(RecurrentCache(config=model.config)):
            mask[:, prompt + 1] = 0  # padding among the tokens that may be undone, too
    size = {"max_cache_len": 64} if kind is StaticCache else {}
    cache, fresh = kind(config=model.config, **size), kind(config=model.config, **size)
    with torch.no_grad():
        if prompt:
            run(model, cache, ids[:, :prompt], prompt, mask)
        cache.activate_past_recording()
        run(model, cache, ids[:, prompt:], lengths, mask)
        cache.crop(-undone)
        kept = total - undone
        if kept:
            run(model, fresh, ids[:, :kept], kept, mask)
        assert int(cache.get_seq_length()) == kept
        step, told = tokens(3, 4, seed=1), {}
        if padded and is_hybrid(cache):
            told["attention_mask"] = torch.nn.functional.pad(mask[:, :kept], [0, 4], value=1)
        logits, expected = (model(step, cache=c, **told).logits for c in (cache, fresh))
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    for found, wanted in zip(states(cache), states(fresh)):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


# Every way of undoing runs each time for a row of each family and for softmax layers; for others what follows a padded prompt.
CROPS = [
    pytest.param(
        row,
        calls,
        prompt,
        padded,
        id=f"{row.name}-{name}-{'after-a-prompt' if prompt else 'from-nothing'}-{'padded' if padded else 'full'}",
        marks=[pytest.mark.slow] * (row not in FIRST + HYBRIDS and not (prompt and padded)),
    )
    for row in NUMBERS
    if row.causal
    for name, calls in CALLS.items()
    for prompt in (0, 9)
    for padded in (False, True)
]


@pytest.mark.parametrize(("row", "calls", "prompt", "padded"), CROPS)
def test_crop(row, calls, prompt, padded):
    check_rollback(row.causal_lm(torch.float64), *calls, prompt=prompt, padded=padded)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@first_rows
def test_crop_of_other_caches(row, kind):
    check_rollback(row.causal_lm(torch.float64), [6, 1, 1], 4, prompt=9, padded=False, kind=kind)


@first_state_rows
def test_crop_again_and_again(row):
    model = row.causal_lm(torch.float64)
    ids = tokens(1, 30)
    cache, kept = RecurrentCache(config=model.config), 0
    cache.activate_past_recording()
    with torch.no_grad():
        for length, undone in [(5, 2), (4, 4), (1, 0), (6, 1), (3, 2)]:
            run(model, cache, ids[:, kept : kept + length], length)
            cache.crop(torch.tensor(-undone))  # transformers 5.17 passes a tensor
            kept += length - undone
        logits = model(ids[:, kept : kept + 2], cache=cache).logits
        expected = model(ids[:, : kept + 2], use_cache=False).logits[:, -2:]
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


@first_rows
def test_crop_refuses_what_it_cannot_undo(row):
    model = row.causal_lm()
    with torch.no_grad():
        cache = model(tokens(1, 5), use_cache=True).cache
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)
        cache.activate_past_recording()
        model(tokens(1, 3), cache=cache)
        with pytest.raises(RuntimeError, match="cannot undo 4 tokens: 3 are recorded since recording began"):
            cache.crop(-4)
        cache.crop(-1)
        model(tokens(1, 1), cache=cache)
        with pytest.raises(
            RuntimeError, match=r"cannot undo 2 tokens: 1 are recorded .* since the last `crop`, which keeps"
        ):
            cache.crop(-2)
        with pytest.raises(ValueError, match="minus the number of tokens"):
            cache.crop(4)


def assistants(row):
    """One that is always right, one that is often wrong, one that is nearly always wrong and of another depth."""
    model = row.causal_lm(torch.float64)
    near = row.causal_lm(torch.float64)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return {"itself": model, "near": near, "other": row.causal_lm(torch.float64, seed=1)}


# An assistant that guesses some tokens right needs every part of the rollback; the others are slow tests. Transformers takes the
# padding id in what has been written for padding in its assistant, which sliding windows refuse: they draft what has none.
ROWS_AND_ASSISTANTS = [pytest.param(row, "near", id=f"{row.name}-near") for row in STATES] + [
    pytest.param(row, kind, id=f"{row.name}-{kind}", marks=pytest.mark.slow)
    for row in CAUSAL
    for kind in ("itself", "other")
]


@pytest.mark.parametrize(("row", "kind"), ROWS_AND_ASSISTANTS)
def test_assisted_decoding_is_greedy_decoding(row, kind):
    model = row.causal_lm(torch.float64)
    skip_recording_windows(model)
    ids = tokens(1, PROMPT)
    greedy = generate(model, ids, new=20)
    assisted = generate(model, ids, new=20, assistant_model=assistants(row)[kind])
    assert torch.equal(assisted.sequences, greedy.sequences)


@state_rows
def test_assisted_decoding_with_left_padding(row):
    model = row.causal_lm(torch.float64)
    skip_recording_windows(model)
    ids, mask = left_padded(texts())
    greedy = generate(model, ids[1:2], mask[1:2], new=20)
    assisted = generate(model, ids[1:2], mask[1:2], new=20, assistant_model=assistants(row)["near"])
    assert torch.equal(assisted.sequences, greedy.sequences)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older ones draft with the cache of all layers",
)
@pytest.mark.parametrize("name", ["leap", "fastformer", "danet", "sea", *(row.name for row in HYBRIDS)])
def test_the_first_layers_as_assistant(name):
    """`assistant_early_exit`: the model drafts with its first layers, and is whole again afterwards."""
    model = next(row for row in CAUSAL + HYBRIDS if row.name == name).causal_lm(torch.float64)
    ids = tokens(1, PROMPT)
    model.generation_config.pad_token_id = None  # Transformers' drafts would take what the model writes for padding
    greedy = generate(model, ids, new=20)
    assert torch.equal(generate(model, ids, new=20, assistant_early_exit=2).sequences, greedy.sequences)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("row", CAUSAL + HYBRIDS, ids=[row.name for row in CAUSAL + HYBRIDS])
def test_drafts_of_layers_that_are_not_there_are_refused(row):
    """Also of softmax layers alone, which hold no state; no error leaves the model with fewer layers."""
    model, ids = row.causal_lm(), tokens(1, PROMPT)
    least = 2 if row.name.startswith(("danet-softmax", "danet-swa", "leap-softmax")) else 1
    for layers in {0, -1, 4, least - 1}:
        with pytest.raises(ValueError, match=f"`assistant_early_exit` is {layers}, expected {least} to 3"):
            generate(model, ids, new=4, assistant_early_exit=layers)

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle of a draft")

    with (
        patch.object(transformers.generation.candidate_generator.AssistedCandidateGenerator, "get_candidates", fail),
        pytest.raises(RuntimeError, match="in the middle"),
    ):
        generate(model, ids, new=4, assistant_early_exit=2)
    assert model.config.num_hidden_layers == model.base_model.config.num_hidden_layers == 3


@pytest.mark.parametrize("row", CAUSAL + HYBRIDS, ids=[row.name for row in CAUSAL + HYBRIDS])
def test_a_prompt_that_the_cache_has_outgrown_is_named_as_the_cause(row):
    model = row.causal_lm()
    cache = model(tokens(1, 9), use_cache=True).cache
    for prompt in ({"input_ids": tokens(1, 4)}, {"inputs_embeds": model.get_input_embeddings()(tokens(1, 4))}):
        with pytest.raises(ValueError, match=rf"`{CACHE_NAME}` holds 9 columns.*the whole text"):
            model.generate(**prompt, **{CACHE_NAME: cache}, max_new_tokens=2, do_sample=False)


@causal_rows
def test_assistants_do_not_go_on_from_a_cache(row):
    """Transformers would read the tokens in the cache twice, and write another text: refused. An empty cache is welcome."""
    model = row.causal_lm(torch.float64)
    ids = tokens(1, PROMPT)
    cache = RecurrentCache(config=model.config)
    greedy = generate(model, ids)
    assert torch.equal(generate(model, ids, cache=cache, prompt_lookup_num_tokens=3).sequences, greedy.sequences)
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` holds .* read it twice"):
        generate(model, greedy.sequences, cache=cache, prompt_lookup_num_tokens=3)


@state_rows
def test_prompt_lookup_is_greedy_decoding(row):
    model = row.causal_lm(torch.float64)
    ids = tokens(1, 4).repeat(1, 4)  # repeats itself, so that there is something to look up
    assert_same_text(
        generate(model, ids, new=20, prompt_lookup_num_tokens=3), generate(model, ids, new=20), logits=False
    )


@contextmanager
def crop_changes_nothing():
    """Undone tokens are no longer counted, but stay in the state."""

    def count_only(self, keep):
        self.cumulative_length -= sum(inputs[0].shape[1] for _, inputs in self._replay) - keep

    with patch.object(RecurrentStateLayer, "_rewind", count_only):
        yield


@contextmanager
def crop_forgets_the_kept_ones():
    """Everything since the last `crop` is undone."""
    rewind = RecurrentStateLayer._rewind
    with patch.object(RecurrentStateLayer, "_rewind", lambda self, keep: rewind(self, 0)):
        yield


@pytest.mark.parametrize("breaks", [crop_changes_nothing, crop_forgets_the_kept_ones])
@first_rows
def test_controls(row, breaks):
    """Broken on purpose, the checks above fail."""
    model = row.causal_lm(torch.float64)
    with breaks(), pytest.raises(AssertionError):
        check_rollback(model, [6, 1, 1], 4, prompt=9, padded=False)
    if breaks is crop_changes_nothing:
        ids = tokens(1, PROMPT)
        greedy = generate(model, ids, new=20).sequences
        with breaks():
            assisted = generate(model, ids, new=20, assistant_model=assistants(row)["other"]).sequences
        assert not torch.equal(assisted, greedy)
