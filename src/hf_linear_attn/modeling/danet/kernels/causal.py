"""When a causal product of DenseAttention runs as the Triton kernel `causal_bilinear`."""

import torch

from ...kernels.causal_bilinear import causal_bilinear
from ...kernels.conditions import at_most, one_dtype
from ...kernels.fast_paths import FastPath
from ...kernels.tracing import records_gradients

LARGEST_HEAD = 128
LARGEST_WINDOW = 1024  # beyond it, products with whole windows keep the matrix units busier


def _run_global(query, key, value, chunk, memory, keeps_memory=False):
    return causal_bilinear(query, key, value, None, memory)


def _covers_global(query, key, value, chunk, memory, keeps_memory=False) -> str | None:
    reason = at_most("head", query.shape[3], LARGEST_HEAD) or one_dtype(query)
    if reason is None and (keeps_memory or memory is not None) and records_gradients(query, key):
        return "it gives no gradient to states"
    return reason


def _run_sliding(query, key, value, window) -> torch.Tensor:
    return causal_bilinear(query, key, value, window)[0]


def _covers_sliding(query, key, value, window) -> str | None:
    return (
        at_most("head", query.shape[3], LARGEST_HEAD) or at_most("window", window, LARGEST_WINDOW) or one_dtype(query)
    )


CAUSAL = FastPath("chunks in one kernel", run=_run_global, covers=_covers_global, traceable=True)
SLIDING = FastPath("windows in one kernel", run=_run_sliding, covers=_covers_sliding, traceable=True)
