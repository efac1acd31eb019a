"""The body and the encoder's heads: positions, scales, bounds, precision, errors; what every family has is in the matrix."""

import accelerate
import pytest
import torch
from common.families import NUMBERS
from danet.models import ENCODER_HEADS, VOCAB, build, config, decoder, encoder, pad, tokens
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForMultipleChoice

from hf_linear_attn import (
    DanetBlock,
    DanetConfig,
    DanetForCausalLM,
    DanetForMaskedLM,
    DanetForMultipleChoice,
    DanetForPreTraining,
    DanetForQuestionAnswering,
    DanetForSequenceClassification,
    DanetForTokenClassification,
    DanetModel,
    DenseAttention,
)
from hf_linear_attn.modeling.danet.dense_attention import pattern_mask
from hf_linear_attn.modeling.danet.kernels import relu_feed_forward, self_attention
from hf_linear_attn.modeling.danet.presets import PRESETS
from hf_linear_attn.modeling.danet.state import DenseAttentionState
from hf_linear_attn.modeling.kernels.fast_paths import recorded_choices

TOL = {"rtol": 1e-9, "atol": 1e-9}
SIDES = ["right", "left", "both", "inside"]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", [{"layer_pattern": "l_sl_g"}, {"layer_pattern": "sw_g", "is_causal": True}])
def test_rotary_positions_are_relative(kind, heads):
    model = build(DanetModel, num_attention_heads=heads, **kind)
    ids = tokens(1, 11)
    positions = torch.arange(11)[None]
    plain = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    moved = model(ids, position_ids=positions + 500, use_cache=False).last_hidden_state
    torch.testing.assert_close(plain, moved, rtol=1e-7, atol=1e-7)
    turned = model(ids.flip(1), use_cache=False).last_hidden_state.flip(1)
    assert not torch.allclose(plain, turned)  # positions do matter


@pytest.mark.parametrize("modes", [("linear", "quadratic"), ("auto", "linear")])
def test_orders_agree(modes):
    ids = tokens(2, 12)
    first, second = (encoder("learned g relu", attention_mode=mode)(ids).logits for mode in modes)
    torch.testing.assert_close(first, second, **TOL)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("ffn_type", ["relu", "swiglu"])
@pytest.mark.parametrize(("length", "folded"), [(15, []), (20, ["queries"]), (70, ["queries and feed-forward"])])
def test_folding_products_changes_neither_values_nor_gradients(length, folded, ffn_type, heads):
    """Rows longer than d need no queries, and rows longer than the feed-forward layer is wide no attention output either."""
    options = {"ffn_type": ffn_type, "intermediate_size": 24, "num_attention_heads": heads, "num_hidden_layers": 2}
    ids, mask = pad([tokens(length), tokens(length // 2, seed=1)], "left", length)
    found = []
    for mode in ("auto", "linear"):
        model = encoder("learned g relu", attention_mode=mode, max_position_embeddings=80, **options)
        with recorded_choices() as choices:
            logits = model(ids, attention_mask=mask).logits[mask.bool()]
        logits.sin().sum().backward()
        found.append({"logits": logits, **{name: p.grad for name, p in model.named_parameters()}})
        paths = [x.path.removesuffix(" folded into one matrix") for x in choices if "folded" in (x.path or "")]
        assert paths == 2 * folded * (mode == "auto")
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], **TOL)


@pytest.mark.parametrize("layer", ["attention", "attention.query_proj", "mlp.up_proj", "mlp"])
def test_a_hook_on_a_layer_sees_it_called_also_in_a_long_row(layer):
    model, seen = encoder("learned g relu", max_position_embeddings=80), []
    expected = model(tokens(1, 70)).logits
    model.model.layers[0].get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(1))
    torch.testing.assert_close(model(tokens(1, 70)).logits, expected, **TOL)
    assert seen


