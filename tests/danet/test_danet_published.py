"""Published checkpoints: the golden cases of the official code, the published sizes, and the fusion of norm weights."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_linear_attn import DanetConfig, DanetForPreTraining, DanetForSequenceClassification
from hf_linear_attn.conversion import from_published
from hf_linear_attn.conversion.danet import fuse_norm_weights
from hf_linear_attn.modeling.danet.presets import PRESETS

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "danet.json").read_text())["cases"]


def tensor(entry):
    return torch.tensor(entry["data"], dtype=torch.float64).view(entry["shape"])


def published_model(case):
    state_dict = {name: tensor(entry) for name, entry in case["params"].items()}
    return from_published("danet", case["config"], state_dict)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_cases(name):
    case = GOLDEN[name]
    model = published_model(case)
    assert model.dtype == torch.float64
    ids, mask = torch.tensor(case["input_ids"]), torch.tensor(case["attention_mask"])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        blocks = []
        hooks = [layer.register_forward_hook(lambda m, i, o: blocks.append(o)) for layer in model.model.layers]
        model(input_ids=ids, attention_mask=mask)
        for hook in hooks:
            hook.remove()
    real = mask.bool()
    tolerance = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(out.hidden_states[0], tensor(case["embedding_output"]), **tolerance)
    for ours, theirs in zip(blocks, case["layer_outputs"], strict=True):
        torch.testing.assert_close(ours[real], tensor(theirs)[real], **tolerance)
    torch.testing.assert_close(out.prediction_logits[real], tensor(case["mlm_logits"])[real], **tolerance)
    torch.testing.assert_close(out.seq_relationship_logits, tensor(case["nsp_logits"]), **tolerance)


def changed_case(config, **params):
    """The first golden case with other fields, without its positions, and with more parameters."""
    case = GOLDEN["A_bert_learned_relu_global"]
    kept = {name: tensor(entry) for name, entry in case["params"].items() if "position" not in name}
    model = from_published("danet", {**case["config"], "pos_emb_type": "RELPE", **config}, {**kept, **params})
    return model, {"input_ids": torch.tensor(case["input_ids"]), "attention_mask": torch.tensor(case["attention_mask"])}


def test_published_sinusoids_are_read_and_pooled_over_padding():
    table = torch.zeros(1, 12, 8, dtype=torch.float64)  # a buffer of the published model
    model, inputs = changed_case({"pos_emb_type": "SINUSOIDAL"}, **{"bert.embeddings.position_embeddings.pe": table})
    padded = model(**inputs, output_hidden_states=True).hidden_states[0]
    full = model(inputs["input_ids"], output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(padded, full, rtol=0, atol=1e-12)  # the position of padding is its column


def test_the_norm_of_the_published_pooler():
    gain = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    plain, inputs = changed_case({"pooler_ln_type": "uncentered_fixed_ln"})
    scaled, _ = changed_case({"pooler_ln_type": "uncentered_ln"}, **{"bert.pooler.layer_norm.weight": gain})
    pooled = plain.pooler(plain.model(**inputs).last_hidden_state)
    torch.testing.assert_close(scaled.pooler(scaled.model(**inputs).last_hidden_state), pooled * gain)


def test_a_published_pooler_without_its_dense_layer_has_no_norm_either():
    case = GOLDEN["A_bert_learned_relu_global"]
    params = {name: tensor(entry) for name, entry in case["params"].items() if "pooler" not in name}
    config = {**case["config"], "pooler_no_dense": True, "pooler_ln_type": "standard_ln"}
    assert from_published("danet", config, params).pooler.norm is None


SIZES = {
    "bert-large": 335_905_602,
    "bert-large-128": 335_512_386,
    "bert-large-rotary": 335_381_314,
    "bert-large-rotary-swiglu": 343_771_970,
    "bert-large-glue": 343_837_506,
    "gpt-360m": 364_040_322,
    "gpt-hybrid-360m": 362_504_322,
}
# with a classifier; the retrieval task has a two-tower head of its own, 65,536 parameters more, which makes the published 1.00M
LRA_SIZES = {
    "lra-listops": 12_080_128,
    "lra-text": 12_190_720,
    "lra-retrieval": 934_144,
    "lra-image": 3_084_800,
    "lra-pathfinder": 328_960,
    "lra-pathx": 345_344,
    "lra-pathfinder-256": 345_344,
}


def test_every_preset_has_a_published_size():
    assert set(PRESETS) == set(SIZES) | set(LRA_SIZES)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        if name in SIZES:
            model = DanetForPreTraining(DanetConfig.preset(name))
        else:
            labels = 10 if name in ("lra-listops", "lra-image") else 2
            model = DanetForSequenceClassification(DanetConfig.preset(name, num_labels=labels))
    assert sum(p.numel() for p in set(model.parameters())) == {**SIZES, **LRA_SIZES}[name]


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="bert-large-glue"):
        DanetConfig.preset("bert-huge")


def small(**kwargs):
    torch.manual_seed(0)
    config = DanetConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        layer_pattern="l_sl_g",
        window_size=4,
        initializer_range=0.3,
        query_initializer_range=0.2,
        **{"pre_norm": "scaled_max_norm", "post_norm": "prescaled_max_norm", **kwargs},
    )
    model = DanetForPreTraining(config).double().eval()
    for block in model.model.layers:
        for norm in (block.pre_norm, block.post_norm):
            if hasattr(norm, "weight"):
                torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


IDS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ffn", ["relu", "swiglu"])
@pytest.mark.parametrize("position", ["none", "cosine", "rotary"])
def test_fusion_is_exact_where_it_is_allowed(position, ffn):
    model = small(position_embedding_type=position, ffn_type=ffn)
    before = model(IDS).prediction_logits
    fused = fuse_norm_weights(model, pre=position != "rotary")
    torch.testing.assert_close(fused(IDS).prediction_logits, before, rtol=1e-9, atol=1e-9)
    assert not hasattr(fused.model.layers[0].post_norm, "weight")
    assert torch.equal(model(IDS).prediction_logits, before)
    rebuilt = DanetForPreTraining(fused.config).double().eval()
    rebuilt.load_state_dict(fused.state_dict())
    torch.testing.assert_close(rebuilt(IDS).prediction_logits, before, rtol=1e-9, atol=1e-9)


def test_fusion_is_refused_under_rotary_positions():
    with pytest.raises(ValueError, match="rotary"):
        fuse_norm_weights(small(position_embedding_type="rotary"))


def test_fusion_of_a_norm_without_gain_is_refused():
    with pytest.raises(ValueError, match="pre_norm"):
        fuse_norm_weights(small(pre_norm="max_norm"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_scheme": "l_x_g", "local_attention": True}, "'x'"),
        ({"relpe_type": "rope", "num_attention_heads": 2}, "heads"),
        ({"relpe_type": "learned"}, "relpe_type"),
        ({"relpe_type": "ROPE", "num_attention_heads": 2}, "heads"),
        ({"default_ffn_norm": 0.1}, "default_ffn_norm"),
        ({"flux": 1}, "flux"),
        ({"hidden_size": 16}, "shape"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(change, message):
    case = GOLDEN["C_glue_rope_l_sl_g_swiglu_scaled"]
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        published_model({**case, "config": {**case["config"], **change}})


def test_a_missing_parameter_is_named():
    case = GOLDEN["A_bert_learned_relu_global"]
    params = {name: entry for name, entry in case["params"].items() if "layer.1.attention" not in name}
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.query_proj"):
        published_model({**case, "params": params})
