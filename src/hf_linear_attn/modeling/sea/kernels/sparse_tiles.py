"""SEA's softmax attention on the keys of the chosen cells, tile by tile: for rows of up to a few thousand keys.

With so few keys most tiles of 64 queries x 64 keys hold a kept pair, and the matrix units form a whole tile faster than single
keys are gathered. The choice of a row is one bit a cell, so whether a pair is kept is arithmetic: the cell of key j in a row
that sees L keys is ((2 j + 1) M - 1) div (2 L). Backward takes two kernels and no atomic sums: one program owns the gradients of
a tile of keys, another those of a tile of queries.

    O(T S D) operations of the matrix units, O(T) memory. Specification, sections 1.7 and 1.8.
"""

import torch

from ...kernels.triton_shim import tl, triton

TILE = 64
BITS = 32  # cells in a word


@triton.jit
def _tile_of_program(count, C: tl.constexpr):
    """Tile, head and row of a program that does C of `count` places of one head.

    Rows (documents: any number) go along the grid's one axis without a low limit. Head and row are 64 bits wide.
    """
    tiles = tl.cdiv(count, C)
    place = tl.program_id(0)
    return place % tiles, tl.program_id(1).to(tl.int64), (place // tiles).to(tl.int64)


@triton.jit
def _words_kernel(cells_ptr, words_ptr, rows, M, WORDS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """The choice of each row as bits, (rows, M) bytes -> (rows, WORDS) int32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, BITS)
    for word in range(WORDS):
        cell = word * BITS + bit
        inside = (row[:, None] < rows) & (cell[None, :] < M)
        chosen = tl.load(cells_ptr + row[:, None] * M + cell[None, :], mask=inside, other=0).to(tl.int32)
        tl.store(words_ptr + row * WORDS + word, tl.sum(chosen << bit[None, :], axis=1), mask=row < rows)


@triton.jit
def _rows(x_ptr, i, d, count, stride, D: tl.constexpr):
    """Rows `i` (C, DP) of one head, 0 outside."""
    inside = (i[:, None] < count) & (d[None, :] < D)
    return tl.load(x_ptr + i[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def _kept(words_ptr, t, j, length, time, M, WORDS: tl.constexpr, BITS: tl.constexpr):
    """Which pairs of queries t (C,) and keys j (C,) are kept."""
    cell = ((2 * j[None, :] + 1) * M - 1) // (2 * tl.maximum(length, 1)[:, None])
    chosen = tl.zeros((t.shape[0], j.shape[0]), tl.int32)
    for word in tl.static_range(WORDS):
        bits = tl.load(words_ptr + t * WORDS + word, mask=t < time, other=0)
        chosen += tl.where(cell // BITS == word, (bits[:, None] >> (cell % BITS)) & 1, 0)
    return (chosen != 0) & (j[None, :] < length[:, None])


@triton.jit
def _product(weights, x, EXACT: tl.constexpr, total):
    """Total + weights @ x with float32 weights: two terms where x is in half precision and one would round them."""
    if EXACT:
        return tl.dot(weights, x, total, input_precision="tf32x3")
    high = weights.to(x.dtype)
    low = (weights - high.to(tl.float32)).to(x.dtype)
    return tl.dot(low, x, tl.dot(high, x, total))


# What belongs together travels together into the kernels:
#   inputs   pointers to queries, keys, values, the words of the choice, visible keys of each row
#   sizes    heads, query heads a key head, T, slots, M
#   strides  of keys (row, head, slot) and of values
#   WIDTHS   D, E, and both as powers of two
@triton.jit
def _forward_kernel(
    inputs, out_ptr, log_sum_ptr, scale, sizes, strides,
    WIDTHS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Out = softmax(scale q K^T) V over the kept keys, 0 for a row without keys, and the logarithm of its sum."""
    D: tl.constexpr = WIDTHS[0]
    E: tl.constexpr = WIDTHS[1]
    DP: tl.constexpr = WIDTHS[2]
    EP: tl.constexpr = WIDTHS[3]
    q_ptr, k_ptr, v_ptr, words_ptr, length_ptr = inputs
    heads, groups, time, num_slots, M = sizes
    sk_b, sk_h, sk_s, sv_b, sv_h, sv_s = strides
    tile, h, b = _tile_of_program(time, C)
    t, d, e = tile * C + tl.arange(0, C), tl.arange(0, DP), tl.arange(0, EP)
    length = tl.load(length_ptr + b * time + t, mask=t < time, other=0).to(tl.int32)
    first = (b * heads + h) * time
    q = _rows(q_ptr + first * D, t, d, time, D, D)
    k_ptr += b * sk_b + h // groups * sk_h
    v_ptr += b * sv_b + h // groups * sv_h
    top = tl.full((C,), -float("inf"), tl.float32)
    norm = tl.zeros((C,), tl.float32)
    total = tl.zeros((C, EP), tl.float32)
    for start in range(0, tl.max(length), C):
        j = start + tl.arange(0, C)
        kept = _kept(words_ptr + first * WORDS, t, j, length, time, M, WORDS, BITS)
        k = _rows(k_ptr, j, d, num_slots, sk_s, D)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        scores = tl.where(kept, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        decay = tl.exp(top - safe)
        weights = tl.exp(scores - safe[:, None])
        norm = norm * decay + tl.sum(weights, axis=1)
        total = _product(weights, _rows(v_ptr, j, e, num_slots, sv_s, E), EXACT, total * decay[:, None])
        top = new_top
    any_key = norm > 0
    norm = tl.where(any_key, norm, 1.0)
    inside = (t[:, None] < time) & (e[None, :] < E)
    tl.store(out_ptr + (first + t[:, None]) * E + e[None, :], total / norm[:, None], mask=inside)
    tl.store(log_sum_ptr + first + t, tl.where(any_key, top + tl.log(norm), 0.0), mask=t < time)


@triton.jit
def _pair_gradients(q, k, v, grad, delta, log_sum, kept, scale):
    """Probabilities of a tile of pairs and the gradients of their scores, (C, C) float32 each."""
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    probs = tl.where(kept, tl.exp(scores - log_sum[:, None]), 0.0)
    dprobs = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
    return probs, probs * (dprobs - delta[:, None]) * scale


@triton.jit
def _query_gradients_kernel(
    inputs, out_ptr, log_sum_ptr, grad_ptr, delta_ptr, dq_ptr, scale, sizes, strides,
    WIDTHS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and <out, its gradient> of each row for the other kernel."""
    D: tl.constexpr = WIDTHS[0]
    E: tl.constexpr = WIDTHS[1]
    DP: tl.constexpr = WIDTHS[2]
    EP: tl.constexpr = WIDTHS[3]
    q_ptr, k_ptr, v_ptr, words_ptr, length_ptr = inputs
    heads, groups, time, num_slots, M = sizes
    sk_b, sk_h, sk_s, sv_b, sv_h, sv_s = strides
    tile, h, b = _tile_of_program(time, C)
    t, d, e = tile * C + tl.arange(0, C), tl.arange(0, DP), tl.arange(0, EP)
    length = tl.load(length_ptr + b * time + t, mask=t < time, other=0).to(tl.int32)
    first = (b * heads + h) * time
    q = _rows(q_ptr + first * D, t, d, time, D, D)
    grad = _rows(grad_ptr + first * E, t, e, time, E, E)
    # sum_j p_j (dL/dp_j), the term that the softmax takes out, is the product of the output with its gradient
    delta = tl.sum(grad.to(tl.float32) * _rows(out_ptr + first * E, t, e, time, E, E), axis=1)
    tl.store(delta_ptr + first + t, delta, mask=t < time)
    log_sum = tl.load(log_sum_ptr + first + t, mask=t < time, other=0.0)
    k_ptr += b * sk_b + h // groups * sk_h
    v_ptr += b * sv_b + h // groups * sv_h
    total = tl.zeros((C, DP), tl.float32)
    for start in range(0, tl.max(length), C):
        j = start + tl.arange(0, C)
        kept = _kept(words_ptr + first * WORDS, t, j, length, time, M, WORDS, BITS)
        k = _rows(k_ptr, j, d, num_slots, sk_s, D)
        v = _rows(v_ptr, j, e, num_slots, sv_s, E)
        _, dscores = _pair_gradients(q, k, v, grad, delta, log_sum, kept, scale)
        total = _product(dscores, k, EXACT, total)
    place = (first + t[:, None]) * D + d[None, :]
    tl.store(dq_ptr + place, total.to(dq_ptr.dtype.element_ty), mask=(t[:, None] < time) & (d[None, :] < D))


@triton.jit
def _key_gradients_kernel(
    inputs, log_sum_ptr, grad_ptr, delta_ptr, grads, scale, sizes, strides,
    WIDTHS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values from all queries of the heads that share them."""
    D: tl.constexpr = WIDTHS[0]
    E: tl.constexpr = WIDTHS[1]
    DP: tl.constexpr = WIDTHS[2]
    EP: tl.constexpr = WIDTHS[3]
    q_ptr, k_ptr, v_ptr, words_ptr, length_ptr = inputs
    heads, groups, time, num_slots, M = sizes
    sk_b, sk_h, sk_s, sv_b, sv_h, sv_s = strides
    dk_ptr, dv_ptr = grads
    tile, key_head, b = _tile_of_program(num_slots, C)
    j, d, e = tile * C + tl.arange(0, C), tl.arange(0, DP), tl.arange(0, EP)
    k = _rows(k_ptr + b * sk_b + key_head * sk_h, j, d, num_slots, sk_s, D)
    v = _rows(v_ptr + b * sv_b + key_head * sv_h, j, e, num_slots, sv_s, E)
    dk = tl.zeros((C, DP), tl.float32)
    dv = tl.zeros((C, EP), tl.float32)
    for step in range(0, groups * tl.cdiv(time, C)):
        first = (b * heads + key_head * groups + step // tl.cdiv(time, C)) * time
        t = step % tl.cdiv(time, C) * C + tl.arange(0, C)
        length = tl.load(length_ptr + b * time + t, mask=t < time, other=0).to(tl.int32)
        if tl.max(length) > tile * C:
            kept = _kept(words_ptr + first * WORDS, t, j, length, time, M, WORDS, BITS)
            q = _rows(q_ptr + first * D, t, d, time, D, D)
            grad = _rows(grad_ptr + first * E, t, e, time, E, E)
            delta = tl.load(delta_ptr + first + t, mask=t < time, other=0.0)
            log_sum = tl.load(log_sum_ptr + first + t, mask=t < time, other=0.0)
            probs, dscores = _pair_gradients(q, k, v, grad, delta, log_sum, kept, scale)
            dk = _product(tl.trans(dscores), q, EXACT, dk)
            dv = _product(tl.trans(probs), grad, EXACT, dv)
    row = (b * (heads // groups) + key_head) * num_slots + j[:, None]
    inside = j[:, None] < num_slots
    tl.store(dk_ptr + row * D + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=inside & (d[None, :] < D))
    tl.store(dv_ptr + row * E + e[None, :], dv.to(dv_ptr.dtype.element_ty), mask=inside & (e[None, :] < E))


def _arguments(q, keys, values, cells, length):
    """Grid over queries, pointers (choice as bits), sizes, strides and flags of a call."""
    batch, heads, time, dim = q.shape
    value_dim, num_cells = values.shape[-1], cells.shape[-1]
    count = triton.cdiv(num_cells, BITS)
    rows = batch * heads * time
    words = torch.empty(rows, count, dtype=torch.int32, device=q.device)
    _words_kernel[(triton.cdiv(rows, 64),)](
        cells.view(torch.uint8), words, rows, num_cells, WORDS=count, BITS=BITS, ROWS=64
    )
    sizes = (heads, heads // keys.shape[1], time, keys.shape[2], num_cells)
    strides = (*keys.stride()[:3], *values.stride()[:3])
    widths = (dim, value_dim, *(max(16, triton.next_power_of_2(n)) for n in (dim, value_dim)))
    exact, is_wide = q.dtype == torch.float32, max(widths) > 64
    tile = 32 if exact and is_wide else TILE  # what shared memory holds
    flags = {"WIDTHS": widths, "WORDS": count, "BITS": BITS, "C": tile, "EXACT": exact}
    flags |= {"num_warps": 8 if is_wide else 4} | ({"num_stages": 1} if exact else {})
    return (triton.cdiv(time, tile) * batch, heads), (q, keys, values, words, length), sizes, strides, flags


def tiled_attention(q, keys, values, cells, length, scale):
    """Context (B, H, T, E) float32 and the logarithm of each row's sum (B, H, T)."""
    grid, pointers, sizes, strides, flags = _arguments(q, keys, values, cells, length)
    out = torch.empty(*q.shape[:3], values.shape[-1], dtype=torch.float32, device=q.device)
    log_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _forward_kernel[grid](pointers, out, log_sum, scale, sizes, strides, **flags)
    return out, log_sum


def tiled_attention_backward(q, keys, values, cells, length, scale, out, log_sum, grad):
    """Gradients of queries, keys and values."""
    grid, pointers, sizes, strides, flags = _arguments(q, keys, values, cells, length)
    grad = grad.to(q.dtype).contiguous()  # exact: the caller rounds the output to this dtype
    delta, dq = torch.empty_like(log_sum), torch.empty_like(q)
    _query_gradients_kernel[grid](pointers, out, log_sum, grad, delta, dq, scale, sizes, strides, **flags)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (keys, values))
    grid = (triton.cdiv(keys.shape[2], flags["C"]) * q.shape[0], keys.shape[1])
    _key_gradients_kernel[grid](pointers, log_sum, grad, delta, (dk, dv), scale, sizes, strides, **flags)
    return dq, dk, dv