@pytest.mark.parametrize("layer_class", [DanetBlock, DenseAttention])
@pytest.mark.parametrize("length", [8, 70])
def test_an_encoder_layer_has_no_state_also_in_a_long_row(length, layer_class):
    layer = layer_class(config(position_embedding_type="learned"))
    with pytest.raises(ValueError, match="is_causal=True"):
        layer(torch.randn(1, length, 16), return_state=True)
    state = DenseAttentionState(torch.zeros(1, 2, 8, 8), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="is_causal=True"):
        layer(torch.randn(1, length, 16), state=state)


def test_weights_that_are_offloaded_are_fetched_in_a_long_row():
    """Accelerate puts a `forward` of its own in each layer, and leaves no weight in it between calls."""
    model = encoder("learned g relu", max_position_embeddings=80)
    expected = model(tokens(1, 70)).logits
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(offloaded(tokens(1, 70)).logits, expected, **TOL)


def test_the_scale_cancels_for_relu_without_epsilon():
    ids = tokens(1, 10)
    options = {"maxnorm_eps": 0.0, "scale_mode": "fixed", "layer_pattern": "g"}
    small = build(DanetModel, scale_length=8, **options)(ids).last_hidden_state
    large = build(DanetModel, scale_length=4096, **options)(ids).last_hidden_state
    torch.testing.assert_close(small, large, **TOL)
    epsilon = {"scale_mode": "fixed", "layer_pattern": "g", "ffn_type": "swiglu"}
    small = build(DanetModel, scale_length=8, **epsilon)(ids).last_hidden_state
    assert not torch.allclose(small, build(DanetModel, scale_length=64, **epsilon)(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["learned g relu", "rotary l_sl_g swiglu"])
def test_the_residual_stream_grows_by_at_most_one_a_block(name):
    model = encoder(name, post_norm="max_norm", final_norm=None)
    states = model(tokens(2, 40), output_hidden_states=True).hidden_states
    start = states[0].abs().max()
    for depth, state in enumerate(states):
        assert state.abs().max() <= start + depth + 1e-9


def test_what_a_layer_writes_is_bounded_by_the_cube_root_of_the_length():
    model = encoder("learned g relu")
    seen = []
    model.model.layers[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens(1, 50))
    memory = seen[0].transpose(1, 2) @ seen[0]
    assert memory.abs().max() <= 50 ** (1 / 3)


@pytest.mark.parametrize("name", ["learned g relu", "rotary l_sl_g swiglu", "cosine qkv l_sl_g", "softmax g"])
def test_bfloat16_is_close(name):
    """With weights of the published size: much larger ones magnify the rounding of SwiGLU's cubic products."""
    published = {"initializer_range": 0.02, "query_initializer_range": None, "hidden_size": 64}
    model = encoder(name, dtype=torch.float32, **published)
    ids, mask = pad([tokens(30), tokens(20, seed=1)], "left", 32)
    exact = model(ids, attention_mask=mask).logits[mask.bool()]
    half = model.to(torch.bfloat16)(ids, attention_mask=mask).logits.float()[mask.bool()]
    assert ((half - exact).norm() / exact.norm()).item() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("norm", ["max_norm", "prescaled_max_norm", "standard_ln"])
def test_half_precision_gradients_are_finite_with_padding(norm, pooling, dtype):
    model = build(
        DanetForSequenceClassification, pre_norm=norm, post_norm=norm, pooler_mask_padding=pooling, dtype=dtype
    )
    ids, mask = pad([tokens(30), tokens(3, seed=1)], "right", 32)
    model(ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_autocast_float16_is_finite_for_relu():
    model = encoder("learned g relu", dtype=torch.float32)
    ids, mask = pad([tokens(30), tokens(3, seed=1)], "left", 32)
    with torch.autocast("cpu", torch.float16):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    (loss * 1024).backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name, fields in PRESETS.items() if fields.get("ffn_type") != "swiglu"])
