"""Softmax attention on the keys of the selected cells: a dense reference and a sparse form of linear memory.

q (B, H, T, D); keys and values (B, G, S, D) with G heads, each shared by H / G query heads; cells (B, H, T, M) bool;
length (B, T) visible keys of each row. `key_slots` (B, S') maps the rank of a key to its slot; None means that they are equal.
Source: specification, sections 1.7, 1.8 and 3.2.
"""

import torch
import torch.nn.functional as F

from ..kernels.fast_paths import fast_paths
from ..kernels.second_derivatives import differentiable_gradients
from ..kernels.tracing import records_gradients
from ..shared.precision import accumulation_dtype
from .cells import cell_start, key_to_cell, keys_per_cell, within_cell_limit
from .fast_paths import SPARSE_ATTENTION

PAIRS_PER_CHUNK = 1 << 15  # (row, key) pairs whose keys are gathered together: they fit a CPU's cache
COUNT_ROWS = 4096


def grow_cells(cells: torch.Tensor, length: torch.Tensor, num_keys: int, limit: int | None = None) -> torch.Tensor:
    """Selected cells -> selected keys by rank, (B, H, T, M) -> (B, H, T, num_keys) bool. Quadratic: for the dense form only."""
    num_cells = cells.shape[-1]
    rank = torch.arange(num_keys, device=cells.device)
    cell = key_to_cell(rank, length[..., None], num_cells)  # (B, T, S)
    allowed = rank < length[..., None]
    if limit is not None and limit < -(-num_keys // num_cells):  # else no cell is wide enough to be limited
        allowed = allowed & within_cell_limit(rank, cell, length[..., None], num_cells, limit)
    grown = cells.gather(-1, cell[:, None].expand(-1, cells.shape[1], -1, -1))
    return grown & allowed[:, None]


def repeat_key_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, G, S, D) -> (B, H, S, D): each key head for its H / G query heads in a row."""
    repeats = num_heads // x.shape[1]
    return x if repeats == 1 else x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def dense_sparse_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: full scores, softmax over the kept keys (B, H, T, S).

    Returns the context (B, H, T, D) and the probabilities (B, H, T, S), at least float32; a row without keys gives 0. O(T S D)
    time, O(T S) memory.
    """
    dtype = accumulation_dtype(q.dtype)
    keys, values = (repeat_key_heads(x, q.shape[1]).to(dtype) for x in (keys, values))
    scores = (q.to(dtype) @ keys.transpose(-1, -2)).to(dtype) * scale  # mixed precision multiplies in half
    probs = scores.masked_fill(~kept, torch.finfo(dtype).min / 2).softmax(dim=-1)
    probs = probs.masked_fill(~kept, 0.0)
    return (probs @ values).to(q.dtype), probs


@fast_paths(*SPARSE_ATTENTION)
def chunked_sparse_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cells: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    limit: int | None = None,
    key_slots: torch.Tensor | None = None,
    pairs_per_chunk: int = PAIRS_PER_CHUNK,
) -> torch.Tensor:
    """Attention on the kept keys alone, (B, H, T, D): time O(kept keys x D), memory linear in T.

    The rows of all samples and heads form one list; chunks of it are expanded to (row, key) pairs, whose keys and values are
    gathered. The backward pass expands them again instead of keeping them (second derivatives keep them).
    """
    cells = cells.contiguous()
    return _ChunkedSparseAttention.apply(q, keys, values, cells, length, scale, limit, key_slots, pairs_per_chunk)


def is_fused(q: torch.Tensor) -> bool:
    """Whether `chunked_sparse_attention` of these queries takes a fast path, which no dense form beats."""
    return any(path.takes(q) for path in SPARSE_ATTENTION)


