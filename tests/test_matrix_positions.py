"""Where a token stands when a call goes on from a state: the caller's word, generate()'s count, the state's (float64)."""

import inspect

import pytest
import torch
from common.batches import tokens
from common.caches import skip_recording_windows
from common.families import CAUSAL, HYBRIDS, all_rows, causal_rows
from common.padding import TOLERANCE
from torch.nn.functional import pad

from hf_linear_attn import RecurrentCache
from hf_linear_attn.modeling.shared import sequence as sequence_inputs
from hf_linear_attn.modeling.shared.states import generation
from hf_linear_attn.modeling.shared.states.past_columns import PastColumns, fingerprint

FIRST, SECOND = 9, 6
HOLE = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
language_models = pytest.mark.parametrize("row", CAUSAL + HYBRIDS, ids=[row.name for row in CAUSAL + HYBRIDS])
hybrids = pytest.mark.parametrize("row", HYBRIDS, ids=[row.name for row in HYBRIDS])


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    return tokens(1, FIRST, seed=1), tokens(1, SECOND, seed=2)


def told(kind: str) -> dict:
    """Two documents in one row."""
    if kind == "position_ids":
        return {"position_ids": torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]}
    return {"seq_idx": torch.tensor([[4] * FIRST + [2] * SECOND])}


def greedy(model, ids, **kwargs) -> torch.Tensor:
    """The new tokens."""
    return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **kwargs)[:, ids.shape[1] :]


def check_generate_after_a_packed_row(model, kind: str) -> None:
    first, second = texts()
    row, one = torch.cat([first, second], 1), tokens(1, 1, seed=5)
    with torch.no_grad():
        cache = model(row, use_cache=True, **told(kind)).cache
    expected = greedy(model, torch.cat([second, one], 1))
    assert torch.equal(greedy(model, torch.cat([row, one], 1), cache=cache), expected)
    # and from a packed prompt itself, also in pieces
    expected = greedy(model, second)
    assert torch.equal(greedy(model, row, **told(kind)), expected)
    assert torch.equal(greedy(model, row, prefill_chunk_size=FIRST, **told(kind)), expected)


@pytest.mark.parametrize("kind", ["position_ids", "seq_idx"])
@causal_rows
def test_generate_after_a_packed_row(row, kind):
    """The text goes on from the last document, at that document's positions."""
    check_generate_after_a_packed_row(row.causal_lm(torch.float64), kind)


def test_control_generate_counts_columns(monkeypatch):
    """Positions of Transformers' making, which number the columns of a row, are seen."""
    model = next(row for row in CAUSAL if row.name == "leap").causal_lm(torch.float64)
    monkeypatch.delattr(generation.RecurrentGenerationMixin, "_prepare_position_ids_for_generation")
    with pytest.raises((AssertionError, ValueError)):
        check_generate_after_a_packed_row(model, "position_ids")