def test_relu_presets_learn_under_float16_autocast(name):
    """Forward and backward are finite, and no query matrix's gradient is lost to underflow, at a loss scale of 64.

    (A GradScaler finds its scale by itself; 1024 is too much for the large initial weights of one of the presets.)
    """
    small = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "window_size": 8}
    torch.manual_seed(0)
    model = DanetForMaskedLM(DanetConfig.preset(name, max_position_embeddings=64, **small))
    ids, mask = pad([tokens(40), tokens(5, seed=1)], "right", 40)
    with torch.autocast("cpu", torch.float16):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    (loss * 64).backward()
    assert torch.isfinite(loss)
    for layer in model.model.layers:
        assert layer.attention.query_proj.weight.grad.abs().max() > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pooler", ["first", "mean", "max", "last"])
@pytest.mark.parametrize("side", SIDES)
def test_poolers_leave_padding_out(pooler, side):
    model = build(DanetForSequenceClassification, pooler=pooler, layer_pattern="l_g")
    rows = [tokens(n, seed=n) for n in (9, 4)]
    ids, mask = pad(rows, side, 12)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i], model(row[None]).logits[0], **TOL)
    published = build(DanetForSequenceClassification, pooler="mean", layer_pattern="l_g", pooler_mask_padding=False)
    if pooler == "mean":
        assert not torch.allclose(published(ids, attention_mask=mask).logits, logits)


def head_inputs(model_class):
    ids = tokens(3, 8)
    labels = {
        DanetForPreTraining: {"labels": ids, "next_sentence_label": torch.tensor([0, 1, 1])},
        DanetForMaskedLM: {"labels": ids},
        DanetForSequenceClassification: {"labels": torch.tensor([0, 1, 1])},
        DanetForTokenClassification: {"labels": ids % 2},
        DanetForQuestionAnswering: {
            "start_positions": torch.tensor([1, 2, 3]),
            "end_positions": torch.tensor([2, 3, 4]),
        },
        DanetForMultipleChoice: {"labels": torch.tensor([0, 2, 1])},
    }[model_class]
    if model_class is DanetForMultipleChoice:
        ids = tokens(3, 4, 8)
    return {"input_ids": ids, **labels}


@pytest.mark.parametrize("model_class", ENCODER_HEADS)
def test_every_head_learns_and_survives_saving(model_class, tmp_path):
    model = build(model_class, dtype=torch.float32, use_token_type=True)
    inputs = head_inputs(model_class)
    if model_class is not DanetForMultipleChoice:
        inputs["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 4] * 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**inputs).loss
        loss.backward()
        unused = [n for n, p in model.named_parameters() if p.grad is None]
        assert unused == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**inputs).loss, again(**inputs).loss)


def test_a_text_without_token_types_is_text_a():
    model, ids = build(DanetForMaskedLM, use_token_type=True), tokens(2, 6)
    first = model(ids, token_type_ids=torch.zeros_like(ids)).logits
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(model(ids, token_type_ids=torch.ones_like(ids)).logits, first)


def test_multiple_choice_leaves_padding_out_and_is_registered():
    model = AutoModelForMultipleChoice.from_config(config(layer_pattern="l_g")).double().eval()
    assert type(model) is DanetForMultipleChoice
    rows = [tokens(n, seed=n) for n in (9, 4)]
    ids, mask = pad(rows, "left", 12)
    logits = model(ids[None], attention_mask=mask[None]).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[0, i], model(row[None, None]).logits[0, 0], **TOL)
    with pytest.raises(ValueError, match="choices"):
        model(ids)


def test_regression_and_several_labels():
    ids = tokens(2, 5)
    model = build(DanetForSequenceClassification, num_labels=1, dtype=torch.float32)
    out = model(ids, labels=torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - torch.tensor([0.5, -1.0])).pow(2).mean())
    model = build(DanetForSequenceClassification, num_labels=3, dtype=torch.float32)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.binary_cross_entropy_with_logits(out.logits, labels))


