"""The published LEAP and causal Fastformer give the same numbers, and their fields and names are read with care."""

import json
from pathlib import Path

import pytest
import torch

from hf_linear_attn import FastformerForCausalLM, LeapForCausalLM
from hf_linear_attn.conversion import from_published

CASES = json.loads((Path(__file__).parent / "leap.json").read_text())["cases"]
CLASSES = {"leap": LeapForCausalLM, "fastformer": FastformerForCausalLM}


def load(name):
    case = CASES[name]
    params = {k: torch.tensor(v["data"], dtype=torch.float64).view(v["shape"]) for k, v in case["params"].items()}
    return case, params


@pytest.mark.parametrize("name", CASES)
def test_published_numbers(name):
    case, params = load(name)
    family = name.split("_")[0]
    model = from_published(family, case["config"], params).eval()
    assert type(model) is CLASSES[family]
    ids = torch.tensor(case["input_ids"])
    output = model(ids, labels=torch.tensor(case["labels"]), output_hidden_states=True)
    expected = torch.tensor(case["logits"], dtype=torch.float64).view(output.logits.shape)
    assert (output.logits - expected).abs().max() < 1e-8
    assert abs(output.loss.item() - case["loss"]) < 1e-8
    body = model.model
    hidden = body.embed_tokens(ids) + body.embed_positions(torch.arange(ids.shape[1]))
    for layer, published in zip(body.layers, case["layer_outputs"]):
        hidden = layer(hidden)
        assert (hidden - torch.tensor(published, dtype=torch.float64).view(hidden.shape)).abs().max() < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_refuses_what_does_not_fit(name):
    case, params = load(name)
    family = name.split("_")[0]
    first = next(k for k in params if "decoders.0" in k)
    with pytest.raises(ValueError, match="missing"):
        from_published(family, case["config"], {k: v for k, v in params.items() if k != first})
    with pytest.raises(ValueError, match="does not have"):
        from_published(family, case["config"], params | {"decoders.0.extra": params[first]})
    with pytest.raises(ValueError, match="shape"):
        from_published(family, case["config"], params | {first: params[first][..., :1]})
    with pytest.raises(ValueError, match="magic"):
        from_published(family, case["config"] | {"magic": 1}, params)
    with pytest.raises(ValueError, match="family"):
        from_published("nothing", case["config"], params)


def test_absent_fields_are_the_published_defaults():
    """Four heads, four layers and 1024 positions, which are not our own defaults; ready for evaluation, as when loaded."""
    case, params = load("leap_default_windows")
    params = {name: tensor for name, tensor in params.items() if ".decoders.4." not in name}
    table = "leap_model.position_embeddings.weight"
    params[table] = torch.nn.functional.pad(params[table], [0, 0, 0, 1024 - len(params[table])])
    model = from_published("leap", {"hidden_size": 16, "vocab_size": 19}, params)
    assert (model.config.num_attention_heads, model.config.num_hidden_layers) == (4, 4)
    assert model.config.layer_windows == [None, 4, 8, 16]
    assert not model.training
    explicit = {"n_head": 4, "n_layer": 4, "n_positions": 1024}
    same = from_published("leap", {"hidden_size": 16, "vocab_size": 19, **explicit}, params)
    ids = torch.tensor(case["input_ids"])
    assert torch.equal(model(ids).logits, same(ids).logits)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_configuration(name):
    """What `save_pretrained` writes beside the fields is ignored; an earlier LEAP's `rescale` is refused, and why."""
    case, params = load(name)
    family = name.split("_")[0]
    saved = {"model_type": f"{family.title()}ForCausalLM", "architectures": [f"{family.title()}ForCausalLM"]}
    saved |= {"torch_dtype": "float32", "transformers_version": "4.26.0", "_name_or_path": "somewhere"}
    config = case["config"] | saved
    logits = from_published(family, config, params)(torch.tensor(case["input_ids"])).logits
    assert (logits - torch.tensor(case["logits"], dtype=torch.float64).view(logits.shape)).abs().max() < 1e-8
    if family == "leap":
        with pytest.raises(ValueError, match="earlier LEAP"):
            from_published(family, config | {"rescale": 10}, params)
