"""Importance, influence, context and alignment: what the numbers are."""

import pytest
import torch
from common.families import ROWS, all_rows
from sea.hosts import host_config, make_student, make_teacher
from transformers import AutoModelForCausalLM

from explain.keyword_task import word_tokenizer
from hf_linear_attn.explain import (
    alignments,
    attention_maps,
    attention_rows,
    context_losses,
    effective_context,
    importance,
    influence,
    rollout,
)
from hf_linear_attn.explain.reading import read_text
from hf_linear_attn.explain.sea_attention import attention_panels

TEXT = " ".join(f"w{i * 7 % 60 + 3}" for i in range(18))


def read(text: str = TEXT):
    return read_text(word_tokenizer(), text)


def row_model(name: str, **changes):
    row = next(row for row in ROWS if row.name == name)
    return row.build("AutoModelForCausalLM" if row.causal else "AutoModelForSequenceClassification", **changes)


@all_rows
def test_every_family_has_rows_that_sum_to_one_and_see_nothing_later(row):
    model = row.build("AutoModel")
    found = attention_rows(model, read())
    layers, heads = row.config().num_hidden_layers, row.config().num_attention_heads
    assert found.rows.shape == (layers, heads, 18, 18)
    assert found.causal is row.causal
    torch.testing.assert_close(found.rows.sum(-1), torch.ones(layers, heads, 18))
    assert (found.rows[~found.visible] == 0).all()
    flow = influence(model, word_tokenizer(), TEXT).matrix
    torch.testing.assert_close(flow.sum(-1), torch.ones(18))
    if row.causal:
        assert (found.rows.triu(1) == 0).all()
        assert (flow.triu(1) == 0).all()
    assert (found.signed is not None) is (row.family == "danet")
    for method in ("received", "rollout", *(["focus"] if row.explains else [])):
        scores = importance(model, word_tokenizer(), TEXT, method=method).scores
        assert scores.shape == (18,)
        assert (scores >= 0).all()
        assert scores.std() > 0


def test_danet_rows_are_the_sizes_of_signed_scores():
    model = row_model("danet-encoder")
    with torch.no_grad():
        scores = torch.cat(model(read().inputs["input_ids"], output_attentions=True).attentions)
    found = attention_rows(model, read())
    torch.testing.assert_close(found.signed, scores)
    torch.testing.assert_close(found.rows, scores.abs() / scores.abs().sum(-1, keepdim=True))
    negative = (scores.clamp(max=0).abs() / scores.abs().sum(-1, keepdim=True)).sum((-1, -2)) / 18
    torch.testing.assert_close(found.negative_share, negative)
    assert 0 < float(negative.min()) < float(negative.max()) < 1


@pytest.mark.parametrize("host", ["bert", "llama"])
def test_sea_rows_are_its_sparse_attention(host):
    student = make_student(host, host={"vocab_size": 64})
    found = attention_rows(student, read())
    panels = attention_panels(student, {"input_ids": read().inputs["input_ids"]}, layer=1)
    torch.testing.assert_close(found.rows[1], panels["student"])
    assert found.causal is (host == "llama")
    assert importance(student, word_tokenizer(), TEXT).method == "rollout"


def test_a_softmax_teacher_is_explained_by_its_eager_attention():
    teacher = make_teacher("llama", vocab_size=64)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        importance(teacher, word_tokenizer(), TEXT)
    teacher.set_attn_implementation("eager")
    found = attention_rows(teacher, read())
    assert found.causal
    with torch.no_grad():
        wanted = torch.cat(teacher(read().inputs["input_ids"], output_attentions=True).attentions)
    torch.testing.assert_close(found.rows, wanted)


@pytest.mark.parametrize("name", ["leap", "leap-rotary-exp", "fastformer", "fastformer-encoder"])
def test_focus_is_the_share_of_the_focus_weights(name):
    model = row_model(name)
    with torch.no_grad():
        weights = torch.cat(model.model(read().inputs["input_ids"], output_focus_weights=True).focus_weights)
    found = importance(model, word_tokenizer(), TEXT)
    assert found.method == "focus"
    torch.testing.assert_close(found.layers, weights / weights.mean(-1, keepdim=True))
    assert float(found.scores.mean()) == pytest.approx(1.0, abs=1e-4)
    best = int(found.scores.argmax())
    assert found.top(3)[0] == (found.tokens[best], pytest.approx(float(found.scores[best])), best)
    assert len(found.top(500)) == 18 - int(found.read.special.sum())