def test_pretraining_output_of_a_decoder():
    out = build(DanetForPreTraining, is_causal=True)(tokens(2, 5))
    assert out.prediction_logits.shape == (2, 5, VOCAB)
    assert out.seq_relationship_logits.shape == (2, 2)


def test_pretraining_loss_is_the_sum_of_both():
    model = build(DanetForPreTraining)
    ids = tokens(2, 5)
    labels = ids.masked_fill(torch.arange(5) > 2, -100)
    out = model(ids, labels=labels, next_sentence_label=torch.tensor([1, 0]))
    words = torch.nn.functional.cross_entropy(out.prediction_logits[:, :3].flatten(0, 1), ids[:, :3].flatten())
    pairs = torch.nn.functional.cross_entropy(out.seq_relationship_logits.float(), torch.tensor([1, 0]))
    torch.testing.assert_close(out.loss, words + pairs)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_resizing_the_vocabulary_keeps_the_logits_and_grows_the_bias():
    model = encoder("learned g relu")
    ids = tokens(2, 6)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    after = model(ids).logits
    assert after.shape[-1] == VOCAB + 5
    assert model.lm_head.decoder.bias.shape == (VOCAB + 5,)
    assert model.lm_head.decoder.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(after[..., :VOCAB], before, **TOL)


def test_initial_weights():
    torch.manual_seed(0)
    c = config(hidden_size=64, query_initializer_range=None, initializer_range=0.02, num_hidden_layers=2)
    model = DanetForMaskedLM(c)
    layer = model.model.layers[0]
    assert layer.attention.query_proj.weight.std().item() == pytest.approx(0.02 / (2 * 2 * 64) ** 0.5, rel=0.1)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx((2 * 64 * 4) ** -0.5, rel=0.1)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx((2 * 64 * 4) ** -0.5, rel=0.1)
    alone = DanetBlock(c)
    assert alone.attention.query_proj.weight.std().item() == pytest.approx(0.02 / (2 * 2 * 64) ** 0.5, rel=0.1)
    assert model.lm_head.dense.weight.abs().max() <= 0.02
    assert model.lm_head.dense.weight.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.1)
    assert model.model.embed_tokens.weight[0].abs().max() > 0
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert DanetForTokenClassification(c).model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("row", [row for row in NUMBERS if row.family == "danet"], ids=lambda row: row.name)
def test_raw_scores_give_back_the_attention(row):
    model = row.predictor(torch.float64)
    if "softmax" in row.name:
        model.set_attn_implementation("eager")
    ids, mask = pad([tokens(9), tokens(5, seed=1)], "left", 10)
    out = model(ids, attention_mask=mask, output_attentions=True, use_cache=False)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 2, 10, 10)] * 3
    layer, seen = model.model.layers[1], []
    if "softmax" in row.name or layer.attention.options:  # a map is not all that stands between input and output
        return
    hook = layer.attention.register_forward_hook(lambda m, args, o: seen.append((args[0], o.hidden_states)))
    model(ids, attention_mask=mask, use_cache=False)
    hook.remove()
    x, expected = seen[0]
    if model.config.relpe_scheme == "q,k" or model.config.position_embedding_type in ("learned", "sinusoidal"):
        out = torch.einsum("bhij,bjhd->bihd", out.attentions[1], x.unflatten(-1, (2, -1))).flatten(2)
        torch.testing.assert_close(out, expected, **TOL)


@pytest.mark.parametrize("layer_class", [DanetBlock, DenseAttention])
def test_layers_work_alone(layer_class):
    layer = layer_class(config(hidden_size=32))
    out = layer(torch.randn(8, 1024, 32))
    out = out if layer_class is DanetBlock else out.hidden_states
    assert out.shape == (8, 1024, 32)
    out.mean().backward()


