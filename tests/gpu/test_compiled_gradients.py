"""Gradients of a compiled model are those of the plain one, at sizes of real models: compilers change what they do with sizes."""

import pytest
import torch
from gpu.device import needs_gpu
from transformers import set_seed

import hf_linear_attn
from hf_linear_attn.conversion import linearize
from hf_linear_attn.modeling.kernels.dispatch import use_backend

pytestmark = needs_gpu

SIZES = {"vocab_size": 256, "hidden_size": 384, "hidden_dropout_prob": 0.0}
LEAP = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 6}
DANET = {**SIZES, "num_hidden_layers": 4, "max_position_embeddings": 2048, "scale_length": 1024}


def leap(preset, **changes):
    return hf_linear_attn.LeapForCausalLM(hf_linear_attn.LeapConfig.preset(preset, **(LEAP | changes)))


def danet(preset, **changes):
    return hf_linear_attn.DanetForCausalLM(hf_linear_attn.DanetConfig.preset(preset, **(DANET | changes)))


def hedgehog(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    host = LlamaConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    return linearize(LlamaForCausalLM(host), "hedgehog", window=64, **options)


MODELS = {
    "leap-published": lambda: leap("published"),
    "leap-hybrid": lambda: leap("hybrid"),
    "leap-fixed-state": lambda: leap("fixed-state"),
    "leap-decay-exp": lambda: leap("fixed-state", focus_function="exp"),
    "danet-hybrid": lambda: danet("hybrid"),
    "danet-fixed-state": lambda: danet("fixed-state"),
    "danet-decay": lambda: danet("fixed-state", layer_pattern="softmax:128_decay", conv_kernel=4),
    "fastformer": lambda: hf_linear_attn.FastformerForCausalLM(hf_linear_attn.FastformerConfig(**LEAP)),
    "hedgehog": hedgehog,
    "hedgehog-forgetting": lambda: hedgehog(forgetting="token"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_gradients(name, rows, backend):
    set_seed(0)
    model = MODELS[name]().to("cuda").train()
    ids = torch.randint(0, 256, (rows, 1024), device="cuda").sort(-1).values

    def gradients(call):
        model.zero_grad()
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {
            each: parameter.grad.clone() for each, parameter in model.named_parameters() if parameter.grad is not None
        }

    with use_backend(backend):
        plain, compiled = gradients(model), gradients(torch.compile(model))
    assert plain.keys() == compiled.keys()
    for each, expected in plain.items():
        error = (compiled[each] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-3, (each, float(error))
