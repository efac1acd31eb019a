"""A padded token is no token: it writes nothing, ages nothing, shifts no window and takes no position (float64)."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from common.batches import LAYOUTS, tokens
from common.families import (
    CAUSAL,
    CAUSAL_NUMBERS,
    FIRST,
    HYBRIDS,
    KINDS,
    NUMBERS,
    ROWS,
    VARIANTS,
    VOCAB,
    all_rows,
    causal_rows,
    number_rows,
    rows_and,
    rows_with_heads,
)
from common.padding import (
    TOLERANCE,
    check_body,
    check_loss,
    check_state,
    gradients,
    padded_batch,
    weighted_sum,
)

from hf_linear_attn.modeling.shared import causal_lm
from hf_linear_attn.modeling.shared import sequence as sequence_inputs

pytestmark = pytest.mark.long

LENGTHS = (70, 23, 1)  # longer than a chunk of the sums, longer than every window, a single token
COUNTED = "padding that sliding softmax windows would count is refused (tests/danet)"
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def flush_right(count: int):
    """The only layout that a text may go on from where softmax layers have windows."""
    return list(range(LENGTHS[0] - count, LENGTHS[0])), LENGTHS[0]


@rows_and("layout", LAYOUTS, NUMBERS, lambda row, layout: row not in VARIANTS or layout in ("left", "everywhere"))
def test_outputs_and_gradients(row, layout):
    if "swa@softmax" in row.name and layout in (LAYOUTS["inside"], LAYOUTS["everywhere"]):
        pytest.skip(COUNTED)
    options = {"use_cache": False} if "@softmax" in row.name else {}
    check_body(row.build("AutoModel", torch.float64), layout, LENGTHS, **options)


@rows_and("layout", LAYOUTS, CAUSAL, lambda row, layout: row in FIRST or layout == "inside")
def test_loss(row, layout):
    check_loss(row.causal_lm(torch.float64), layout, LENGTHS)


@rows_and(
    "layout", LAYOUTS, CAUSAL_NUMBERS, lambda row, layout: row not in VARIANTS or layout in ("left", "everywhere")
)
def test_state_left_behind(row, layout):
    if "@softmax" in row.name:
        if layout is not LAYOUTS["left"]:
            pytest.skip(COUNTED)
        layout = flush_right
    check_state(row.causal_lm(torch.float64), layout, LENGTHS)


@layouts
@rows_with_heads
def test_heads(row, head, layout):
    model = row.build(head, torch.float64)
    rows, columns, ids, mask = padded_batch(layout, (9, 4))
    of_texts = {"seq_relationship_logits"}
    if head == "AutoModelForSequenceClassification":
        of_texts.add("logits")
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        for i, (text, where) in enumerate(zip(rows, columns)):
            alone = model(text[None])
            checked = 0
            for name, wanted in alone.items():
                if name.endswith("logits") or name == "last_hidden_state":
                    found = together[name][i] if name in of_texts else together[name][i, where]
                    torch.testing.assert_close(found, wanted[0], **TOLERANCE)
                    checked += 1
            assert checked


@all_rows
def test_a_text_ends_where_the_mask_says(row):
    """Also one that ends with the padding id (the end of text, often), and one that comes as embeddings."""
    model = row.build("AutoModelForSequenceClassification", torch.float64, pad_token_id=2)
    rows, _, ids, mask = padded_batch(LAYOUTS["both"], (9, 4))
    for i, text in enumerate(rows):
        text[-1] = 2
        ids[i, mask[i].nonzero().max()] = 2
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        alone = torch.cat([model(text[None], attention_mask=torch.ones(1, len(text))).logits for text in rows])
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, **TOLERANCE)
        torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, alone, **TOLERANCE)


@pytest.mark.parametrize("garbage", [1, VOCAB - 1])
@number_rows
def test_ids_under_the_mask_do_not_matter(row, garbage):
    check_body(row.build("AutoModel", torch.float64), LAYOUTS["both"], (9, 4), garbage)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("row", ROWS + HYBRIDS, ids=[row.name for row in ROWS + HYBRIDS])
def test_what_stands_at_padding_does_not_matter(row, value):
    """NaN in the embeddings at padding, or in those of the padding id: not a bit of outputs and gradients changes."""
    model = row.build("AutoModel")
    table = model.get_input_embeddings().weight
    *_, ids, mask = padded_batch(LAYOUTS["both"], (9, 4))
    real = mask.bool()
    wanted = model(ids, attention_mask=mask).last_hidden_state[real]
    weighted_sum(wanted, 0).backward()
    expected = gradients(model)
    embeds = table[ids].detach().masked_fill(~real[..., None], value).requires_grad_()
    found = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[real]
    weighted_sum(found, 0).backward()
    assert torch.equal(found, wanted)
    assert (embeds.grad[~real] == 0).all()
    names = [name for name, p in model.named_parameters() if p is not table]
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items() if name in names)
    with torch.no_grad():
        table[0] = value
    found = model(ids, attention_mask=mask).last_hidden_state[real]
    weighted_sum(found, 0).backward()
    assert torch.equal(found, wanted)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


@causal_rows
def test_labels_under_the_mask_do_not_matter(row):
    check_loss(row.causal_lm(torch.float64), LAYOUTS["inside"], (9, 4), garbage=VOCAB - 1)


@number_rows
def test_a_row_of_padding_alone_is_finite_and_harmless(row):
    model = row.build("AutoModel")
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    hidden = model(ids, attention_mask=mask).last_hidden_state
    assert hidden.isfinite().all()
    torch.testing.assert_close(hidden[:1], model(ids[:1]).last_hidden_state, atol=1e-5, rtol=1e-5)
    hidden.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@all_rows
def test_bool_int_and_float_masks_mean_the_same(row):
    model = row.build("AutoModel")
    _, _, ids, mask = padded_batch(LAYOUTS["left"], (9, 4))
    first, *others = (
        model(ids, attention_mask=mask.to(dtype)).last_hidden_state
        for dtype in (torch.long, torch.bool, torch.int32, torch.float32)
    )
    assert all(torch.equal(first, other) for other in others)


@causal_rows
def test_padding_that_comes_in_a_later_call(row):
    """A mask of this call's columns, and one of all columns, mean the same; padding may come in any call."""
    model = row.causal_lm(torch.float64)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 6:8] = mask[1, 2] = mask[1, 10] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        for whole in (False, True):
            cache, found = None, []
            for start, end in [(0, 5), (5, 7), (7, 8), (8, 12)]:
                part = mask[:, :end] if whole else mask[:, start:end]
                output = model(ids[:, start:end], attention_mask=part, cache=cache, use_cache=True)
                cache = output.cache
                found.append(output.logits)
            torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()], **TOLERANCE)