@pytest.mark.parametrize("method", ["focus", "received", "rollout"])
@pytest.mark.parametrize("name", ["leap-rotary-exp", "fastformer-large-rescale"])
def test_weights_beyond_any_number_are_shares_all_the_same(name, method):
    """In float32 exp(200) is infinite: the loudest token has all of the attention, and no NaN is shown."""
    model = row_model(name, layer_windows=[None] * 3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attention.rescale = 4000.0  # Fastformer's logits; LEAP's are made of focus and keys
            getattr(layer.attention, "qfkv_proj", torch.nn.Linear(1, 1)).weight.mul_(40)
        logs = model.model(read().inputs["input_ids"], output_focus_weights="log").focus_weights
        assert max(layer.max() for layer in logs) > 200
    found = importance(model, word_tokenizer(), TEXT, method=method)
    assert found.scores.isfinite().all()
    assert "nan" not in found.to_html()
    if method != "rollout":
        expected = 18 if method == "focus" else 3  # of the first layer's loudest token: all, from where it is seen
        assert found.layers[0, 0].max() > expected * 0.9
        loudest = logs[0][0, 0].argmax()
        assert method != "focus" or found.layers[0, 0].argmax() == loudest


def test_equal_attention_gives_every_token_the_same_importance():
    """Focus weights that are all 1 (no focus projection): received 1 everywhere, in windows as in global layers."""
    model = row_model("leap")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attention.qfkv_proj.weight[16:32] = 0
    for method in ("focus", "received"):
        scores = importance(model, word_tokenizer(), TEXT, method=method).scores
        torch.testing.assert_close(scores, torch.ones(18), atol=1e-4, rtol=0)


def test_a_method_that_a_family_does_not_define_is_refused():
    danet, leap = row_model("danet"), row_model("leap")
    with pytest.raises(ValueError, match=r"danet has no focus weights.*received"):
        importance(danet, word_tokenizer(), TEXT, method="focus")
    with pytest.raises(ValueError, match="the methods are"):
        importance(leap, word_tokenizer(), TEXT, method="gradient")
    with pytest.raises(ValueError, match="rollout mixes the layers"):
        importance(leap, word_tokenizer(), TEXT, method="rollout").draw_layers()
    with pytest.raises(ValueError, match="only LEAP has alignments"):
        alignments(danet, word_tokenizer(), TEXT)
    with pytest.raises(ValueError, match="no token"):
        importance(leap, word_tokenizer(), "")
    with pytest.raises(ValueError, match="up to 2048"):
        attention_maps(row_model("leap-rotary"), word_tokenizer(), "w3 " * 2100)
    long = importance(row_model("leap-rotary"), word_tokenizer(), "w3 " * 2100)  # focus needs no map
    assert len(long.tokens) == 2100
    assert len(importance(leap, word_tokenizer(), TEXT, max_tokens=7).tokens) == 7


def test_rollout_is_the_product_of_mixed_layers():
    rows = torch.rand(2, 3, 5, 5).tril()
    rows = rows / rows.sum(-1, keepdim=True)
    first, second = (0.25 * torch.eye(5) + 0.75 * layer for layer in rows.mean(1))
    torch.testing.assert_close(rollout(rows, residual=0.25), second @ first)
    torch.testing.assert_close(rollout(rows, residual=1.0), torch.eye(5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        rollout(rows, residual=1.5)


def test_plain_influence_is_the_rows():
    model = row_model("leap")
    rows = attention_rows(model, read()).rows
    torch.testing.assert_close(influence(model, word_tokenizer(), TEXT, method="plain").matrix, rows.mean((0, 1)))
    one = influence(model, word_tokenizer(), TEXT, method="plain", layer=2, head=1)
    torch.testing.assert_close(one.matrix, rows[2, 1])
    share, place = rows[2, 1, 9].max(-1)
    assert one.on(9, 1) == [(one.tokens[place], pytest.approx(float(share)), int(place))]
    with pytest.raises(ValueError, match="`head` is 2, expected 0 to 1"):
        influence(model, word_tokenizer(), TEXT, method="plain", head=2)
    with pytest.raises(ValueError, match="belong to method='plain'"):
        influence(model, word_tokenizer(), TEXT, layer=0)


@pytest.mark.parametrize("name", ["leap", "leap-rotary", "leap-rotary-exp"])
def test_alignment_is_the_gate_of_the_layers(name):
    """A layer's output is its alignment times the mean of values: dividing one by the other gives the alignment."""
    model = row_model(name)
    caught = []
    hooks = [
        layer.attention.register_forward_hook(lambda layer, given, out: caught.append((layer, given[0], out)))
        for layer in model.model.layers
    ]
    _, gates = alignments(model, word_tokenizer(), TEXT)
    for hook in hooks:
        hook.remove()
    assert gates.shape == (3, 2, 18)
    rows = attention_rows(model, read()).rows
    for (layer, x, out), gate, shares in zip(caught, gates, rows):
        value = layer.qfkv_proj(x).unflatten(-1, (4, 2, 8))[0, :, 3]
        means = torch.einsum("hij,jhe->ihe", shares, value)
        expected = means * gate.T[..., None]
        torch.testing.assert_close(out.hidden_states[0].unflatten(-1, (2, 8)), expected, atol=1e-3, rtol=1e-3)


def test_effective_context_keeps_to_windows_and_knows_equal_shares():
    model = row_model("leap", layer_windows=[None, 2, 5])
    found = effective_context(model, word_tokenizer(), TEXT, share=0.9)
    assert found.heads.shape == (3, 2)
    assert (found.heads[1] <= 2).all()
    assert (found.heads[2] <= 5).all()
    # equal shares: row i of the second half (10 to 18 tokens in sight) reaches ceil(0.9 (i + 1)); the median is of 14
    assert found.uniform == 13
    assert 1 <= found.model <= 18
    assert "layer  2" in found.table()
    encoder = effective_context(row_model("fastformer-encoder"), word_tokenizer(), TEXT, share=0.5)
    assert encoder.heads.min() >= 5  # 9 of 18 equal shares lie within 5 to 9 places on both sides
    with pytest.raises(ValueError, match="between 0 and 1"):
        effective_context(model, word_tokenizer(), TEXT, share=90)


def test_context_losses_are_those_of_shorter_texts():
    model = row_model("leap-rotary", layer_windows=[1, 2, 1])
    text = " ".join([TEXT] * 3)
    found = context_losses(model, word_tokenizer(), text, contexts=(1, 2, 16), targets=9)
    ids = read(text).ids
    places = torch.linspace(16, 53, 9).round().long().tolist()
    with torch.no_grad():
        wanted = [
            torch.stack([-model(ids[None, p - c : p]).logits[0, -1].log_softmax(-1)[ids[p]] for p in places]).mean()
            for c in found.contexts
        ]
    assert found.losses == pytest.approx([float(x) for x in wanted], abs=1e-4)
    assert found.losses[1] == pytest.approx(found.losses[2], abs=1e-4), "windows of 1, 2 and 1 see two tokens"
    assert found.losses[0] != pytest.approx(found.losses[1], abs=1e-4)
    assert found.effective() in (1, 2)
    with pytest.raises(ValueError, match="does not predict next tokens"):
        context_losses(row_model("danet-encoder"), word_tokenizer(), text)
    with pytest.raises(ValueError, match="one must be left"):
        context_losses(model, word_tokenizer(), TEXT, contexts=(1, 18))


def test_explaining_leaves_the_model_as_it_was():
    model = row_model("leap", hidden_dropout_prob=0.5).train()
    first, second = (importance(model, word_tokenizer(), TEXT).scores for _ in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)  # without dropout
    assert model.training
    alignments(model, word_tokenizer(), TEXT)
    assert not any(layer.attention._forward_pre_hooks for layer in model.model.layers)


def test_a_gpt2_reads_from_the_left():
    model = AutoModelForCausalLM.from_config(host_config("gpt2", vocab_size=64), attn_implementation="eager")
    assert attention_rows(model, read()).causal
