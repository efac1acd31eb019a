"""Causal DenseAttention, global or in a sliding window, as one Triton operator that is its own gradient.

    out_i = sum_j [i - w < j <= i] (a_i . b_j) c_j          w: the window, or no bound (global)

is linear in each of a, b, c, and so its gradients are sums of the same kind, for b and c over the later tokens (`reverse`):

    da_i = sum_j (g_i . c_j) b_j        db_j = sum_i (c_j . g_i) a_i        dc_j = sum_i (b_j . a_i) g_i

A program does C rows of one head: the scores of a tile stay in registers. A global layer first forms the memory B^T C of each
chunk and sums these along the row. DANet specification, sections 1.3 and 1.4; SEA's kernel attention is the same sum of features.

Bytes a token and head of D features in b bytes: 4 D b, and for a global layer 6 D b and 4 x 4 D^2 / C of memories;
O(T (w + C) D) or O(T (C + D) D) operations.
"""

import torch

from .dispatch import on_its_device
from .running_sum import running_sum
from .triton_shim import tl, triton

CHUNK = 64


@triton.jit
def _rows(x_ptr, t, d, T, stride_t, D: tl.constexpr):
    """Rows `t` (C, DP) of one head, 0 outside."""
    inside = (t[:, None] >= 0) & (t[:, None] < T) & (d[None, :] < D)
    return tl.load(x_ptr + t[:, None].to(tl.int64) * stride_t + d[None, :], mask=inside, other=0.0)


