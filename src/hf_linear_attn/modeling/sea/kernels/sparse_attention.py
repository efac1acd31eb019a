"""Triton kernels of SEA: the choice of cells without a sort, and softmax attention on the keys of the chosen cells.

Attention: one program does one row (sample, head, query). It counts the keys that its cells hand out, and walks through them
in blocks: the j-th key is found from the running count over the M cells by arithmetic, so no list of pairs, no copy of keys or
values and no T x T tensor exists. Backward walks the same way; gradients of keys and values are added atomically in float32.

    O(kept keys x (D + M)) time; memory: the output in float32 and a logarithm a row. Specification, sections 1.6 to 1.8.
"""

import torch

from ...kernels.dispatch import on_its_device
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.triton_shim import tl, triton
from ..sparse_attention import chunked_formula
from .sparse_tiles import tiled_attention, tiled_attention_backward

KEYS = 32  # keys of a row that are read together
TILED_KEYS = 4096  # up to so many keys a row, whole tiles of pairs are faster than kept keys one by one


@triton.jit
def _select_kernel(
    probs_ptr, budget_ptr, keep_ptr, out_ptr, heads, time, cells, SIZE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """True at the `budget` largest of the heads x cells entries of one query; of equal ones those of smaller index."""
    query = tl.program_id(0).to(tl.int64)
    t, b = query % time, query // time
    index = tl.arange(0, SIZE)
    inside = index < heads * cells
    place = ((b * heads + index // cells) * time + t) * cells + index % cells
    values = tl.load(probs_ptr + place, mask=inside, other=0.0)
    # Floats that are not negative order like their bits; places outside come last.
    bits = tl.where(inside, values.to(tl.int32, bitcast=True), -1)
    budget = tl.minimum(tl.load(budget_ptr + b * time + t), heads * cells)
    threshold = 0
    for i in range(31):  # the largest number that `budget` entries reach, bit by bit
        candidate = threshold | (1 << (30 - i))
        reached = tl.sum((bits >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(reached >= budget, candidate, threshold)
    above = bits > threshold
    tied = bits == threshold
    room = budget - tl.sum(above.to(tl.int32), axis=0)
    selected = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))
    if MASKED:
        selected = selected & (tl.load(keep_ptr + b * time + t) != 0)
    tl.store(out_ptr + place, selected.to(tl.uint8), mask=inside)


@torch.library.custom_op("hf_linear_attn::select_largest", mutates_args=())
@on_its_device
def _select_largest(probs: torch.Tensor, budget: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    batch, heads, time, cells = probs.shape
    out = torch.empty(probs.shape, dtype=torch.bool, device=probs.device)
    size = triton.next_power_of_2(heads * cells)
    _select_kernel[(time * batch,)](
        probs, budget, budget if keep is None else keep, out.view(torch.uint8), heads, time, cells,
        SIZE=size, MASKED=keep is not None, num_warps=max(1, min(8, size // 512)),
    )  # fmt: skip
    return out


@_select_largest.register_fake
def _(probs, budget, keep):
    return torch.empty(probs.shape, dtype=torch.bool, device=probs.device)


def select_largest(probs: torch.Tensor, budget: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The `budget` (B, T) largest cells of each query over all heads: probs (B, H, T, M) float32, >= 0 -> bool.

    `keep` (B, T) is False at rows that select nothing. O(H M) a query: 31 counts instead of a sort.
    """
    keep = None if keep is None else keep.to(torch.uint8).contiguous()
    return _select_largest(probs.contiguous(), budget.clamp(min=1).to(torch.int32).contiguous(), keep)


@triton.jit
def _cell_counts(cells_ptr, row, length, M, LIMIT: tl.constexpr, MP: tl.constexpr):
    """Keys that each cell of this row hands out, (MP,): 0 unless it is selected."""
    cell = tl.arange(0, MP)
    chosen = tl.load(cells_ptr + row * M + cell, mask=cell < M, other=0) != 0
    width = (2 * (cell + 1) * length + M) // (2 * M) - (2 * cell * length + M) // (2 * M)
    if LIMIT > 0:
        width = tl.minimum(width, LIMIT)
    return tl.where(chosen, width, 0)


@triton.jit
def _key_places(j, ends, length, slots_ptr, sample, num_ranks, valid, M, LIMIT: tl.constexpr, SLOTS: tl.constexpr):
    """Slot of the j-th kept key of a row, from the running count `ends` (MP,) over its cells."""
    passed = ends[None, :] <= j[:, None]  # cells that lie before the one of key j
    cell = tl.sum(passed.to(tl.int32), axis=1)
    index = j - tl.max(tl.where(passed, ends[None, :], 0), axis=1)  # j is the index-th key of that cell
    end = (2 * (cell + 1) * length + M) // (2 * M)
    if LIMIT > 0:
        width = end - (2 * cell * length + M) // (2 * M)
        index = index * width // tl.maximum(tl.minimum(width, LIMIT), 1)
    rank = end - 1 - index
    if SLOTS:
        rank = tl.load(slots_ptr + sample * num_ranks + rank, mask=valid, other=0).to(tl.int32)
    return rank


# What belongs together travels together, also into the kernels:
#   inputs   pointers to queries, keys, values, cells, visible keys of each row, slots of the ranks
#   sizes    heads, query heads a key head, T, slots, ranks (of a sample with slots), M, D, E
#   strides  of keys (sample, head, slot) and of values
#   WIDTHS   M, D and E as powers of two
@triton.jit
def _read_row(inputs, row, scale, sizes, LIMIT: tl.constexpr, WIDTHS: tl.constexpr):
    """Head, sample, visible keys, running count of kept keys over the cells (MP,), their number, scaled query (DP,)."""
    MP: tl.constexpr = WIDTHS[0]
    DP: tl.constexpr = WIDTHS[1]
    q_ptr, _, _, cells_ptr, length_ptr, _ = inputs
    heads, _, time, _, _, M, D, _ = sizes
    t, h, b = row % time, row // time % heads, row // time // heads
    length = tl.load(length_ptr + b * time + t).to(tl.int32)
    counts = _cell_counts(cells_ptr, row, length, M, LIMIT, MP)
    d = tl.arange(0, DP)
    q = tl.load(q_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    return h, b, length, tl.cumsum(counts, axis=0), tl.sum(counts, axis=0), q


@triton.jit
def _read_keys(
    first, ends, total, length, heads_of, slots_ptr, b, sizes, slot_strides,
    LIMIT: tl.constexpr, SLOTS: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The kept keys from number `first` on: slots (KEYS, 1), which there are (KEYS,), keys and values float32, their masks.

    `heads_of`: pointers to the keys and the values of a head; `slot_strides`: their strides from slot to slot.
    """
    DP: tl.constexpr = WIDTHS[1]
    EP: tl.constexpr = WIDTHS[2]
    k_ptr, v_ptr = heads_of
    _, _, _, _, num_ranks, M, D, E = sizes
    d, e = tl.arange(0, DP)[None, :], tl.arange(0, EP)[None, :]
    j = first + tl.arange(0, KEYS)
    valid = j < total
    slot = _key_places(j, ends, length, slots_ptr, b, num_ranks, valid, M, LIMIT, SLOTS).to(tl.int64)[:, None]
    k_inside, v_inside = valid[:, None] & (d < D), valid[:, None] & (e < E)
    k = tl.load(k_ptr + slot * slot_strides[0] + d, mask=k_inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + slot * slot_strides[1] + e, mask=v_inside, other=0.0).to(tl.float32)
    return slot, valid, k, v, k_inside, v_inside


@triton.jit
def _head_of(inputs, strides, b, h, groups):
    """Pointers to the keys and values that query head h of sample b reads."""
    sk_b, sk_h, _, sv_b, sv_h, _ = strides
    return inputs[1] + b * sk_b + h // groups * sk_h, inputs[2] + b * sv_b + h // groups * sv_h


@triton.jit
def _forward_kernel(
    inputs, out_ptr, log_sum_ptr, scale, sizes, strides,
    LIMIT: tl.constexpr, SLOTS: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Out = softmax(scale q K^T) V over the kept keys; 0 for a row without keys."""
    row = tl.program_id(0).to(tl.int64)
    EP: tl.constexpr = WIDTHS[2]
    E = sizes[7]
    h, b, length, ends, total, q = _read_row(inputs, row, scale, sizes, LIMIT, WIDTHS)
    e = tl.arange(0, EP)
    heads_of = _head_of(inputs, strides, b, h, sizes[1])
    slot_strides = (strides[2], strides[5])
    top, norm = -float("inf"), 0.0
    acc = tl.zeros((EP,), tl.float32)
    first = 0
    while first < total:
        _, valid, k, v, _, _ = _read_keys(
            first, ends, total, length, heads_of, inputs[5], b, sizes, slot_strides, LIMIT, SLOTS, WIDTHS, KEYS
        )
        scores = tl.where(valid, tl.sum(k * q[None, :], axis=1), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        decay = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top)
        norm = norm * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
        first += KEYS
    any_key = total > 0
    tl.store(out_ptr + row * E + e, acc / tl.where(any_key, norm, 1.0), mask=e < E)
    tl.store(log_sum_ptr + row, tl.where(any_key, top + tl.log(tl.where(any_key, norm, 1.0)), 0.0))


@triton.jit
def _backward_kernel(
    inputs, out_ptr, log_sum_ptr, grad_ptr, grads, scale, sizes, strides,
    LIMIT: tl.constexpr, SLOTS: tl.constexpr, WIDTHS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of one query, and what it adds to those of its keys and values (contiguous, float32)."""
    row = tl.program_id(0).to(tl.int64)
    DP: tl.constexpr = WIDTHS[1]
    EP: tl.constexpr = WIDTHS[2]
    heads, groups, _, num_slots, _, _, D, E = sizes
    h, b, length, ends, total, q = _read_row(inputs, row, scale, sizes, LIMIT, WIDTHS)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    grad = tl.load(grad_ptr + row * E + e, mask=e < E, other=0.0).to(tl.float32)
    # sum_j p_j (dL/dp_j), the term that the softmax takes out, is the product of the output with its gradient
    delta = tl.sum(grad * tl.load(out_ptr + row * E + e, mask=e < E, other=0.0), axis=0)
    log_sum = tl.load(log_sum_ptr + row)
    key_head = b * (heads // groups) + h // groups
    heads_of = _head_of(inputs, strides, b, h, groups)
    slot_strides = (strides[2], strides[5])
    dq_ptr, dk_ptr, dv_ptr = grads
    dk_ptr += key_head * num_slots * D
    dv_ptr += key_head * num_slots * E
    dq = tl.zeros((DP,), tl.float32)
    first = 0
    while first < total:
        slot, valid, k, v, k_inside, v_inside = _read_keys(
            first, ends, total, length, heads_of, inputs[5], b, sizes, slot_strides, LIMIT, SLOTS, WIDTHS, KEYS
        )
        probs = tl.where(valid, tl.exp(tl.sum(k * q[None, :], axis=1) - log_sum), 0.0)
        dscore = probs * (tl.sum(v * grad[None, :], axis=1) - delta)
        dq += tl.sum(dscore[:, None] * k, axis=0)
        tl.atomic_add(dk_ptr + slot * D + d[None, :], dscore[:, None] * q[None, :], mask=k_inside, sem="relaxed")
        tl.atomic_add(dv_ptr + slot * E + e[None, :], probs[:, None] * grad[None, :], mask=v_inside, sem="relaxed")
        first += KEYS
    tl.store(dq_ptr + row * D + d, (dq * scale).to(dq_ptr.dtype.element_ty), mask=d < D)


def _runs_in_tiles(keys, cells, limit, key_slots) -> bool:
    """Whether rows are short enough for tiles, and none of their cells so wide that it hands out only some of its keys."""
    if key_slots is not None or keys.shape[2] > TILED_KEYS or keys.shape[-1] > 128:
        return False
    return limit is None or keys.shape[2] <= limit * cells.shape[-1]


def _arguments(q, keys, values, cells, length, key_slots, limit):
    """Grid, pointers, sizes, strides and flags of a call."""
    batch, heads, time, dim = q.shape
    value_dim, num_cells = values.shape[-1], cells.shape[-1]
    pointers = (q, keys, values, cells.view(torch.uint8), length, length if key_slots is None else key_slots)
    sizes = (
        heads, heads // keys.shape[1], time, keys.shape[2], 0 if key_slots is None else key_slots.shape[1], num_cells, dim,
        value_dim,
    )  # fmt: skip
    strides = (*keys.stride()[:3], *values.stride()[:3])
    widths = tuple(max(16, triton.next_power_of_2(n)) for n in (num_cells, dim, value_dim))
    flags = {"LIMIT": limit or 0, "SLOTS": key_slots is not None, "WIDTHS": widths, "KEYS": KEYS}
    flags["num_warps"] = 1 if max(widths) <= 64 else 2
    return (batch * heads * time,), pointers, sizes, strides, flags


@torch.library.custom_op("hf_linear_attn::sparse_attention", mutates_args=())
@on_its_device
def _sparse_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cells: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    limit: int | None,
    key_slots: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if _runs_in_tiles(keys, cells, limit, key_slots):
        return tiled_attention(q, keys, values, cells, length, scale)
    grid, pointers, sizes, strides, flags = _arguments(q, keys, values, cells, length, key_slots, limit)
    out = torch.empty(*q.shape[:3], values.shape[-1], dtype=torch.float32, device=q.device)
    log_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _forward_kernel[grid](pointers, out, log_sum, scale, sizes, strides, **flags)
    return out, log_sum


@_sparse_attention.register_fake
def _(q, keys, values, cells, length, scale, limit, key_slots):
    out = q.new_empty(*q.shape[:3], values.shape[-1], dtype=torch.float32)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hf_linear_attn::sparse_attention_backward", mutates_args=())
@on_its_device
def _sparse_attention_backward(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cells: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    limit: int | None,
    key_slots: torch.Tensor | None,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if _runs_in_tiles(keys, cells, limit, key_slots):
        return tiled_attention_backward(q, keys, values, cells, length, scale, out, log_sum, grad)
    grid, pointers, sizes, strides, flags = _arguments(q, keys, values, cells, length, key_slots, limit)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values))
    _backward_kernel[grid](pointers, out, log_sum, grad.contiguous(), (dq, dk, dv), scale, sizes, strides, **flags)
    return dq, dk.to(keys.dtype), dv.to(values.dtype)


@_sparse_attention_backward.register_fake
def _(q, keys, values, cells, length, scale, limit, key_slots, out, log_sum, grad):
    return torch.empty_like(q), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _save(ctx, inputs, output):
    q, keys, values, cells, length, ctx.scale, ctx.limit, key_slots = inputs
    ctx.save_for_backward(q, keys, values, cells, length, key_slots, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    *inputs, key_slots, out, log_sum = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradients must have one themselves
        formula = chunked_formula(*inputs[3:], ctx.scale, ctx.limit, key_slots)
        grads = differentiable_gradients(formula, inputs[:3], ctx.needs_input_grad, grad.to(inputs[0].dtype))
        return *grads, None, None, None, None, None
    grads = _sparse_attention_backward(*inputs, ctx.scale, ctx.limit, key_slots, out, log_sum, grad)
    return *grads, None, None, None, None, None


_sparse_attention.register_autograd(_differentiate, setup_context=_save)


def sparse_attention_kernel(q, keys, values, cells, length, scale, limit, key_slots):
    """Attention on the kept keys, arguments as for `chunked_sparse_attention`: (B, H, T, D) in the dtype of `q`."""
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    key_slots = None if key_slots is None else key_slots.contiguous()
    out, _ = _sparse_attention(
        q.contiguous(), keys, values, cells.contiguous(), length.contiguous(), float(scale), limit, key_slots
    )
    return out.to(q.dtype)