def _attend_by_chunks(q, keys, values, cells, length, scale, limit, key_slots, chunks):
    """Context (B, H, T, D) and the logarithm of each row's partition function (B H T,)."""
    dtype = accumulation_dtype(q.dtype)
    rows_q, rows_k, rows_v = (x.reshape(-1, x.shape[-1]).to(dtype) for x in (q, keys, values))
    contexts, log_sums = [], []
    for start, stop in chunks:
        row, key = expand_pairs(cells, length, start, stop, limit, key_slots, keys.shape[1], keys.shape[2])
        # Whole rows are selected, which is several times as fast as indexing.
        scores = (rows_q[start:stop].index_select(0, row) * rows_k.index_select(0, key)).sum(dim=-1) * scale  # (pairs,)
        top = scores.new_full((stop - start,), -torch.inf).scatter_reduce(0, row, scores.detach(), "amax")
        weights = (scores - top[row]).exp()
        total = scores.new_zeros(stop - start).index_add(0, row, weights)
        contexts.append(_sums_of_values(weights / total[row], rows_v, row, key, stop - start))
        log_sums.append(torch.where(total > 0, top + total.detach().clamp_min(torch.finfo(dtype).tiny).log(), 0.0))
    return torch.cat(contexts).view(*q.shape[:-1], values.shape[-1]), torch.cat(log_sums)


def _sums_of_values(weights, rows_v, row, key, count: int) -> torch.Tensor:
    """Sum over the pairs of each of `count` rows, which stand in order, of weight times value: (count, E)."""
    if records_gradients():
        shares = weights[:, None] * rows_v.index_select(0, key)
        return shares.new_zeros(count, rows_v.shape[-1]).index_add_(0, row, shares)
    first = torch.searchsorted(row, torch.arange(count, device=row.device))  # pair of each row
    return F.embedding_bag(key, rows_v, first, mode="sum", per_sample_weights=weights)  # no copy of a value a pair


def chunked_formula(cells, length, scale, limit, key_slots, chunks=None):
    """The attention of q, keys and values in operators that autograd knows; it keeps every (row, key) pair."""
    chunks = row_chunks(cells, length, limit, PAIRS_PER_CHUNK) if chunks is None else chunks

    def formula(q, keys, values):
        return _attend_by_chunks(q, keys, values, cells, length, scale, limit, key_slots, chunks)[0].to(q.dtype)

    return formula


class _ChunkedSparseAttention(torch.autograd.Function):
    """Attention by chunks of pairs that keeps no pair for backward: inputs, context and a logarithm a row are enough."""

    @staticmethod
    def forward(ctx, q, keys, values, cells, length, scale, limit, key_slots, pairs_per_chunk):
        chunks = row_chunks(cells, length, limit, pairs_per_chunk)
        context, log_sum = _attend_by_chunks(q, keys, values, cells, length, scale, limit, key_slots, chunks)
        ctx.save_for_backward(q, keys, values, cells, length, key_slots, context, log_sum)
        ctx.scale, ctx.limit, ctx.chunks = scale, limit, chunks
        return context.to(q.dtype)

    @staticmethod
    def backward(ctx, grad_context):
        q, keys, values, cells, length, key_slots, context, log_sum = ctx.saved_tensors
        if records_gradients():  # create_graph=True: the gradients must have one themselves
            formula = chunked_formula(cells, length, ctx.scale, ctx.limit, key_slots, ctx.chunks)
            grads = differentiable_gradients(formula, (q, keys, values), ctx.needs_input_grad, grad_context)
            return *grads, None, None, None, None, None, None
        dtype = context.dtype
        rows_q = q.reshape(-1, q.shape[-1])
        rows_k, rows_v = keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1])
        grad_rows = grad_context.reshape(-1, values.shape[-1]).to(dtype)
        # sum_j p_j (dL/dp_j), the term that the softmax takes out, is the product of the output with its gradient
        delta = (grad_rows * context.reshape(grad_rows.shape)).sum(dim=-1)
        grad_q = torch.zeros_like(rows_q, dtype=dtype)
        grad_k, grad_v = torch.zeros_like(rows_k, dtype=dtype), torch.zeros_like(rows_v, dtype=dtype)
        for start, stop in ctx.chunks:
            row, key = expand_pairs(cells, length, start, stop, ctx.limit, key_slots, keys.shape[1], keys.shape[2])
            row = row + start
            q_pairs, k_pairs, grad_pairs = rows_q[row].to(dtype), rows_k[key].to(dtype), grad_rows[row]
            probs = ((q_pairs * k_pairs).sum(dim=-1) * ctx.scale - log_sum[row]).exp()
            grad_v.index_add_(0, key, probs[:, None] * grad_pairs)
            grad_scores = probs * ((grad_pairs * rows_v[key].to(dtype)).sum(dim=-1) - delta[row]) * ctx.scale
            grad_q.index_add_(0, row, grad_scores[:, None] * k_pairs)
            grad_k.index_add_(0, key, grad_scores[:, None] * q_pairs)
        grads = (grad_q.view(q.shape).to(q.dtype), grad_k.view(keys.shape).to(keys.dtype))
        return *grads, grad_v.view(values.shape).to(values.dtype), None, None, None, None, None, None


