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