@triton.jit
def _chunk_of_program(N):
    """Chunk, head and row of a program. Rows (documents, windows: any number) go along the grid's one axis without a low limit.

    All but the chunk are 64 bits wide: heads that lie one after another in memory are T D numbers apart.
    """
    place = tl.program_id(0)
    return place % N, tl.program_id(1).to(tl.int64), (place // N).to(tl.int64)


@triton.jit
def _memory_kernel(
    b_ptr, c_ptr, memory_ptr, T, H, N, sb_b, sb_t, sb_h, sc_b, sc_t, sc_h,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, C: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """B^T C of each chunk, (B, N, H, D, E) float32."""
    n, h, row = _chunk_of_program(N)
    t, d, e = n * C + tl.arange(0, C), tl.arange(0, DP), tl.arange(0, EP)
    b = _rows(b_ptr + row * sb_b + h * sb_h, t, d, T, sb_t, D)
    c = _rows(c_ptr + row * sc_b + h * sc_h, t, e, T, sc_t, E)
    if SINGLE:
        b, c = b.to(tl.float32), c.to(tl.float32)
    memory = tl.dot(tl.trans(b), c, input_precision="tf32x3")
    place = ((row * N + n) * H + h) * D * E + d[:, None] * E + e[None, :]
    tl.store(memory_ptr + place, memory, mask=(d[:, None] < D) & (e[None, :] < E))


@triton.jit
def _band_kernel(
    a_ptr, b_ptr, c_ptr, memory_ptr, out_ptr, T, H, N, a_strides, b_strides, c_strides,
    W: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    C: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """One chunk of rows against the chunks that its window meets, or against itself and the memory of all others."""
    sa_b, sa_t, sa_h = a_strides
    sb_b, sb_t, sb_h = b_strides
    sc_b, sc_t, sc_h = c_strides
    n, h, row = _chunk_of_program(N)
    i, d, e = n * C + tl.arange(0, C), tl.arange(0, DP), tl.arange(0, EP)
    a = _rows(a_ptr + row * sa_b + h * sa_h, i, d, T, sa_t, D)
    b_ptr += row * sb_b + h * sb_h
    c_ptr += row * sc_b + h * sc_h
    total = tl.zeros((C, EP), tl.float32)
    for tile in range(TILES):
        j = (n + tile if REVERSE else n - tile) * C + tl.arange(0, C)
        gap = j[None, :] - i[:, None] if REVERSE else i[:, None] - j[None, :]
        visible = gap >= 0
        if W > 0:
            visible = visible & (gap < W)
        b = _rows(b_ptr, j, d, T, sb_t, D).to(a.dtype)
        scores = tl.dot(a, tl.trans(b), input_precision="tf32x3")
        scores = tl.where(visible, scores, 0.0).to(a.dtype)
        c = _rows(c_ptr, j, e, T, sc_t, E).to(a.dtype)
        total = tl.dot(scores, c, total, input_precision="tf32x3")
    if W == 0:
        place = ((row * N + n) * H + h) * D * E + d[:, None] * E + e[None, :]
        memory = tl.load(memory_ptr + place, mask=(d[:, None] < D) & (e[None, :] < E), other=0.0)
        total = tl.dot(a, memory.to(a.dtype), total, input_precision="tf32x3")
    place = ((row * T + i[:, None]) * H + h) * E + e[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=(i[:, None] < T) & (e[None, :] < E))


@torch.library.custom_op("hf_linear_attn::causal_bilinear", mutates_args=())
@on_its_device
def _causal_bilinear(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, memory: torch.Tensor | None, window: int | None, reverse: bool
) -> list[torch.Tensor]:
    batch, length, heads, dim = a.shape
    width = c.shape[-1]
    sizes = {
        "D": dim,
        "DP": max(16, triton.next_power_of_2(dim)),
        "E": width,
        "EP": max(16, triton.next_power_of_2(width)),
    }
    is_wide = max(sizes["DP"], sizes["EP"]) > 64
    chunk = 32 if is_wide and a.dtype == torch.float32 else CHUNK  # what shared memory holds
    sizes |= {"C": chunk, "num_warps": 8 if is_wide else 4} | ({"num_stages": 1} if a.dtype == torch.float32 else {})
    number = triton.cdiv(length, chunk)
    grid = (number * batch, heads)
    out = torch.empty(batch, length, heads, width, dtype=a.dtype, device=a.device)
    final = []
    before = a
    if window is None:
        written = torch.empty(batch, number, heads, dim, width, device=a.device)
        _memory_kernel[grid](
            b, c, written, length, heads, number, *b.stride()[:3], *c.stride()[:3], SINGLE=a.dtype == torch.float32, **sizes
        )  # fmt: skip
        sums = running_sum(written.flip(1) if reverse else written, 1)
        before = torch.nn.functional.pad(sums[:, :-1], [0] * 6 + [1, 0])
        final = [sums[:, -1].contiguous()]
        if memory is not None:
            before, final = before + memory[:, None], [final[0] + memory]
        before = (before.flip(1) if reverse else before).contiguous()
    tiles = 1 if window is None else 1 + triton.cdiv(window - 1, chunk)
    _band_kernel[grid](
        a, b, c, before, out, length, heads, number, a.stride()[:3], b.stride()[:3], c.stride()[:3],
        W=window or 0, TILES=min(tiles, number), REVERSE=reverse, **sizes,
    )  # fmt: skip
    return [out, *final]


@_causal_bilinear.register_fake
def _(a, b, c, memory, window, reverse):
    batch, length, heads, dim = a.shape
    out = a.new_empty(batch, length, heads, c.shape[-1])
    return [out] if window is not None else [out, a.new_empty(batch, heads, dim, c.shape[-1], dtype=torch.float32)]


def _save(ctx, inputs, output):
    *tensors, ctx.window, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grads):
    a, b, c, memory = ctx.saved_tensors
    grad, window, reverse = grads[0], ctx.window, ctx.reverse
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    da = db = dc = None
    if ctx.needs_input_grad[0]:
        memory = None if memory is None else memory.mT.contiguous()
        da = _causal_bilinear(grad, c, b, memory, window, reverse)[0].to(a.dtype)
    if ctx.needs_input_grad[1]:
        db = _causal_bilinear(c.to(grad.dtype), grad, a, None, window, not reverse)[0].to(b.dtype)
    if ctx.needs_input_grad[2]:
        dc = _causal_bilinear(b.to(grad.dtype), a, grad, None, window, not reverse)[0].to(c.dtype)
    return da, db, dc, None, None, None


_causal_bilinear.register_autograd(_differentiate, setup_context=_save)


def causal_bilinear(query, key, value, window=None, memory=None):
    """The sum over the last `window` tokens, itself included, or all so far: (B, T, H, D) twice and (B, T, H, E) -> (B, T, H, E).

    D, E <= 128. The result has the queries' dtype, in which products run; values may have another. `memory` (B, H, D, E) float32
    is what came before the row (global, no gradient). Returns the output and, if global, the memory after the row (no gradient),
    else None.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out, *final = _causal_bilinear(query, key, value, memory, window, False)
    return out, final[0] if final else None
