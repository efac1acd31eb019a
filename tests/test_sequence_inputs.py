"""How a call's description of its tokens is read: the worked examples of the documentation, and the corners."""

import pytest
import torch

from hf_linear_attn.modeling.shared.causal_lm import next_token_labels
from hf_linear_attn.modeling.shared.sequence import SequenceInputs, padding_mask, prepare_sequence


def rows(*values):
    return torch.tensor(values)


def prepare(batch, length, **kwargs):
    return prepare_sequence(torch.empty(batch, length, 4), **kwargs)


# Three documents of lengths 2, 4 and 3 in one row.
POSITIONS = rows([0, 1, 0, 1, 2, 3, 0, 1, 2])
SEGMENTS = rows([0, 0, 1, 1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    "told",
    [
        {"position_ids": POSITIONS},
        {"seq_idx": rows([7, 7, 4, 4, 4, 4, 5, 5, 5])},
        {"cu_seq_lens_q": torch.tensor([0, 2, 6, 9])},
    ],
    ids=["position_ids", "seq_idx", "cu_seq_lens_q"],
)
def test_packed_documents(told):
    sequence = prepare(1, 9, **told)
    assert torch.equal(sequence.segment_ids, SEGMENTS)
    assert torch.equal(sequence.position_ids, POSITIONS)
    assert sequence.mask is None


def test_one_document():
    sequence = prepare(2, 4)
    assert (sequence.mask, sequence.segment_ids) == (None, None)
    assert torch.equal(sequence.position_ids, rows([0, 1, 2, 3]))
    assert prepare(2, 4, position_ids=rows([5, 6, 7, 8])).segment_ids is None


def test_padding_takes_no_position():
    mask = rows([0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 0, 0])
    sequence = prepare(3, 5, attention_mask=mask)
    assert torch.equal(sequence.mask, mask.bool())
    assert torch.equal(sequence.position_ids[sequence.mask], torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2]))


def test_positions_at_padding_are_ignored():
    mask = rows([0, 0, 1, 1, 0, 1])
    assert prepare(1, 6, attention_mask=mask, position_ids=rows([9, 9, 0, 1, 9, 2])).segment_ids is None
    # generate() numbers left padding 1 or 0
    assert prepare(1, 6, attention_mask=mask, position_ids=rows([1, 1, 0, 1, 1, 2])).segment_ids is None
    packed = prepare(1, 6, attention_mask=mask, position_ids=rows([9, 9, 0, 1, 9, 0]))
    assert torch.equal(packed.segment_ids[packed.mask], torch.tensor([0, 0, 1]))


def test_a_document_may_begin_with_padding():
    mask = rows([1, 1, 0, 0, 1, 1, 1])
    sequence = prepare(1, 7, attention_mask=mask, seq_idx=rows([0, 0, 0, 1, 1, 1, 1]))
    assert torch.equal(sequence.position_ids[sequence.mask], torch.tensor([0, 1, 0, 1, 2]))


def test_positions_go_on_after_a_cache():
    sequence = prepare(2, 2, past_length=5, past_counts=torch.tensor([5, 3]))
    assert torch.equal(sequence.position_ids, rows([5, 6], [3, 4]))
    sequence = prepare(2, 3, past_length=5, past_counts=torch.tensor([5, 3]), seq_idx=rows([0, 0, 1], [0, 1, 1]))
    assert torch.equal(sequence.position_ids, rows([5, 6, 0], [3, 0, 1]))


def test_mask_of_this_call_or_of_everything():
    mask = rows([0, 1, 1, 0, 1])
    assert torch.equal(padding_mask(mask, 1, 2, past_length=3), rows([0, 1]).bool())
    assert torch.equal(padding_mask(mask[:, -2:], 1, 2, past_length=3), rows([0, 1]).bool())
    assert padding_mask(mask, 1, 1, past_length=4) is None  # nothing to mask in this call


@pytest.mark.parametrize(
    ("mask", "segments", "expected"),
    [
        # labels are 10 11 12 13 14 15
        (None, None, [11, 12, 13, 14, 15, -100]),
        ([0, 0, 1, 1, 1, 1], None, [-100, -100, 13, 14, 15, -100]),
        ([1, 1, 1, 0, 0, 0], None, [11, 12, -100, -100, -100, -100]),
        ([1, 0, 0, 1, 1, 0], None, [13, -100, -100, 14, -100, -100]),
        (None, [0, 0, 0, 1, 1, 1], [11, 12, -100, 14, 15, -100]),
        (None, [0, 1, 2, 2, 2, 3], [-100, -100, 13, 14, -100, -100]),
        ([1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [11, -100, -100, -100, 15, -100]),
        ([0, 0, 0, 0, 0, 0], None, [-100] * 6),
    ],
)
def test_next_token_labels(mask, segments, expected):
    labels = rows([10, 11, 12, 13, 14, 15])
    mask = None if mask is None else rows(mask).bool()
    segments = None if segments is None else rows(segments)
    found = next_token_labels(labels, SequenceInputs(mask, torch.arange(6)[None], segments))
    assert found.tolist() == [expected]


def test_next_token_labels_keeps_ignored_ones():
    labels = rows([-100, -100, 12, 13])
    found = next_token_labels(labels, SequenceInputs(None, torch.arange(4)[None], rows([0, 0, 0, 0])))
    assert found.tolist() == [[-100, 12, 13, -100]]
