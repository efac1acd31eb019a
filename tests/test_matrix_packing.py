"""Several documents in one row are as if each had a row of its own; no token sees a later one (float64)."""

import pytest
import torch
from common.batches import tokens
from common.families import (
    CAUSAL,
    KINDS,
    NUMBERS,
    all_rows,
    causal_number_rows,
    causal_rows,
    kind_rows,
    number_rows,
    rows_and,
)
from common.padding import TOLERANCE, assert_same_gradients, gradients, weighted_sum

from hf_linear_attn.modeling.danet.state import DenseAttentionState
from hf_linear_attn.modeling.shared import sequence as sequence_inputs

DOCUMENTS = (9, 1, 30, 70, 2)


def documents() -> list[torch.Tensor]:
    return [tokens(1, length, seed=i)[0] for i, length in enumerate(DOCUMENTS)]


def packed_by(kind: str) -> dict:
    """What tells the documents apart."""
    lengths = torch.tensor(DOCUMENTS)
    if kind == "position_ids":
        return {"position_ids": torch.cat([torch.arange(length) for length in DOCUMENTS])[None]}
    if kind == "seq_idx":
        return {"seq_idx": torch.arange(len(DOCUMENTS)).repeat_interleave(lengths)[None].int()}
    if kind == "cu_seq_lens_q":
        return {"cu_seq_lens_q": torch.nn.functional.pad(lengths.cumsum(0), [1, 0]).int()}
    # what `DataCollatorWithFlattening` sends
    ends = packed_by("cu_seq_lens_q")["cu_seq_lens_q"]
    longest = max(DOCUMENTS)
    return {
        **packed_by("position_ids"),
        **packed_by("seq_idx"),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


PACKINGS = {kind: kind for kind in ("position_ids", "seq_idx", "cu_seq_lens_q", "everything")}


@rows_and("kind", PACKINGS, NUMBERS, lambda row, kind: row in KINDS or kind == "position_ids")
def test_packed_documents(row, kind):
    """In encoders, too."""
    check_packing(row, packed_by(kind))


def check_packing(row, told: dict) -> None:
    """Outputs, loss and gradients of the packed row are those of the documents."""
    model = row.predictor(torch.float64)
    if "softmax" in row.name and row.causal:
        told = told | {"use_cache": False}  # keys and values keep no document numbers
    ids = torch.cat(documents())[None]
    classes = model(ids).logits.shape[-1]
    output = model(ids, labels=ids % classes, output_hidden_states=True, **told)
    loss = (sum(DOCUMENTS) - len(DOCUMENTS) * row.causal) * output.loss
    (loss + weighted_sum(output.logits, 0)).backward()
    found, total = gradients(model), 0.0
    factors = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for document, logits, factor in zip(documents(), *(x[0].split(DOCUMENTS) for x in (output.logits, factors))):
        alone = model(document[None], labels=document[None] % classes, num_items_in_batch=1)
        torch.testing.assert_close(logits, alone.logits[0], **TOLERANCE)
        (alone.loss + (alone.logits[0] * factor).sum()).backward()
        total = total + alone.loss.detach()
    torch.testing.assert_close(loss.detach(), total, **TOLERANCE)
    assert_same_gradients(found, gradients(model))


@causal_rows
def test_packed_with_padding(row):
    """Two documents and padding on both sides and between them."""
    model = row.causal_lm(torch.float64)
    first, second = tokens(2, 9)
    mask = torch.tensor([[0] * 2 + [1] * 9 + [0] * 3 + [1] * 9 + [0]])
    ids = torch.full((1, 24), 5)
    ids[0, 2:11], ids[0, 14:23] = first, second
    position_ids = torch.full((1, 24), 7)
    position_ids[0, 2:11] = position_ids[0, 14:23] = torch.arange(9)
    seq_idx = torch.tensor([[0] * 12 + [1] * 12])
    alone = [model(text[None], labels=text[None], num_items_in_batch=1) for text in (first, second)]
    labels = (ids[:, 1:] != -100).sum()  # Trainer's count, of padding and borders too
    for told in ({"position_ids": position_ids}, {"seq_idx": seq_idx}):
        output = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=labels, **told)
        found = torch.cat([output.logits[:, 2:11], output.logits[:, 14:23]])
        torch.testing.assert_close(found, torch.cat([a.logits for a in alone]), **TOLERANCE)
        torch.testing.assert_close(16 * output.loss, alone[0].loss + alone[1].loss, **TOLERANCE)