def keys_per_row(cells: torch.Tensor, length: torch.Tensor, limit: int | None) -> torch.Tensor:
    """Number of kept keys of each (sample, head, row): (B, H, T, M) -> (B, H, T) int64."""
    counts = []
    for start in range(0, cells.shape[2], COUNT_ROWS):
        rows = slice(start, start + COUNT_ROWS)
        handed = keys_per_cell(length[:, rows], cells.shape[-1], limit)  # (B, R, M)
        counts.append((cells[:, :, rows] * handed[:, None].to(torch.int32)).sum(dim=-1))
    return torch.cat(counts, dim=2)


def row_chunks(
    cells: torch.Tensor, length: torch.Tensor, limit: int | None, pairs_per_chunk: int
) -> list[tuple[int, int]]:
    """Cut the flattened rows (sample, head, row) into ranges of about `pairs_per_chunk` kept keys, one row at least."""
    ends = keys_per_row(cells, length, limit).flatten().cumsum(0).cpu()
    chunks, start, done = [], 0, 0
    while start < len(ends):
        stop = int(torch.searchsorted(ends, done + pairs_per_chunk, right=True))
        stop = max(stop, start + 1)
        chunks.append((start, stop))
        start, done = stop, int(ends[stop - 1])
    return chunks


def expand_pairs(
    cells: torch.Tensor,
    length: torch.Tensor,
    start: int,
    stop: int,
    limit: int | None,
    key_slots: torch.Tensor | None,
    key_heads: int,
    num_slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The (row, key) pairs of the flattened rows `start .. stop`: row relative to `start`, key in the flattened (B, G, S)."""
    # First phase: the (row, cell) pairs that are kept, and how many keys each of them hands out.
    _, heads, time, num_cells = cells.shape
    row, cell = cells.view(-1, num_cells)[start:stop].nonzero(as_tuple=True)
    sample = (row + start) // (heads * time)
    head = (row + start) // time % heads
    visible = length[sample, (row + start) % time]
    end = cell_start(cell + 1, visible, num_cells)
    width = end - cell_start(cell, visible, num_cells)
    count = width if limit is None else width.clamp_max(limit)
    # Second phase: one entry a key. Its number in the cell gives its rank (`within_cell_limit`), the rank its slot.
    pair = torch.repeat_interleave(torch.arange(len(row), device=cells.device), count)  # kept key -> its (row, cell)
    index = torch.arange(len(pair), device=cells.device) - (count.cumsum(0) - count)[pair]  # i-th key of that cell
    rank = end[pair] - 1 - index * width[pair] // count[pair].clamp_min(1)
    slot = rank if key_slots is None else key_slots[sample[pair], rank]
    key_head = sample[pair] * key_heads + head[pair] // (heads // key_heads)
    return row[pair], key_head * num_slots + slot


def grown_average(weights: torch.Tensor, values: torch.Tensor, length: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Average of the values under weights per cell: (B, H, M), (B, H, T, D), (B,) -> (B, H, 1, D).

    Each of the first `length` keys takes the weight of its cell; `normalize` divides by their sum (the published model does not).
    """
    dtype = accumulation_dtype(values.dtype)
    rank = torch.arange(values.shape[2], device=values.device)
    cell = key_to_cell(rank, length[:, None], weights.shape[-1])  # (B, T)
    per_key = weights.to(dtype).gather(-1, cell[:, None].expand(-1, weights.shape[1], -1))
    per_key = per_key.masked_fill((rank >= length[:, None])[:, None], 0.0)
    if normalize:
        per_key = F.normalize(per_key, p=1.0, dim=-1, eps=torch.finfo(dtype).tiny)
    return per_key[:, :, None] @ values.to(dtype)
