"""Peak memory and time of one SEA layer on a CPU: a forward pass of 32k tokens, a training step of 16k with a teacher.

    python -m benchmarks sea-memory --out docs/data/sea-memory.json

Each case runs in a process of its own, whose peak is what the operating system saw, weights and inputs included. 12 heads of 64,
k = 64, M = 128, float32, chunked form, one thread; the attention losses look at 64 sampled rows.
"""

import multiprocessing
import resource
import time
from functools import partial

import torch

from ..harness import Case
from ..private import private

HEADS, HEAD_DIM = 12, 64
CASES = [(causal, step, tokens) for step, tokens in ((False, 32768), (True, 16384)) for causal in (True, False)]


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"dtype": "float32", "heads": HEADS, "head_dim": HEAD_DIM}


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """Forward passes, then training steps."""
    return [
        Case(f"{'training step' if step else 'forward'}, causal {causal}", n, partial(layer, causal, step, n))
        for causal, step, tokens in CASES
        for n in ([tokens // 64] if quick else lengths or [tokens])
    ]


def measure(case: Case, runs: int) -> dict:
    """One pass, once, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"name": case.name, "length": case.length, **pool.apply(case.make)}


def layer(causal: bool, step: bool, tokens: int) -> dict:
    """Run one case here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = private("SeaOptions")(
        HEADS, HEAD_DIM, causal, k=64, predictor_length=128, max_positions=tokens, backend="chunked"
    )
    core = private("SeaAttentionCore")(options)
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM, requires_grad=step) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    if step:
        context = torch.randn(1, tokens, HEADS * HEAD_DIM)
        teacher = private("TeacherTargets")(context=context, q=q.detach(), k=k.detach(), scaling=HEAD_DIM**-0.5)
        rows = torch.randperm(tokens)[:64].sort().values
        core(q, k, v, teacher=teacher, scaling=HEAD_DIM**-0.5, loss_rows=rows).loss.backward()
    else:
        with torch.no_grad():
            core(q, k, v, scaling=HEAD_DIM**-0.5)
    return {
        "causal": causal,
        "step": step,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "before_gib": round(before, 2),
    }