@contextmanager
def mask_is_ignored():
    """Padding counts as text."""
    modules = (causal_lm, sequence_inputs)
    with (
        patch.object(modules[0], "padding_mask", lambda *a: None),
        patch.object(modules[1], "padding_mask", lambda *a: None),
    ):
        yield


@contextmanager
def padding_takes_positions():
    """Positions count columns instead of real tokens."""
    ranks = sequence_inputs._ranks
    with patch.object(sequence_inputs, "_ranks", lambda mask, *rest: ranks(None, *rest)):
        yield


@contextmanager
def padding_is_predicted():
    """The loss looks at the next column, whatever it is."""
    following = causal_lm.next_token_labels

    def next_column(labels, sequence):
        return following(labels, sequence_inputs.SequenceInputs(None, None, sequence.segment_ids))

    with patch.object(causal_lm, "next_token_labels", next_column):
        yield


FAULTS = {
    f"{breaks.__name__}-{check.__name__}": (breaks, check)
    for breaks, check in (
        (mask_is_ignored, check_body),
        (mask_is_ignored, check_state),
        (padding_takes_positions, check_body),
        (padding_is_predicted, check_loss),
    )
}


@rows_and("fault", FAULTS, NUMBERS, lambda row, fault: row in CAUSAL or (row in KINDS and fault.endswith("check_body")))
def test_controls(row, fault):
    """Broken on purpose, the checks above fail."""
    breaks, check = fault
    if not row.causal and check is not check_body:
        pytest.skip("an encoder has no state and predicts no next token")
    if "@softmax" in row.name and check is not check_loss:
        pytest.skip(COUNTED)
    if breaks is padding_takes_positions and (row.shift_invariant or not row.positional):
        pytest.skip("only a constant shift of positions for this row")
    model = row.build("AutoModel", torch.float64) if check is check_body else row.causal_lm(torch.float64)
    check(model, LAYOUTS["left"], (9, 4))
    with breaks(), pytest.raises((AssertionError, ValueError)):  # a hybrid's cache itself refuses masks that change
        check(model, LAYOUTS["left"], (9, 4))
