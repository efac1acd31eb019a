"""Causal DenseAttention between its projections: 12 heads of 64, global and in a sliding window of 128, beside FlashAttention.

65,536 tokens a batch (one row if it is longer), bfloat16; forward alone, and forward and backward. The peers: the same sums in
plain PyTorch by chunks, and PyTorch's SDPA, which takes FlashAttention for these sizes.
"""

from functools import partial

import torch
import torch.nn.functional as F

from ..harness import Case, Work, device, layer_pass, relative_error
from ..private import private

LENGTHS = (1024, 16384, 131072)
TOKENS, QUICK_TOKENS = 65536, 128  # a batch
HEADS, DIM, WINDOW = 12, 64, 128
PATTERNS = {"global": {"pattern": "g"}, "window of 128": {"pattern": "sw", "window_size": WINDOW}}


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ktokens_per_s", "tokens_a_batch": TOKENS, "dtype": "bfloat16", "heads": HEADS, "head_dim": DIM}


def inputs(length: int, tokens: int, dtype=torch.bfloat16, grad: bool = False):
    """Queries, keys and values (B, T, H, D)."""
    torch.manual_seed(0)
    shape = (max(1, tokens // length), length, HEADS, DIM)
    return [(torch.randn(shape, device=device()) * DIM**-0.5).to(dtype).requires_grad_(grad) for _ in range(3)]


def ours(backend: str, arguments: dict, q, k, v):
    """DenseAttention."""
    with private("use_backend")(backend):
        return private("dense_attention")(q, k, v, is_causal=True, **arguments)[0]


def flash(q, k, v):
    """Causal softmax attention over the whole row."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def make(attend, tokens: int, length: int, training: bool) -> Work:
    """One pass."""
    given = inputs(length, tokens, grad=training)
    return layer_pass(attend, given, given[0].shape[0] * length, training)


def check(arguments: dict, length: int) -> tuple[float, float]:
    """The kernel in bfloat16 against float32, beside plain PyTorch in bfloat16."""
    length = min(length, 16384)
    given = inputs(length, length, torch.float32)
    half = [x.to(torch.bfloat16) for x in given]
    exact = ours("torch", arguments, *(x.float() for x in half))
    same = ours("torch", arguments, *half)
    return relative_error(ours("auto", arguments, *half), exact), 2 * relative_error(same, exact) + 1e-6


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """All contenders at all lengths, forward first."""
    made, tokens = [], QUICK_TOKENS if quick else TOKENS
    for length in lengths or ([tokens // 2] if quick else LENGTHS):
        for training in (False, True):
            what = "forward and backward" if training else "forward"
            for name, arguments in PATTERNS.items():
                work = partial(make, partial(ours, "auto", arguments), tokens, length, training)
                made.append(Case(f"{name}, ours, {what}", length, work, partial(check, arguments, length)))
                work = partial(make, partial(ours, "torch", arguments), tokens, length, training)
                made.append(Case(f"{name}, plain PyTorch, {what}", length, work))
            made.append(Case(f"FlashAttention (SDPA), {what}", length, partial(make, flash, tokens, length, training)))
    return made
