"""float8 inference through torchao: four layers with quantized projections beside bfloat16, forward of 65,536 tokens.

Rows of 1,024 tokens by default. Dynamic float8 for activations and weights, a scale a row; each block compiled. "output_error" is
|x - float32| / |float32| of the last hidden states of a model with random weights; there is no gate, since float8 is asked to be
near, not equal. torchao's settings for the compiler are not taken: they time every choice of every kernel, for minutes.
"""

from functools import partial

import torch

from hf_linear_attn import LeapModel

from ..registry import Case, Work, device, relative_error
from . import gpu_encoder, gpu_train

LENGTHS = (1024,)
TOKENS = 65536
LAYERS = 4  # all alike, but torch.compile takes each quantized one for itself


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {
        "unit": "ktokens_per_s",
        "tokens_a_batch": TOKENS,
        "layers": LAYERS,
        "quantization": "torchao float8 dynamic, per row",
    }


def leap(length: int) -> LeapModel:
    """LEAP with one layer of each window."""
    return LeapModel(gpu_train.config(length, LAYERS))


def make(build, vocabulary: int, float8: bool, length: int) -> Work:
    """A body on the device and one forward."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = build(length)
    model = model.eval()
    ids = torch.randint(0, vocabulary, (max(1, TOKENS // length), length), device=device())
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


def cases(suite: str, lengths: list[int]) -> list[Case]:
    """Both families, both precisions."""
    danet = partial(gpu_encoder.danet, gpu_encoder.LARGE, layers=LAYERS)
    families = {
        f"DANet, {LAYERS} x {gpu_encoder.LARGE.width}": (danet, gpu_encoder.VOCABULARY),
        f"LEAP, {LAYERS} x {gpu_train.WIDTH}": (leap, 64),
    }
    made = []
    for length in lengths or LENGTHS:
        for name, family in families.items():
            for float8 in (False, True):
                label = f"{name}, {'float8' if float8 else 'bfloat16'}"
                made.append(Case(label, length, partial(make, *family, float8, length)))
    return made
