"""Where the kernel tests run: on a CUDA device, or small ones on a CPU through Triton's interpreter (TRITON_INTERPRET=1)."""

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
INTERPRETED = not HAS_GPU and os.environ.get("TRITON_INTERPRET") == "1" and bool(importlib.util.find_spec("triton"))
DEVICE = "cuda" if HAS_GPU else "cpu"
REASON = "needs a CUDA device (or TRITON_INTERPRET=1 and the package triton, for the small cases on a CPU)"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if HAS_GPU else [torch.float32]

needs_kernels = [pytest.mark.gpu, pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason=REASON)]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device: too large for Triton's interpreter")


def sizes(small: list, large: list) -> list:
    """`small`, and on a GPU `large` as well."""
    return [*small, *(pytest.param(x, marks=needs_gpu) for x in large)]


def assert_as_accurate(ours, plain, exact, names):
    """The error of each kernel result is at most twice that of plain PyTorch in the same dtype, both against float64.

    To that comes one part in a million, of the result or (where it is 0 exactly) of numbers of size 1.
    """
    for name, a, b, reference in zip(names, ours, plain, exact):
        assert torch.isfinite(a).all(), f"{name}: not finite"
        error, allowed = ((x.double() - reference.double()).norm() for x in (a, b))
        slack = 1e-6 * max(reference.double().norm().item(), reference.numel() ** 0.5)
        assert error <= 2 * allowed + slack, f"{name}: {error:.2e} against {allowed:.2e}"


def poison(numel: int) -> None:
    """Fill what the allocator hands out next with NaN."""
    torch.empty(numel, device=DEVICE).fill_(float("nan"))
