"""Packed rows: what the matrix of all families does not look at (maps, distillation, NaN, cost)."""

import pytest
import torch

from hf_linear_attn.modeling.sea.host_attention import Distillation
from hf_linear_attn.modeling.sea.rows.documents import PackedRows
from hf_linear_attn.training.sea_distillation import record_targets

from .hosts import CAUSAL_HOSTS, HOSTS, make_ids, make_student, make_teacher

LENGTHS = (7, 1, 4, 8)
CLOSE = {"atol": 1e-10, "rtol": 1e-9}


def packed(ids: torch.Tensor) -> dict:
    """One row of documents and what tells them apart."""
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None]}


@pytest.mark.parametrize("host", HOSTS)
def test_a_document_of_nan_stays_alone(host):
    """Documents of like length share a call; the places that fill the shorter ones up are no other document's."""
    student, ids = make_student(host), make_ids(2, 14)
    position_ids = torch.cat([torch.arange(6), torch.arange(8)])[None].expand(2, -1)
    embeds = student.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        wanted = student(inputs_embeds=embeds, position_ids=position_ids).logits
        embeds[0, :6] = float("nan")
        found = student(inputs_embeds=embeds, position_ids=position_ids).logits
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0, 6:], wanted[0, 6:])


@pytest.mark.parametrize("host", HOSTS)
def test_maps_of_packed_rows_are_those_of_the_documents(host):
    """Attention, estimate and kept keys; nothing between documents."""
    student, ids = make_student(host, softmax_layers=[1]).double(), make_ids(1, sum(LENGTHS))
    wanted = {"output_attentions": True, "output_sea": True}
    with torch.no_grad():
        whole = student(**packed(ids), **wanted)
        end = 0
        for document in ids.split(LENGTHS, dim=1):
            start, end = end, end + document.shape[1]
            alone = student(document, **wanted)
            for found, expected in zip(whole.attentions, alone.attentions, strict=True):
                torch.testing.assert_close(found[:, :, start:end, start:end], expected, **CLOSE)
                assert not found[:, :, start:end, :start].any()
                assert not found[:, :, start:end, end:].any()
            assert torch.equal(whole.kept_keys[0][:, :, start:end, start:end], alone.kept_keys[0])
            torch.testing.assert_close(
                whole.estimated_attentions[0][:, :, start:end], alone.estimated_attentions[0], **CLOSE
            )


@pytest.mark.parametrize("host", CAUSAL_HOSTS)
def test_maps_reach_back_into_the_cache(host):
    """A document that goes on in a second call looks at the columns of the first."""
    student, ids = make_student(host).double(), make_ids(1, 20)
    positions = torch.cat([torch.arange(6), torch.arange(9), torch.arange(5)])[None]
    with torch.no_grad():
        whole = student(ids, position_ids=positions, output_attentions=True, use_cache=False).attentions[0]
        cache = student(ids[:, :10], position_ids=positions[:, :10]).cache
        later = student(ids[:, 10:], position_ids=positions[:, 10:], cache=cache, output_attentions=True)
    torch.testing.assert_close(later.attentions[0], whole[:, :, 10:], **CLOSE)


@pytest.mark.parametrize("rows", [None, torch.arange(0, 20, 3)])
@pytest.mark.parametrize("host", HOSTS)
def test_distillation_of_packed_rows(host, rows):
    """The teacher's documents do not look at each other either; with all rows the losses are the documents' own."""
    student, teacher, ids = make_student(host).double(), make_teacher(host).double(), make_ids(1, sum(LENGTHS))
    targets, expected = record_targets(teacher, packed(ids))
    found = student(**packed(ids), distillation=Distillation(targets, rows, measure=True))
    assert set(found.attention_losses[0]) == {"context_mse", "estimate_kl", "estimate_mse", "student_kl", "student_mse"}
    assert 0 < found.fidelity[0]["keys_per_query"] <= 8
    kl = 0.0
    for document, logits in zip(ids.split(LENGTHS, 1), expected.logits.split(LENGTHS, 1), strict=True):
        alone, output = record_targets(teacher, {"input_ids": document})
        torch.testing.assert_close(logits, output.logits, **CLOSE)
        losses = student(document, distillation=Distillation(alone)).attention_losses[0]
        kl = kl + losses["estimate_kl"] * document.shape[1] / ids.shape[1]
    if rows is None:
        torch.testing.assert_close(found.attention_losses[0]["estimate_kl"], kl, **CLOSE)


def test_padding_less_than_doubles_the_tokens():
    """However the lengths mix, the groups hold less than twice the tokens, and each token once."""
    lengths = [1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 300, 1, 1]
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    groups = PackedRows.find(segments, None, None, 0).groups
    assert sum(group.tokens.numel() for group in groups) < 2 * sum(lengths)
    held = torch.cat([group.tokens[group.keep] for group in groups]).sort().values
    assert torch.equal(held, torch.arange(sum(lengths)))


def test_packed_tokens_cannot_be_undone():
    student, ids = make_student("llama"), make_ids(1, sum(LENGTHS))
    cache = student(ids[:, :2]).cache
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="packed rows cannot be undone"):
        student(**packed(ids), cache=cache)


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_one_answer_for_several_documents_is_refused(host):
    student = make_student(host, "AutoModelForSequenceClassification")
    with pytest.raises(ValueError, match="one answer a row"):
        student(**packed(make_ids(1, sum(LENGTHS))))
