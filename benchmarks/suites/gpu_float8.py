"""float8 inference through torchao: four layers with quantized projections beside bfloat16, forward of 65,536 tokens.

Rows of 1,024 tokens by default. Dynamic float8 for activations and weights, a scale a row; each block compiled. "output_error" is
|x - float32| / |float32| of the last hidden states of a model with random weights; there is no gate, since float8 is asked to be
near, not equal. torchao's settings for the compiler are not taken: they time every choice of every kernel, for minutes.
"""

from dataclasses import replace
from functools import partial

import torch

from hf_linear_attn import LeapModel

from ..harness import Case, Work, device, relative_error
from . import gpu_encoder, gpu_train

LENGTHS = (1024,)
TOKENS, QUICK_TOKENS = 65536, 128  # a batch
LAYERS = 4  # all alike, but torch.compile takes each quantized one for itself


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {
        "unit": "ktokens_per_s",
        "tokens_a_batch": TOKENS,
        "layers": LAYERS,
        "quantization": "torchao float8 dynamic, per row",
    }


def leap(size: gpu_train.Size, length: int) -> LeapModel:
    """LEAP with one layer of each window."""
    return LeapModel(gpu_train.config(size, length))


def make(build, vocabulary: int, float8: bool, tokens: int, length: int) -> Work:
    """A body on the device and one forward."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = build(length)
    model = model.eval()
    ids = torch.randint(0, vocabulary, (max(1, tokens // length), length), device=device())
    with torch.no_grad():
        exact = model(ids[:4]).last_hidden_state
        model = model.to(torch.bfloat16)
        if float8:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

            quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
        facts = {"output_error": round(relative_error(model(ids[:4]).last_hidden_state, exact), 5)}
    for layer in model.layers:
        layer.compile()

    @torch.no_grad()
    def step():
        model(ids)

    return Work(step, ids.numel(), facts)


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """Both families, both precisions."""
    encoder = gpu_encoder.QUICK if quick else gpu_encoder.LARGE
    body = replace(gpu_train.QUICK if quick else gpu_train.FULL, layers=LAYERS)
    families = {
        f"DANet, {LAYERS} x {encoder.width}": (partial(gpu_encoder.danet, encoder, layers=LAYERS), encoder.vocabulary),
        f"LEAP, {LAYERS} x {body.width}": (partial(leap, body), 64),
    }
    made, tokens = [], QUICK_TOKENS if quick else TOKENS
    for length in lengths or ([16] if quick else LENGTHS):
        for name, family in families.items():
            for float8 in (False, True):
                label = f"{name}, {'float8' if float8 else 'bfloat16'}"
                made.append(Case(label, length, partial(make, *family, float8, tokens, length)))
    return made