@pytest.mark.parametrize("pattern", ["g", "l", "sl", "sw"])
def test_a_block_alone_honours_masks_and_goes_on_from_its_state(pattern):
    torch.manual_seed(0)
    block = DanetBlock(config(is_causal=True, layer_pattern=pattern)).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    whole = block(x)
    first, state = block(x[:, :4], return_state=True)
    second, state = block(x[:, 4:5], state=state, return_state=True)
    third = block(x[:, 5:], state=state)
    torch.testing.assert_close(torch.cat((first, second, third), dim=1), whole, **TOL)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1], [1] * 9])
    torch.testing.assert_close(block(x, attention_mask=mask)[0, mask[0].bool()], block(x[:1, mask[0].bool()])[0], **TOL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_pattern": "l_slg"}, "slg"),
        ({"layer_pattern": "global"}, "global"),
        ({"layer_pattern": "sw"}, "causal"),
        ({"layer_pattern": "l", "window_size": 5}, "even"),
        ({"layer_pattern": "l", "window_size": 0}, "window_size"),
        ({"layer_pattern": "softmax"}, "Transformer"),
        ({"layer_pattern": "softmax_g"}, "softmax_attention_heads"),
        ({"layer_pattern": "swa@softmax_g", "softmax_attention_heads": 2}, "causal"),
        ({"layer_pattern": "l@softmax_g", "softmax_attention_heads": 2, "window_size": 3}, "even"),
        ({"layer_pattern": "g@softmax_g", "softmax_attention_heads": 2}, "g@softmax"),
        ({"pre_norm": "layernorm"}, "pre_norm"),
        ({"embedding_norm": "max"}, "embedding_norm"),
        ({"hidden_size": 15}, "num_attention_heads"),
        ({"hidden_size": 6}, "odd"),
        ({"position_embedding_type": "rope"}, "position_embedding_type"),
        ({"relpe_scheme": "q,x"}, "relpe_scheme"),
        ({"ffn_type": "gelu"}, "ffn_type"),
        ({"pooler": "cls"}, "pooler"),
        ({"lm_head_act": "swish"}, "lm_head_act"),
        ({"scale_mode": "none"}, "scale_mode"),
        ({"scale_length": 0}, "scale_length"),
        ({"is_causal": True, "scale_mode": "valid_length", "use_cache": True}, "scale_mode"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"pooler_dense": False, "pooler_norm": "standard_ln"}, "pooler_dense"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob.* 1.5, .*0 to 1"),
        ({"attention_dropout": float("nan")}, "attention_dropout"),
        ({"maxnorm_eps": -1e-3}, "maxnorm_eps"),
        ({"initializer_range": -0.02}, "initializer_range"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids"),
        ({"input_ids": tokens(1, 65)}, "max_position_embeddings"),
        ({"input_ids": torch.full((1, 3), VOCAB)}, "vocabulary"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 4, 4)}, "attention_mask"),
        ({"input_ids": tokens(1, 4), "attention_mask": torch.tensor([[0.0, -1e4, 0.0, 0.0]])}, "additive"),
        ({"input_ids": tokens(1, 4), "token_type_ids": torch.ones(1, 4, dtype=torch.long)}, "token_type_ids"),
        ({"input_ids": tokens(1, 4), "use_cache": True}, "is_causal"),
        ({"input_ids": tokens(1, 4), "labels": tokens(1, 5)}, "labels"),
        ({"input_ids": tokens(1, 4), "is_causal": True}, "is_causal=True"),
        ({"input_ids": tokens(1, 4), "labels": torch.full((1, 4), VOCAB)}, "`labels` holds 37, expected 0 to 36"),
        ({"input_ids": tokens(1, 4), "labels": torch.full((1, 4), -1)}, "`labels` holds -1"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        encoder("learned g relu")(**inputs)


@pytest.mark.parametrize(
    "types", [torch.full((2, 5), 2), torch.full((2, 5), -1), torch.zeros(2, 4).long(), torch.zeros(2, 5)]
)
def test_token_types_without_an_embedding_are_refused(types):
    with pytest.raises(ValueError, match="token_type_ids"):
        build(DanetForMaskedLM, use_token_type=True)(tokens(2, 5), token_type_ids=types)


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (DanetForPreTraining, {"next_sentence_label": torch.tensor([0, 2])}),
        (DanetForSequenceClassification, {"labels": torch.tensor([0, 2])}),
        (DanetForMultipleChoice, {"labels": torch.tensor([0, 3])}),
    ],
)
def test_labels_that_are_no_class_are_refused(model_class, labels):
    ids = tokens(2, 3, 5) if model_class is DanetForMultipleChoice else tokens(2, 5)
    (name,) = labels
    with pytest.raises(ValueError, match=f"`{name}` holds"):
        build(model_class)(ids, **labels)


