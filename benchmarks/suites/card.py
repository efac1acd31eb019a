"""What the card itself gives: products and copies in a short burst and under a long load, with clock and power beside them.

A product's speed depends on the clock, and the clock on the power that the product draws: the limit that a model can reach is
that of the clock under its own load.
"""

import time
from functools import partial
from typing import Any

import torch

from ..harness import Case, Work, device
from ..watch import Watch

BURST, LOAD_SECONDS, PAUSE_SECONDS = 3, 1.5, 0.5


def about(suite: str) -> dict:
    """Facts for the head of the JSON."""
    return {"dtype": "bfloat16"}


def product(rows: int, inner: int, columns: int, batch: int | None = None) -> Work:
    """A product of random matrices, and its operations."""
    shape = () if batch is None else (batch,)
    left = torch.randn(*shape, rows, inner, device=device(), dtype=torch.bfloat16)
    right = torch.randn(*shape, inner, columns, device=device(), dtype=torch.bfloat16)
    out = left.new_empty(*shape, rows, columns)
    return Work(lambda: torch.matmul(left, right, out=out), 2 * (batch or 1) * rows * inner * columns)


def weight_gradient(rows: int, inner: int, columns: int) -> Work:
    """X^T Y for X (inner, rows) and Y (inner, columns), and its operations."""
    left = torch.randn(inner, rows, device=device(), dtype=torch.bfloat16)
    right = torch.randn(inner, columns, device=device(), dtype=torch.bfloat16)
    return Work(lambda: left.mT @ right, 2 * rows * inner * columns)


def copy(numbers: int) -> Work:
    """A copy, and the bytes that it reads and writes."""
    source = torch.randn(numbers, device=device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), 4 * numbers)


LOADS = {
    "product 8,192 x 8,192 x 8,192": (product, 8192, 8192, 8192),
    "LEAP: up, 65,536 x 768 x 3,072": (product, 65536, 768, 3072),
    "LEAP: down, 65,536 x 3,072 x 768": (product, 65536, 3072, 768),
    "LEAP: weight gradient, 3,072 x 65,536 x 768": (weight_gradient, 3072, 65536, 768),
    "DANet: up, 65,536 x 1,024 x 4,096": (product, 65536, 1024, 4096),
    "DANet: down, 65,536 x 4,096 x 1,024": (product, 65536, 4096, 1024),
    "DANet: weight gradient, 4,096 x 65,536 x 1,024": (weight_gradient, 4096, 65536, 1024),
    "DANet: queries, 65,536 x 1,024 x 1,024": (product, 65536, 1024, 1024),
    "DANet: memory, 64 times 1,024 x 1,024 x 1,024": (product, 1024, 1024, 1024, 64),
    "copy of 2 GiB": (copy, 2**30),
}


def cases(suite: str, lengths: list[int], quick: bool) -> list[Case]:
    """Every load."""
    divisor = 64 if quick else 1
    return [
        Case(name, 0, partial(make, *(max(1, size // divisor) for size in sizes)))
        for name, (make, *sizes) in LOADS.items()
    ]


def measure(case: Case, runs: int) -> dict[str, Any]:
    """Speed in a burst after a pause, and over a load of seconds, TFLOP/s or TB/s; no timer of PyTorch's leaves a card cold."""
    work = case.make()
    seconds(work, 1)
    time.sleep(PAUSE_SECONDS)
    burst = seconds(work, BURST)
    count = max(1, int(LOAD_SECONDS / burst))
    seconds(work, count // 4)
    with Watch() as watch:
        load = seconds(work, count)
    return {
        "name": case.name,
        "length": case.length,
        "unit": "TB/s" if case.name.startswith("copy") else "TFLOP/s",
        "burst": round(work.tokens / burst / 1e12, 2),
        "load": round(work.tokens / load / 1e12, 2),
        "ms": round(1e3 * load, 4),
        **watch.facts(),
    }


def seconds(work: Work, count: int) -> float:
    """Of one call, in a row of so many."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(count):
        work.step()
    wait()
    return (time.perf_counter() - started) / max(1, count)
