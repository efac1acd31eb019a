"""The product orders of DenseAttention, without Python loops over tokens: full, chunked, banded and per document.

Shapes: query, key, value and every result are (B, T, H, D); inside, chunks are (B, n, H, C, D). Where `value` is `key` (no
positions on the keys, or the same on both), it is carried as one tensor. Zero rows write nothing, so padding to chunks is free.
"""

import torch
import torch.nn.functional as F

from ..kernels.fast_paths import fast_paths
from ..kernels.running_sum import running_sum
from ..shared.precision import accumulation_dtype
from .fast_paths import CAUSAL_PRODUCT, LINEAR_PRODUCT, QUADRATIC_PRODUCT, SLIDING_PRODUCT
from .layouts import (
    add_to_later,
    after_first,
    at_most,
    before_last,
    chunk_padding,
    chunks_of,
    from_chunks,
    heads_first,
    more_than,
)


def bidirectional_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mode: str) -> torch.Tensor:
    """All tokens see all tokens: `linear_product` or `quadratic_product`, with equal results. Specification 1.2.

    "auto" is linear when D <= T, and for the symbolic T of torch.export: one program serves every length, and `mode` chooses the
    other order for it.
    """
    if mode == "linear" or (mode == "auto" and more_than(query.shape[1], query.shape[3] - 1)):
        return linear_product(query, key, value)
    return quadratic_product(query, key, value)


@fast_paths(*LINEAR_PRODUCT)
def linear_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Q (K^T V): 4 T D^2 operations a head."""
    query, key, value = _heads_first(query, key, value)
    return (query @ (key.transpose(-1, -2) @ value)).transpose(1, 2)


@fast_paths(*QUADRATIC_PRODUCT)
def quadratic_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(Q K^T) V: 4 T^2 D operations a head."""
    query, key, value = _heads_first(query, key, value)
    return ((query @ key.transpose(-1, -2)) @ value).transpose(1, 2)


def _heads_first(query, key, value):
    keys = heads_first(key)
    return heads_first(query), keys, keys if value is key else heads_first(value)


@fast_paths(*CAUSAL_PRODUCT)
def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk: int,
    memory: torch.Tensor | None,
    keeps_memory: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """tril(Q K^T) V in chunks, from an initial memory `(B, H, D, D)` or none.

        O_c = tril(Q_c K_c^T) V_c + Q_c (M_in + sum_{c' < c} K_c'^T V_c')        specification 1.3 and 1.5

    O(T (C + D)) a feature. Products run in the input's dtype, the running sum over chunks in float32 at least.

    Returns:
        The output and the memory after the last token, which has a gradient only with `keeps_memory`.
    """
    length, shared = query.shape[1], value is key
    chunk = at_most(length, chunk)
    query, key = chunks_of(query, chunk), chunks_of(key, chunk)
    value = key if shared else chunks_of(value, chunk)
    # First phase: tokens of the same chunk.
    out = (query @ key.transpose(-1, -2)).tril() @ value  # (B, n, H, C, D)
    # Second phase: what each chunk writes, summed up to and including it.
    written = (key.transpose(-1, -2) @ value).to(accumulation_dtype(query.dtype))  # (B, n, H, D, D)
    sums = running_sum(written, 1) if more_than(written.shape[1], 1) else written
    if memory is not None:
        sums = sums + memory[:, None].to(sums.dtype)
        out[:, :1] += query[:, :1] @ memory[:, None].to(query.dtype)
    # Third phase: tokens of earlier chunks.
    if more_than(out.shape[1], 1):
        out = add_to_later(out, after_first(query) @ before_last(sums).to(query.dtype))
    return from_chunks(out, length), sums[:, -1]


@fast_paths(*SLIDING_PRODUCT)
def sliding_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """Causal window of w keys including the token itself: own chunk and the upper triangle of the previous one.

    Row r of a chunk sees r + 1 keys of its own chunk and w - 1 - r of the previous one. Specification 1.4; O(T w).
    """
    length, shared = query.shape[1], value is key
    chunk = at_most(length, window)
    query, key = chunks_of(query, chunk), chunks_of(key, chunk)
    value = key if shared else chunks_of(value, chunk)
    out = (query @ key.transpose(-1, -2)).tril() @ value
    if more_than(out.shape[1], 1):
        scores = (after_first(query) @ before_last(key).transpose(-1, -2)).triu(1)
        out = add_to_later(out, scores @ before_last(value))
    return from_chunks(out, length)