@pytest.mark.parametrize("layer", [DenseAttention, DanetBlock])
def test_a_layer_alone_refuses_an_additive_mask(layer):
    with pytest.raises(ValueError, match="additive"):
        layer(config())(torch.zeros(1, 3, 16), attention_mask=torch.tensor([[0.0, 0.0, -1e4]]))


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="atention_mask"):
        encoder("learned g relu")(tokens(1, 4), atention_mask=torch.ones(1, 4))


def test_heads_of_the_other_direction_are_refused():
    with pytest.raises(ValueError, match="is_causal=False"):
        build(DanetForMaskedLM, is_causal=True)
    with pytest.raises(ValueError, match="is_causal=True"):
        build(DanetForCausalLM)


def test_padding_inside_a_sliding_softmax_window_is_refused():
    with pytest.raises(ValueError, match="swa@softmax"):
        decoder("swa@softmax_g_l")(tokens(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    cached = decoder("l@softmax_sl@softmax_g")
    with pytest.raises(ValueError, match="'l@softmax', 'sl@softmax'"):
        cached(tokens(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]), use_cache=True)


@pytest.mark.parametrize("factory", [encoder, decoder])
def test_local_softmax_layers_look_inside_their_windows(factory):
    """The weights are positive exactly where the patterns l and sl allow, by rank among real tokens, and sum to one."""
    model = factory("l@softmax_sl@softmax_g", attn_implementation="eager")
    mask = torch.tensor([[1] * 11, [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1]])
    out = model(tokens(2, 11), attention_mask=mask, output_attentions=True, use_cache=False)
    ranks = mask.cumsum(-1) - 1
    for pattern, weights in zip(("l", "sl"), out.attentions, strict=False):
        for row in range(2):
            real = mask[row].bool()
            allowed = pattern_mask(pattern, ranks[row, real], ranks[row, real], model.config.is_causal, 4)
            found = weights[row][:, real][:, :, real]
            assert torch.equal(found > 0, allowed.expand_as(found))
            torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_attention_functions_without_local_windows_are_refused():
    model = encoder("l@softmax_sl@softmax_g")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="knows no local windows"):
        model(tokens(1, 4))


@pytest.mark.parametrize("length", [16, 48])  # both orders of the products
def test_steps_that_a_gpu_takes_in_training(length, monkeypatch):
    """The attention and the feed-forward layer with a backward of their own, also inside a compiled block, on a CPU."""
    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = DanetModel(DanetConfig(**size, position_embedding_type="learned", max_position_embeddings=50)).double()
    ids, found = torch.arange(2 * length).view(2, length) % 50, []
    for fused in (False, True, True):
        for module in (self_attention, relu_feed_forward):
            monkeypatch.setattr(module, "on_cuda", lambda x, fused=fused: None if fused else "no GPU")
        if len(found) == 2:
            model.layers[0].compile(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        out = model(ids).last_hidden_state
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in found[1:]:
        for ours, plain in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, plain)
