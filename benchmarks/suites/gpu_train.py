"""Language model bodies of 12 layers x 768 in bfloat16: forward and backward of 65,536 tokens a step (one row if it is longer).

Peers: the published LEAP's formulas in plain PyTorch, GPT-2 with PyTorch's SDPA, and linear attention of flash-linear-attention
where that is installed. GPT-2 is left out from 131,072 tokens on, the published form (which is eager LEAP's memory) as well.
A row of a million tokens would keep 170 GiB for its backward: there most layers form the inner activation of their feed-forward
layer again (`config.num_recomputed_mlps`). The card's memory is then full; give the allocator room to move in:

    PYTORCH_ALLOC_CONF=expandable_segments:True python -m benchmarks train --lengths 1048576 --only "ours, compiled"
"""

import importlib.util
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import GPT2Config, GPT2Model

from hf_linear_attn import LeapConfig, LeapModel

from ..harness import Case, Work, device, relative_error
from ..peers import PublishedLeap
from ..private import private


@dataclass(frozen=True)
class Size:
    """Of the models, and the tokens of a step."""

    tokens: int = 65536
    width: int = 768
    layers: int = 12
    heads: int = 12


FULL, QUICK = Size(), Size(24, 32, 4, 2)
LENGTHS = (1024, 16384, 131072, 1048576)
TFLOPS = 790
LONGEST_PEER = 65536
LONGEST_KEPT = 524288
RECOMPUTED = 7  # of the 12 layers, where not everything can be kept


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ktokens_per_s", "tokens_a_step": FULL.tokens, "dtype": "bfloat16"}


def config(size: Size, length: int) -> LeapConfig:
    """LEAP with windows global, 4, 8, 16 repeated."""
    return LeapConfig(
        hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=size.heads, vocab_size=64,
        max_position_embeddings=length, hidden_dropout_prob=0.0, num_recomputed_mlps=min(size.layers, recomputed(length)),
    )  # fmt: skip


def recomputed(length: int) -> int:
    """In how many layers the inner activation is formed again in backward."""
    return RECOMPUTED if length > LONGEST_KEPT else 0


def leap(size: Size, length: int):
    """Ours."""
    return LeapModel(config(size, length))


def published(size: Size, length: int):
    """The published form."""
    return PublishedLeap(64, size.width, size.heads, config(size, length).layer_windows, length)


def gpt2(size: Size, length: int):
    """GPT-2."""
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {
        "vocab_size": 64,
        "n_embd": size.width,
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_positions": length,
    }
    return GPT2Model(GPT2Config(**sizes, **drop, attn_implementation="sdpa", use_cache=False))


def linear_attention(size: Size, length: int):
    """flash-linear-attention's linear attention."""
    from fla.models import LinearAttentionConfig, LinearAttentionModel

    sizes = {"hidden_size": size.width, "num_hidden_layers": size.layers, "num_heads": size.heads, "vocab_size": 64}
    return LinearAttentionModel(LinearAttentionConfig(**sizes, intermediate_size=4 * size.width, use_cache=False))


def make(build, size: Size, compiled: bool, length: int) -> Work:
    """A model on the device and one forward and backward."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = build(size, length)
    model = model.to(torch.bfloat16).train()
    ids = torch.randint(0, 64, (max(1, size.tokens // length), length), device=device())
    run = torch.compile(model) if compiled else model
    options = {} if isinstance(model, PublishedLeap) else {"use_cache": False}

    def step():
        model.zero_grad(set_to_none=True)
        out = run(ids, **options)
        loss = (out if isinstance(out, torch.Tensor) else out.last_hidden_state).float().square().mean()
        del out  # a row of a million tokens is a gigabyte and a half
        loss.backward()

    return Work(step, ids.numel(), {"parameters": sum(p.numel() for p in model.parameters())})


def check(size: Size, length: int) -> tuple[float, float]:
    """Output and a gradient of four of our layers against float32, beside plain PyTorch in bfloat16."""
    length = min(length, 16384)
    torch.manual_seed(0)
    with torch.device(device()):
        model = LeapModel(config(replace(size, layers=4), length))
    ids = torch.randint(0, 64, (1, length), device=device())

    def run(backend, dtype):
        typed = model.to(dtype)
        typed.zero_grad()
        with private("use_backend")(backend):
            out = typed(ids, use_cache=False).last_hidden_state
        out.float().square()[..., ::3].mean().backward()
        grad = typed.layers[0].attention.qfkv_proj.weight.grad.float()
        return torch.cat([(x / x.norm()).flatten() for x in (out.detach().float(), grad)])

    exact, same = run("torch", torch.float32), run("torch", torch.bfloat16)
    return relative_error(run("auto", torch.bfloat16), exact), 2 * relative_error(same, exact) + 1e-6


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """All contenders at all lengths."""
    made, size = [], QUICK if quick else FULL
    limit = TFLOPS * 1e9 / (3 * 24 * size.width**2 * size.layers)  # q, f, k, v and the two feed-forward products
    for length in lengths or ([12] if quick else LENGTHS):
        again = f", {recomputed(length)} inner activations formed again" if recomputed(length) else ""
        for name, compiled in (("LEAP, ours, compiled", True), ("LEAP, ours", False)):
            work = partial(make, leap, size, compiled, length)
            made.append(Case(name + again, length, work, partial(check, size, length), limit))
        if length > LONGEST_PEER:
            continue
        made.append(
            Case("LEAP, published form, compiled", length, partial(make, published, size, True, length), limit=limit)
        )
        made.append(Case("LEAP, published form", length, partial(make, published, size, False, length), limit=limit))
        made.append(Case("GPT-2, SDPA, compiled", length, partial(make, gpt2, size, True, length)))
        made.append(Case("GPT-2, SDPA", length, partial(make, gpt2, size, False, length)))
        if importlib.util.find_spec("fla"):
            made.append(Case("linear attention (fla)", length, partial(make, linear_attention, size, False, length)))
    return made