def _band(chunks: torch.Tensor, causal: bool) -> torch.Tensor:
    """Each chunk (axis 1) with its previous, and unless causal its next, chunk: the token axis (3) grows to 2 C or 3 C."""
    empty = torch.zeros_like(chunks[:, :1])
    previous = torch.cat((empty, chunks[:, :-1]), dim=1)
    if causal:
        return torch.cat((previous, chunks), dim=3)
    return torch.cat((previous, chunks, torch.cat((chunks[:, 1:], empty), dim=1)), dim=3)


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_ids: torch.Tensor,
    starts: torch.Tensor,
    window: int,
    causal: bool,
    sliding: bool,
) -> torch.Tensor:
    """Windows of at most w consecutive slots that may begin anywhere: each chunk of w tokens against its neighbours. O(T w).

    Args:
        segment_ids: (B, T) documents.
        starts: (B, T) first slot of each token's window, or the token's own slot if `sliding`.
    """
    length, shared = query.shape[1], value is key
    chunk = at_most(length, window)
    query = chunks_of(query, chunk)  # (B, n, H, C, D)
    key = _band(chunks_of(key, chunk), causal)  # (B, n, H, 2 C or 3 C, D)
    value = key if shared else _band(chunks_of(value, chunk), causal)

    def pair(ids, fill):  # (B, T) -> (B, n, 1, C, 1) for queries and (B, n, 1, 1, 2 C or 3 C) for keys
        number, behind = chunk_padding(length, chunk)
        ids = F.pad(ids, (0, behind), value=fill).unflatten(1, (number, chunk))[:, :, None, :, None]
        return ids, _band(ids, causal).transpose(-1, -2)

    # First phase: who sees whom. A band has empty slots before the first chunk: +1 keeps their zero apart from document 0.
    query_segment, key_segment = pair(segment_ids + 1, -1)
    query_start, key_start = pair(starts, -1)
    same_window = query_start - key_start < window if sliding else query_start == key_start
    allowed = (query_segment == key_segment) & same_window
    if causal:
        slot = torch.arange(chunk, device=query.device)
        key_slot = torch.arange(-chunk, key.shape[3] - chunk, device=query.device)
        allowed = allowed & (key_slot <= slot[:, None])
    # Second phase: the products. What is hidden is replaced, not multiplied by 0: half precision may overflow between documents.
    scores = torch.where(allowed, query @ key.transpose(-1, -2), 0.0)
    return from_chunks(scores @ value, length)


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment_ids: torch.Tensor,
    causal: bool,
    chunk: int,
    memory: torch.Tensor | None,
) -> torch.Tensor:
    """Global attention inside each packed document. `memory` (B, H, D, D) is what document 0 wrote before this row.

    A chunk meets at most one document that began before it, the one of the slot before its first, and one that goes on after it.
    So what it takes from other chunks is a sum over earlier ones, and unless causal one over later ones, each of one document.
    """
    length, shared = query.shape[1], value is key
    chunk, wide = at_most(length, chunk), accumulation_dtype(query.dtype)
    query, key = chunks_of(query, chunk), chunks_of(key, chunk)
    value = key if shared else chunks_of(value, chunk)
    number, behind = chunk_padding(length, chunk)
    ids = F.pad(segment_ids, (0, behind), value=-1).unflatten(1, (number, chunk))  # (B, n, C)

    # First phase: tokens of the same chunk and document.
    same = ids[:, :, None, :, None] == ids[:, :, None, None, :]  # (B, n, 1, C, C)
    scores = torch.where(same, query @ key.transpose(-1, -2), 0.0)  # replaced as in `banded_attention`
    out = (scores.tril() if causal else scores) @ value  # (B, n, H, C, D)

    # Second phase: earlier chunks. The state's document, 0, stands before the first one; slots behind the end carry -1, so that
    # the largest number of a chunk is that of its last document.
    if memory is None:
        batch, _, heads, _, head_dim = query.shape
        memory = query.new_zeros(batch, heads, head_dim, head_dim, dtype=wide)
    edges = F.pad(ids.amax(-1), (1, 0))  # (B, 1 + n)
    written = _written_at(edges[:, 1:], ids, key, value)  # (B, n, H, D, D)
    sums = _document_sums(torch.cat((memory[:, None].to(wide), written), dim=1), edges)
    out = out + _read_at(edges[:, :-1], ids, query, sums[:, :-1])

    # Third phase: later chunks, the same scan from the other side, with the document of the first slot.
    if not causal and more_than(number, 1):
        edges = ids[:, :, 0]
        sums = _document_sums(_written_at(edges, ids, key, value).flip(1), edges.flip(1)).flip(1)
        later = _read_at(edges[:, 1:], ids[:, :-1], query[:, :-1], sums[:, 1:])
        out = torch.cat((out[:, :-1] + later, out[:, -1:]), dim=1)
    return from_chunks(out, length)


def _written_at(edges, ids, key, value) -> torch.Tensor:
    """K^T V (B, n, H, D, D) of those tokens of each chunk that are of the document `edges` (B, n)."""
    mine = (ids == edges[..., None])[:, :, None, :, None].to(key.dtype)
    return ((key * mine).transpose(-1, -2) @ value).to(accumulation_dtype(key.dtype))


def _read_at(edges, ids, query, sums) -> torch.Tensor:
    """Q M (B, n, H, C, D) for those tokens of each chunk that are of the document `edges` (B, n), whose sum is M; else 0."""
    mine = (ids == edges[..., None])[:, :, None, :, None]
    return torch.where(mine, query @ sums.to(query.dtype), 0.0)


def _document_sums(written: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Running sums along chunks that restart when the document changes: `edges` (B, n), `written` (B, n, H, D, D).

    Chunks of one document are adjacent: a doubling scan adds the partial sum `step` chunks back if it is of the same document.
    """
    step = 1
    while step < written.shape[1]:
        same = (edges[:, step:] == edges[:, :-step])[..., None, None, None]
        earlier = torch.where(same, written[:, :-step], 0.0)
        written = torch.cat((written[:, :step], written[:, step:] + earlier), dim=1)
        step *= 2
    return written
