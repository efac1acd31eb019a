"""One attention layer between its projections: SEA (12 heads of 64, k 64, 64 cells, causal) beside dense and FlashAttention.

65,536 tokens a batch (one row if it is longer), bfloat16; forward alone, and forward and backward. Dense is Transformers' eager
attention with its T x T matrix; SEA's row holds everything that SEA adds: estimator, choice of cells and sparse attention.
"""

from functools import partial

import torch
import torch.nn.functional as F

from ..harness import Case, Work, device, layer_pass, relative_error
from ..private import private

LENGTHS = (512, 2048, 8192, 32768, 65536, 262144)
TOKENS, QUICK_TOKENS = 65536, 128  # a batch
HEADS, DIM, K, CELLS = 12, 64, 64, 64
LONGEST_DENSE = 8192  # a row of it takes 12 T^2 numbers a few times over


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"unit": "ktokens_per_s", "tokens_a_batch": TOKENS, "dtype": "bfloat16", "heads": HEADS, "head_dim": DIM}


def inputs(length: int, tokens: int, dtype=torch.bfloat16, grad: bool = False):
    """Queries (scaled, as in a causal host), keys and values (B, H, T, D)."""
    torch.manual_seed(0)
    shape = (max(1, tokens // length), HEADS, length, DIM)
    made = [torch.randn(shape, device=device(), dtype=dtype) for _ in range(3)]
    made[0] *= DIM**-0.5
    return [x.requires_grad_(grad) for x in made]


def core(length: int) -> torch.nn.Module:
    """What SEA adds to a host's layer."""
    torch.manual_seed(0)
    with torch.device(device()):
        return private("SeaAttentionCore")(private("SeaOptions")(HEADS, DIM, True, K, CELLS, max_positions=length))


def sea(length: int):
    """Ours."""
    layer = core(length).to(torch.bfloat16)
    return lambda q, k, v: layer(q, k, v, scaling=1.0).context


def sea_compiled(length: int):
    """Ours, through torch.compile."""
    layer = torch.compile(core(length).to(torch.bfloat16))
    return lambda q, k, v: layer(q, k, v, scaling=1.0).context


def dense(length: int):
    """Scores, mask, softmax in float32, product, as Transformers' eager attention does it."""
    mask = torch.full((length, length), torch.finfo(torch.bfloat16).min, device=device(), dtype=torch.bfloat16).triu(1)

    def attend(q, k, v):
        scores = q @ k.transpose(2, 3) + mask
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return attend


def flash(length: int):
    """PyTorch's SDPA, which takes FlashAttention for these sizes."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)


CONTENDERS = {
    "SEA, ours": sea,
    "SEA, ours, compiled": sea_compiled,
    "dense, eager": dense,
    "FlashAttention (SDPA)": flash,
}


def make(build, tokens: int, length: int, training: bool) -> Work:
    """One pass of a layer."""
    given = inputs(length, tokens, grad=training)
    return layer_pass(build(length), given, given[0].shape[0] * length, training)


def check(length: int) -> tuple[float, float]:
    """The layer in bfloat16 with kernels against float32 in plain PyTorch, both on the cells that the float32 layer chose.

    Two roundings of the estimate choose different cells, so each precision attends where the exact layer would.
    """
    attend, use_backend = private("chunked_sparse_attention"), private("use_backend")
    length = min(length, 8192)
    given = inputs(length, length, torch.float32)
    with torch.no_grad():
        with use_backend("torch"):
            out = core(length)(*given, scaling=1.0)
        seen = (torch.arange(length, device=device()) + 1)[None]

        def run(backend, dtype):
            with use_backend(backend):
                return attend(*(x.to(dtype) for x in given), out.cells, seen, 1.0, K)

        exact, same = run("torch", torch.float32), run("torch", torch.bfloat16)
        return relative_error(run("auto", torch.bfloat16), exact), 2 * relative_error(same, exact) + 1e-6


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """All contenders at all lengths, forward first."""
    made = []
    tokens = QUICK_TOKENS if quick else TOKENS
    for length in lengths or ([tokens // 2] if quick else LENGTHS):
        for training in (False, True):
            what = "forward and backward" if training else "forward"
            for name, build in CONTENDERS.items():
                if build is not dense or length <= LONGEST_DENSE:
                    gate = partial(check, length) if name.startswith("SEA") else None
                    made.append(Case(f"{name}, {what}", length, partial(make, build, tokens, length, training), gate))
    return made
