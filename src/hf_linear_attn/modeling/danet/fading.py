"""Causal DenseAttention whose terms fade: o_i = q_i M_i, with M_i = (1 - exp(-r)) sum_{j <= i} exp(-r (i - j)) k_j^T v_j.

r_h = ln 2 / half-life is the rate of head h, and i counts the real tokens of the document. The factor 1 - exp(-r) is one over the
sum of all fading factors: it makes M a mean, as w^(-1/3) of three inputs does for a window of w, and no entry of M is ever larger
than the largest product of two features, however long the text. Not of the published model; a decay a head is that of RetNet
(arXiv 2307.08621).

Shapes as in `product_orders`: (B, T, H, D) tokens with the real ones first, (B, n, H, C, D) chunks, rates (H,).
"""

import torch
import torch.nn.functional as F

from ..kernels.tracing import as_written
from ..shared.layers.decayed_sum import decayed_sum
from ..shared.precision import accumulation_dtype
from .layouts import at_most, chunk_padding, chunks_of, from_chunks, more_than


def fading_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rates: torch.Tensor,
    chunk: int,
    segment_ids: torch.Tensor | None,
    memory: torch.Tensor | None,
) -> torch.Tensor:
    """The outputs (B, T, H, D), in chunks. `memory` (B, H, D, D) is M as document 0 left it before this row, or None.

    A chunk hands on the sum of the document that is open at its end; `decayed_sum` takes these sums on from chunk to chunk.
    Products run in the input's dtype, sums over chunks in float32 at least. No factor is above 1. O(T (C + D)) a feature.
    """
    length, shared = query.shape[1], value is key
    chunk, wide = at_most(length, chunk), accumulation_dtype(query.dtype)
    query, key = chunks_of(query, chunk), chunks_of(key, chunk)
    value = key if shared else chunks_of(value, chunk)
    number, behind = chunk_padding(length, chunk)
    ids = None  # (B, n, C)
    if segment_ids is not None:
        ids = F.pad(segment_ids, (0, behind), value=-1).unflatten(1, (number, chunk))
    rates = rates.to(wide)
    share = -torch.expm1(-rates)[:, None, None]  # (H, 1, 1), the factor 1 - exp(-r)
    place = torch.arange(chunk, device=query.device, dtype=wide)

    # First phase: tokens of the same chunk and document. What is hidden is replaced, as in `banded_attention`.
    age = place[:, None] - place  # (C, C)
    fading = torch.exp(-rates[:, None, None] * age.clamp(min=0)).to(query.dtype)
    scores = (query @ key.transpose(-1, -2)) * fading
    if ids is not None:
        scores = torch.where(ids[:, :, None, :, None] == ids[:, :, None, None, :], scores, 0.0)
    out = (scores.tril() @ value) * share  # (B, n, H, C, D), in float32: half precision has no small shares
    if memory is None and not more_than(number, 1):
        return from_chunks(out.to(query.dtype), length)

    # Second phase: what each chunk writes, as it stands at its end, and the sums of all chunks before each.
    left = torch.exp(-rates[:, None] * (chunk - 1 - place))  # (H, C)
    written = key * left[..., None].to(key.dtype)
    edges = None
    if ids is not None:
        edges = F.pad(ids.amax(-1), (1, 0))[:, :-1]  # (B, n): the document before each chunk, 0 before the first
        written = written * (ids == ids.amax(-1, keepdim=True))[:, :, None, :, None].to(key.dtype)
    written = (written.transpose(-1, -2) @ value).to(wide) * share  # (B, n, H, D, D)
    written = F.pad(written, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    if memory is not None:
        written[:, :1] += memory[:, None].to(wide)
    with as_written(written):
        before, _ = decayed_sum(written.flatten(3), rates * chunk, segment_ids=edges, of_chunks=True)
    before = before.unflatten(-1, key.shape[-1:] * 2)  # (B, n, H, D, D)

    # Third phase: tokens of earlier chunks.
    read = (query * torch.exp(-rates[:, None] * (place + 1))[..., None].to(query.dtype)) @ before.to(query.dtype)
    if ids is not None:
        read = torch.where((ids == edges[..., None])[:, :, None, :, None], read, 0.0)
    return from_chunks((out + read).to(query.dtype), length)


def fading_factors(ranks: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """(1 - exp(-r)) exp(-r (i - j)) (B or 1, H, T, T) of tokens of ranks (B or 1, T), 0 for j > i: the definition's A_ij."""
    age = (ranks[..., :, None] - ranks[..., None, :])[:, None].to(rates.dtype)
    rates = rates[:, None, None]
    return torch.where(age >= 0, -torch.expm1(-rates) * torch.exp(-rates * age.clamp(min=0)), 0.0)