@causal_number_rows
def test_state_after_a_packed_row_is_that_of_its_last_document(row):
    model = row.causal_lm(torch.float64)
    ids = torch.cat(documents())[None]
    step = tokens(1, 3, seed=9)
    with torch.no_grad():
        cache = model(ids, use_cache=True, **packed_by("position_ids")).cache
        forked = cache.fork()
        expected = model(torch.cat([documents()[-1][None], step], 1), use_cache=False).logits[:, -3:]
        position_ids = torch.arange(3)[None] + DOCUMENTS[-1]
        told = model(step, cache=cache, position_ids=position_ids).logits
        counted = model(step, cache=forked).logits
    torch.testing.assert_close(told, expected, **TOLERANCE)
    torch.testing.assert_close(counted, expected, **TOLERANCE)


@causal_rows
def test_a_document_that_ends_in_a_later_call(row):
    """Nine tokens and a document's beginning in one call, its rest and another document in the next."""
    model = row.causal_lm(torch.float64)
    ids = tokens(1, 30)
    position_ids = torch.cat([torch.arange(9), torch.arange(14), torch.arange(7)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=position_ids, use_cache=False).logits
        cache = model(ids[:, :15], position_ids=position_ids[:, :15], use_cache=True).cache
        logits = model(ids[:, 15:], position_ids=position_ids[:, 15:], cache=cache).logits
    torch.testing.assert_close(logits, expected[:, 15:], **TOLERANCE)


@kind_rows
def test_control_documents_are_ignored(row, monkeypatch):
    """Documents that leak into each other are seen."""
    monkeypatch.setattr(sequence_inputs, "_restarts", lambda position_ids, mask: torch.zeros_like(position_ids) > 0)
    with pytest.raises(AssertionError):
        check_packing(row, packed_by("position_ids"))


@pytest.mark.parametrize("row", [row for row in CAUSAL if row.name == "danet-cosine"], ids=lambda row: row.name)
def test_control_documents_that_share_a_state_are_seen(row, monkeypatch):
    """A state that forgets which tokens are of its document is noticed."""
    monkeypatch.setattr(DenseAttentionState, "count", property(lambda state: state[1] + 1))
    with pytest.raises(AssertionError):
        test_state_after_a_packed_row_is_that_of_its_last_document(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@causal_number_rows
def test_causality_to_the_bit(row, dtype):
    """Changing tokens from t on leaves every output before t the same to the last bit."""
    model = row.causal_lm(dtype)
    ids = tokens(2, 150)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        for t in (1, 63, 64, 65, 149):
            changed = ids.clone()
            changed[:, t:] = tokens(2, 150 - t, seed=1)
            other = model(changed, use_cache=False).logits
            assert torch.equal(logits[:, :t], other[:, :t]), f"the change at {t} reached back"
            assert not torch.equal(logits[:, t:], other[:, t:])


@causal_rows
def test_no_gradient_from_later_tokens(row):
    model = row.causal_lm(torch.float64)
    embeds = model.get_input_embeddings()(tokens(1, 90)).detach().requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits[:, 70].sum().backward()
    assert (embeds.grad[:, 71:] == 0).all()
    assert (embeds.grad[:, 70] != 0).any()


@number_rows
def test_the_encoder_and_only_the_encoder_looks_ahead(row):
    model = row.build("AutoModel")
    ids = tokens(1, 9)
    changed = ids.clone()
    changed[:, -1] += 1
    same = torch.equal(model(ids).last_hidden_state[:, :-1], model(changed).last_hidden_state[:, :-1])
    assert same == row.causal


@number_rows
def test_shifted_positions(row):
    """Only differences of rotary positions count; learned positions do depend on the place."""
    model = row.predictor(torch.float64)
    ids = tokens(2, 20)
    position_ids = torch.arange(20)[None]
    with torch.no_grad():
        logits, shifted = (model(ids, position_ids=p).logits for p in (position_ids, position_ids + 100))
    assert torch.allclose(logits, shifted, atol=1e-9) == row.shift_invariant


@causal_rows
def test_rotary_positions_have_no_limit(row):
    if row.bounded:
        pytest.skip("learned positions are bounded; what lies beyond is refused (test_bad_input)")
    if not row.shift_invariant:
        pytest.skip("positions of this row are absolute")
    model = row.causal_lm(torch.float64)
    ids, position_ids = tokens(1, 20), torch.arange(20)[None]
    with torch.no_grad():
        logits, shifted = (model(ids, position_ids=p).logits for p in (position_ids, position_ids + 10_000_000))
    torch.testing.assert_close(logits, shifted, atol=1e-6, rtol=0)


@all_rows
def test_a_classifier_of_texts_takes_one_text_a_row(row):
    model = row.build("AutoModelForSequenceClassification")
    with torch.no_grad():
        model(tokens(1, 8), seq_idx=torch.zeros(1, 8, dtype=torch.long))
        for told in ({"position_ids": torch.arange(8)[None] % 4}, {"cu_seq_lens_q": torch.tensor([0, 3, 8])}):
            with pytest.raises(ValueError, match=r"one answer a row|leak into each other"):
                model(tokens(1, 8), **told)
