"""float8 inference through torchao: bodies with quantized projections beside the same in bfloat16, forward of 65,536 tokens.

Rows of 1,024 tokens by default. Dynamic float8 for activations and weights, a scale a row; each block compiled. "difference" is
|float8 - bfloat16| / |bfloat16| of the last hidden states of a model with random weights; "check" has no gate, since float8 is
asked to be near, not equal.
"""

from functools import partial

import torch

from ..registry import Case, Work, device, relative_error
from . import gpu_encoder, gpu_train

LENGTHS = (1024,)
TOKENS = 65536


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ktokens_per_s", "tokens_a_batch": TOKENS, "quantization": "torchao float8 dynamic, per row"}


def make(build, vocabulary: int, float8: bool, length: int) -> Work:
    """A body on the device and one forward."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = build(length)
    model = model.to(torch.bfloat16).eval()
    ids = torch.randint(0, vocabulary, (max(1, TOKENS // length), length), device=device())
    facts = {}
    if float8:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        with torch.inference_mode():
            exact = model(ids[:4]).last_hidden_state
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        with torch.no_grad():
            facts["difference"] = round(relative_error(model(ids[:4]).last_hidden_state, exact), 4)
    for layer in model.layers:
        layer.compile()

    @torch.no_grad()
    def step():
        model(ids)

    return Work(step, ids.numel(), facts)


def cases(suite: str, lengths: list[int]) -> list[Case]:
    """Both families, both precisions."""
    families = {
        "DANet, 335M": (partial(gpu_encoder.danet, gpu_encoder.LARGE), gpu_encoder.VOCABULARY),
        "LEAP, 12 x 768": (gpu_train.leap, 64),
    }
    made = []
    for length in lengths or LENGTHS:
        for name, family in families.items():
            for float8 in (False, True):
                label = f"{name}, {'float8' if float8 else 'bfloat16'}"
                made.append(Case(label, length, partial(make, *family, float8, length)))
    return made
