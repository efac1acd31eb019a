"""The fast paths of SEA: which calls each kernel covers, and how it is called. All are operators that a compiler can see.

A kernel's file is loaded when it first runs: it takes the family's formulas, whose files import this table.
"""

import torch
from torch import nn

from ...kernels.conditions import at_most, dtypes_as_written, float32, one_dtype, plain
from ...kernels.fast_paths import FastPath
from ...kernels.tracing import records_gradients

LARGEST_GROUP = 8192  # cells that compete with each other
WIDEST_NORM = 256  # features of a row
MOST_FEATURES = 128  # random features that the kernel attention holds
WIDTH = 64  # features of the values that it sums at once


def _why_not_select(probs, length, k, group, keep=None, official=False) -> str | None:
    if group not in ("causal_batch", "query"):
        return f"it chooses among the cells of one query, not of the group {group!r}"
    if official:
        return "it leaves no ties to torch.sort"
    competing = probs.shape[-1] * (probs.shape[1] if group == "causal_batch" else 1)
    return float32("probabilities", probs) or at_most("group of cells", competing, LARGEST_GROUP)


def _select(probs, length, k, group, keep=None, official=False) -> torch.Tensor:
    from ..cells import cell_budget
    from .sparse_attention import select_largest

    batch, heads, time, cells = probs.shape
    probs, budget = probs.detach(), cell_budget(length, k, heads, cells, group)  # (B, T)
    if group == "query":  # each head by itself
        probs = probs.flatten(0, 1)[:, None]
        budget, keep = (None if x is None else x.repeat_interleave(heads, dim=0) for x in (budget, keep))
    return select_largest(probs, budget, keep).view(batch, heads, time, cells)


def _why_not_attend(q, *others, **options) -> str | None:
    return one_dtype(q)


def _attend(q, keys, values, cells, length, scale, limit=None, key_slots=None, pairs_per_chunk=None) -> torch.Tensor:
    from .sparse_attention import sparse_attention_kernel

    return sparse_attention_kernel(q, keys, values, cells, length, scale, limit, key_slots)


def _why_not_sum(query_features, key_features, values, state=None, chunk_size=None) -> str | None:
    if query_features.shape[2] == 1:
        return "a single token is a step, with nothing to sum"
    if state is not None and records_gradients(state):
        return "it gives no gradient to states"
    return float32("features", query_features) or at_most("number of features", query_features.shape[-1], MOST_FEATURES)


def _sum(query_features, key_features, values, state=None, chunk_size=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The causal form as causal bilinear sums: one for each part of the values, one for the denominator."""
    from ...kernels.causal_bilinear import causal_bilinear
    from ..kernel_attention import KEY_SUM_EPS

    values = values if isinstance(values, tuple) else (values,)
    q, k = query_features.transpose(1, 2), key_features.transpose(1, 2)
    narrow = [part for x in values for part in x.split(WIDTH, dim=-1)]
    parts, sums = [], []
    start = 0
    for part in (*narrow, q.new_ones(*query_features.shape[:3], 1)):
        memory = None if state is None else state[..., start : start + part.shape[-1]].float()
        out, final = causal_bilinear(q, k, part.transpose(1, 2), None, memory)
        parts.append(out.transpose(1, 2))
        sums.append(final)
        start += part.shape[-1]
    denominator = parts.pop() + KEY_SUM_EPS * query_features.sum(dim=-1, keepdim=True)
    return torch.cat(parts, dim=-1) / denominator, torch.cat(sums, dim=-1)


def _why_not_norm(norm: nn.LayerNorm, x: torch.Tensor) -> str | None:
    return (
        plain(norm, kind=nn.LayerNorm, bias=True)
        or at_most("number of normed axes", len(norm.normalized_shape), 1)
        or at_most("width of rows", x.shape[-1], WIDEST_NORM)
        or dtypes_as_written(x)
        or one_dtype(x, norm.weight)
    )


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    from .narrow_norm import narrow_norm

    return narrow_norm(x, norm.weight, norm.bias, norm.eps)


SELECTION: tuple[FastPath, ...] = (FastPath("largest cells without a sort", _select, _why_not_select, traceable=True),)
SPARSE_ATTENTION: tuple[FastPath, ...] = (
    FastPath("attention on the keys of the cells", _attend, _why_not_attend, traceable=True),
)
KERNEL_ATTENTION: tuple[FastPath, ...] = (FastPath("causal sums of features", _sum, _why_not_sum, traceable=True),)
NARROW_NORM: tuple[FastPath, ...] = (FastPath("LayerNorm of narrow rows", _norm, _why_not_norm, traceable=True),)
