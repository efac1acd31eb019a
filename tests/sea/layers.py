"""Small SEA layers and inputs for the tests of the family."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from hf_linear_attn.modeling.sea.attention import SeaAttentionCore, SeaOptions

PUBLISHED = Path(__file__).parent / "published_layers.safetensors"
PUBLISHED_CASES = ("bidirectional_batch", "bidirectional_query_padded", "causal")


def published_case(name: str) -> dict:
    """One case of the published model's results: config, params, inputs and outputs."""
    case = {"params": {}}
    with safe_open(PUBLISHED, "pt") as file:
        case["config"] = json.loads(file.metadata()[name])
        for key in file.keys():  # noqa: SIM118 (a file, not a dict)
            if key.startswith(f"{name}/params/"):
                case["params"][key.split("/")[-1]] = file.get_tensor(key)
            elif key.startswith(f"{name}/"):
                case[key.split("/")[-1]] = file.get_tensor(key)
    return case


def make_core(
    causal: bool, seed: int = 0, dtype=torch.float32, open_gates: bool = False, **options
) -> SeaAttentionCore:
    """A layer with random weights everywhere, LayerNorms and gates included, so that no two cells tie."""
    options = {"num_heads": 2, "head_dim": 8, "k": 4, "predictor_length": 16, "max_positions": 128} | options
    torch.manual_seed(seed)
    core = SeaAttentionCore(SeaOptions(causal=causal, **options)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            if name != "position_table":
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if causal:  # rows whose ReLUs are all zero would make the cells of all heads tie
            core.cnn.conv1.bias.add_(0.5)
            core.cnn.conv2.bias.add_(0.5)
        if open_gates:
            core.scaler.weight.zero_()
            core.scaler.bias.fill_(30.0)
    return core


def make_inputs(batch=2, heads=2, length=20, dim=8, key_heads=None, seed=1, dtype=torch.float32, requires_grad=False):
    """Random q (B, H, T, D), k and v (B, G, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, key_heads or heads, key_heads or heads)
    return tuple(
        torch.randn(batch, h, length, dim, generator=generator, dtype=dtype).requires_grad_(requires_grad)
        for h in shapes
    )