@pytest.mark.parametrize("kind", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("cut", [FIRST - 2, FIRST, FIRST + 1])
@causal_rows
def test_a_packed_row_cut_anywhere(row, cut, kind):
    model, whole = row.causal_lm(torch.float64), torch.cat(texts(), 1)
    with torch.no_grad():
        expected = model(whole, use_cache=False, **told(kind)).logits
        before, after = (
            {name: x[:, part] for name, x in told(kind).items()} for part in (slice(cut), slice(cut, None))
        )
        cache = model(whole[:, :cut], use_cache=True, **before).cache
        logits = model(whole[:, cut:], cache=cache, **after).logits
        step = tokens(1, 1, seed=7)
        torch.testing.assert_close(logits, expected[:, cut:], **TOLERANCE)
        alone = model(torch.cat([texts()[1], step], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(model(step, cache=cache).logits, alone, **TOLERANCE)


@causal_rows
def test_a_document_read_token_by_token(row):
    """Each row begins its own second document, one of them a step later than the other."""
    model = row.causal_lm(torch.float64)
    (first, second), pause = texts(), tokens(2, 1, seed=3)
    with torch.no_grad():
        cache = model(first.expand(2, -1), use_cache=True).cache
        model(pause, attention_mask=torch.tensor([[1], [0]]), cache=cache)
        logits = [
            model(second[:, i : i + 1].expand(2, -1), position_ids=torch.full((1, 1), i), cache=cache).logits
            for i in range(SECOND)
        ]
        expected = model(second, use_cache=False).logits.expand(2, -1, -1)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **TOLERANCE)


@causal_rows
def test_one_row_begins_a_document_and_another_goes_on(row):
    model, (first, second) = row.causal_lm(torch.float64), texts()
    positions = torch.stack([torch.arange(SECOND), torch.arange(FIRST, FIRST + SECOND)])
    with torch.no_grad():
        cache = model(first.expand(2, -1), use_cache=True).cache
        logits = model(second.expand(2, -1), position_ids=positions, cache=cache).logits
        expected = model(torch.cat([first, second], 1), use_cache=False).logits[:, FIRST:]
        torch.testing.assert_close(logits[:1], model(second, use_cache=False).logits, **TOLERANCE)
        torch.testing.assert_close(logits[1:], expected, **TOLERANCE)


@language_models
def test_positions_that_do_not_go_on_are_refused(row):
    model, (first, second) = row.causal_lm(), texts()
    cache = model(first, use_cache=True).cache
    with pytest.raises(ValueError, match=r"`position_ids` begin with 4 in row 0, .* goes on at 9: give that, or 0"):
        model(second, position_ids=torch.arange(4, 4 + SECOND)[None], cache=cache)


@language_models
def test_positions_of_the_callers_own_go_on(row):
    """A state knows the position it goes on at: without being told, told it, and told it after an undo."""
    model, ids = row.causal_lm(torch.float64), tokens(2, 12)
    skip_recording_windows(model)
    positions = torch.arange(12)[None] + 50
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        cache = RecurrentCache(config=model.config)
        cache.activate_past_recording()
        model(ids[:, :7], position_ids=positions[:, :7], cache=cache)
        again, undone = cache.fork(), cache.fork()
        undone.crop(-3)
        for state, start, arguments in (
            (cache, 7, {}),
            (again, 7, {"position_ids": positions[:, 7:]}),
            (undone, 4, {}),
        ):
            logits = model(ids[:, start:], cache=state, **arguments).logits
            torch.testing.assert_close(logits, expected[:, start:], **TOLERANCE)


@language_models
def test_positions_over_a_hole(row):
    """Positions that count columns and those that count tokens both say: one text, also in two calls."""
    model, ids = row.causal_lm(torch.float64), tokens(1, 8)
    real = HOLE[0].bool()
    columns = torch.arange(8)[None]
    if "swa@softmax" in row.name or "l@softmax" in row.name:
        with pytest.raises(ValueError, match="padding between real tokens"):
            model(ids, attention_mask=HOLE, position_ids=columns, use_cache=True)
        return
    with torch.no_grad():
        for positions in (columns, pad(columns[:, :-1], [1, 0])):  # 0 1 2 3 | 4 ..., and 0 0 1 2 | 3 ...
            positions = positions.clone()
            positions[:, :3] = torch.arange(3) + (positions[:, 4] == 3) * 0
            whole = model(ids, attention_mask=HOLE, position_ids=positions, use_cache=False).logits
            changed = ids.clone()
            changed[0, 0] = (ids[0, 0] - 3 + 7) % 50 + 3
            other = model(changed, attention_mask=HOLE, position_ids=positions, use_cache=False).logits
            assert (whole - other)[:, 4].abs().max() > 1e-6, "the text was cut at the hole"
            for cut in (3, 4):
                cache = model(
                    ids[:, :cut], attention_mask=HOLE[:, :cut], position_ids=positions[:, :cut], use_cache=True
                ).cache
                rest = model(
                    ids[:, cut:], attention_mask=HOLE[:, cut:], position_ids=positions[:, cut:], cache=cache
                ).logits
                found = rest[:, real[cut:]]
                torch.testing.assert_close(found, whole[:, cut:][:, real[cut:]], **TOLERANCE)


@language_models
def test_a_mask_that_changes_its_mind_about_the_past(row):
    """What generate() leaves for a row that ended early: the filler is in the state, the next turn's mask leaves it out."""
    model, (first, turn) = row.causal_lm(), texts()
    with torch.no_grad():
        cache = model(torch.cat([first, torch.zeros(1, 5, dtype=torch.long)], 1), use_cache=True).cache
        for past in ([1] * FIRST + [0] * 5, [0] + [1] * (FIRST + 4)):
            mask = torch.tensor([past + [1] * SECOND])
            with pytest.raises(ValueError, match=r"`attention_mask` takes \d of the 14 columns .* gives no token back"):
                model(turn, attention_mask=mask, cache=cache)
        model(turn, attention_mask=torch.ones(1, 14 + SECOND), cache=cache)


@causal_rows
def test_a_mask_that_moves_padding_in_the_past(row):
    """The right number of tokens in other places is another text."""
    model, ids = row.causal_lm(torch.float64), tokens(1, 8)
    with torch.no_grad():
        cache = model(ids, attention_mask=HOLE, use_cache=True).cache
        saved = cache.fork()
        expected = model(ids[:, HOLE[0].bool()], use_cache=True).cache
        step = tokens(1, 2, seed=4)
        logits = model(step, attention_mask=pad(HOLE, [0, 2], value=1), cache=cache).logits
        torch.testing.assert_close(logits, model(step, cache=expected).logits, **TOLERANCE)
        with pytest.raises(ValueError, match="not those that were padding"):
            model(step, attention_mask=pad(HOLE.flip(1), [0, 2], value=1), cache=saved)


def test_control_masks_of_the_past_are_not_looked_at(monkeypatch):
    row = CAUSAL[0]
    monkeypatch.setattr(PastColumns, "check_mask", lambda *arguments: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_mask_that_changes_its_mind_about_the_past(row)


@language_models
def test_a_talk_that_goes_on_without_a_mask(row):
    """Left-padded rows go on from their state; the mask need not be told again, nor the padding be recognised in the text."""
    model, turn = row.causal_lm(torch.float64), tokens(2, 3, seed=9)
    ids, mask = tokens(2, 13, seed=3), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache
        forked = cache.fork()
        whole = pad(mask, [0, 3], value=1)
        expected = model(torch.cat([ids, turn], 1), attention_mask=whole, use_cache=False).logits[:, -3:]
        torch.testing.assert_close(model(turn, cache=cache).logits, expected, **TOLERANCE)
    text = torch.cat([ids, turn], 1)
    expected = greedy(model, text, attention_mask=whole)
    assert torch.equal(greedy(model, text, cache=forked.fork()), expected)
    assert torch.equal(greedy(model, text, cache=forked, attention_mask=whole), expected)


@hybrids
def test_hybrids_refuse_a_new_document_in_a_later_call(row):
    model, (first, second) = row.causal_lm(), texts()
    cache = model(first, use_cache=True).cache
    with pytest.raises(ValueError, match="keys and values keep no document numbers"):
        model(second, position_ids=torch.arange(SECOND)[None], cache=cache)


@causal_rows
def test_a_row_of_one_document_is_not_packed(row):
    """However that is said, padding included."""
    model, ids = row.causal_lm(torch.float64), tokens(1, 8)
    for said in ({"seq_idx": torch.full((1, 8), 3)}, {"cu_seq_lens_q": torch.tensor([0, 8])}):
        assert sequence_inputs.prepare_sequence(torch.empty(1, 8, 2), **said).segment_ids is None
    with torch.no_grad():
        expected = model(ids[:, HOLE[0].bool()], use_cache=False).logits
        numbers = torch.where(HOLE.bool(), 0, -1)
        logits = model(ids, attention_mask=HOLE, seq_idx=numbers, use_cache=False).logits
    torch.testing.assert_close(logits[:, HOLE[0].bool()], expected, **TOLERANCE)


@causal_rows
def test_documents_that_contradict_each_other(row):
    model, ids = row.causal_lm(), tokens(1, 8)
    with pytest.raises(ValueError, match="`seq_idx` and `cu_seq_lens_q` contradict each other: at column 2"):
        model(ids, seq_idx=torch.tensor([[0] * 4 + [1] * 4]), cu_seq_lens_q=torch.tensor([0, 2, 8]))


@all_rows
def test_what_tells_documents_apart_is_in_the_signature(row):
    """Trainer keeps the columns of a dataset that forward names."""
    for name in row.heads():
        parameters = inspect.signature(row.build(name).forward).parameters
        assert {"seq_idx", "cu_seq_lens_q", "position_ids", "token_type_ids"} <= set(parameters) or (
            name == "AutoModel" and {"seq_idx", "cu_seq_lens_q", "position_ids"} <= set(parameters)
        )
        assert not any("label" in each for each in parameters if each not in ("labels", "next_sentence_label"))


def test_fingerprints_of_columns():
    """Pieces add up, other sets have other numbers, also where they have as many columns."""
    padded = torch.rand(200, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = fingerprint(padded)
    assert torch.equal(whole, fingerprint(padded[:, :11]) + fingerprint(padded[:, 11:], 11))
    assert torch.equal(whole, fingerprint(padded[:, :11]) + fingerprint(padded[:, 11:], torch.tensor(11)))
    assert whole.unique().numel() == 200
    single = fingerprint(torch.eye(1000, dtype=torch.bool))
    assert single.unique().numel() == 1000
    assert (single[:, None] + single).triu(1).flatten().unique().numel() == 1 + 1000 * 999 // 2
