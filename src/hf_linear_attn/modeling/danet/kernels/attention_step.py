"""One token of causal DenseAttention as a Triton kernel: positions, the state one token on in place, and the output.

A program does a row and head, and for a memory M = sum k^T v some of its columns. A ring of a sliding window is read once, its
oldest key and value give way to the new ones (DANet specification, section 1.5).
"""

import torch

from ...kernels.conditions import at_most, dtypes_as_written, one_dtype, without
from ...kernels.dispatch import early_options, on_its_device
from ...kernels.fast_paths import FastPath
from ...kernels.plain_layers import weight_dtype
from ...kernels.step_linear import step_linear
from ...kernels.tracing import records_gradients
from ...kernels.triton_shim import gdc_launch_dependents, gdc_wait, tl, triton
from ...shared.layer_output import LayerOutput
from ...shared.states.state_layer import RecurrentStateLayer
from ..state import memory_shape, window_shift

LARGEST_RING = 2**14  # window times head size: a program holds the keys and values of a head
LARGEST_HEAD = 1024
NUMBERS = 4096  # of a memory that a program holds


@triton.jit
def _features(
    x_ptr, scale_ptr, rotation_ptr, e, E: tl.constexpr, TURNED: tl.constexpr, ROTATES: tl.constexpr
):  # fmt: skip
    """Features e of a head, multiplied by what its position makes of them (see `apply_position_factors`); float32."""
    inside = e < E
    own = tl.load(x_ptr + e, mask=inside, other=0.0)
    if TURNED:
        turned = own.to(tl.float32) * tl.load(scale_ptr + e, mask=inside, other=0.0).to(tl.float32)
        if ROTATES:
            half: tl.constexpr = E // 2
            other = tl.load(x_ptr + tl.where(e < half, e + half, e - half), mask=inside, other=0.0).to(tl.float32)
            turned += other * tl.load(rotation_ptr + e, mask=inside, other=0.0).to(tl.float32)
        own = turned.to(own.dtype)
    return own.to(tl.float32)


@triton.jit
def _memory_kernel(
    q_ptr, x_ptr, scale_ptr, rotation_ptr, memory_ptr, count_ptr, out_ptr, table_stride,
    H: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROTATES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """M += k^T v, out = q M; with a window W > 0, M is that of the window that token `count` is in."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e, column = tl.arange(0, EP), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row = (b * H + h) * E
    scale_ptr += b * table_stride
    rotation_ptr += b * table_stride
    query = _features(q_ptr + row, scale_ptr, rotation_ptr, e, E, Q, ROTATES)
    key = _features(x_ptr + row, scale_ptr, rotation_ptr, e, E, K, ROTATES)
    value = _features(x_ptr + row, scale_ptr, rotation_ptr, column, E, V, ROTATES)
    place = (row + e[:, None]) * E + column[None, :]
    inside = (e[:, None] < E) & (column[None, :] < E)
    memory = tl.load(memory_ptr + place, mask=inside, other=0.0)
    if W > 0:
        begins = (tl.load(count_ptr + b) + SHIFT) % W == 0
        memory = tl.where(begins, 0.0, memory)
    memory += key[:, None] * value[None, :]
    tl.store(memory_ptr + place, memory, mask=inside)
    out = tl.sum(query[:, None] * memory, axis=0)
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask=column < E)


@triton.jit
def _ring_kernel(
    q_ptr, x_ptr, scale_ptr, rotation_ptr, ring_ptr, count_ptr, out_ptr, table_stride,
    H: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROTATES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Slot count mod W of the ring (B, 2, W, H, E) takes the new key and value; out = (q K^T) V over the ring."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e, w = tl.arange(0, EP), tl.arange(0, WP)
    row = (b * H + h) * E
    scale_ptr += b * table_stride
    rotation_ptr += b * table_stride
    query = _features(q_ptr + row, scale_ptr, rotation_ptr, e, E, Q, ROTATES)
    key = _features(x_ptr + row, scale_ptr, rotation_ptr, e, E, K, ROTATES)
    value = _features(x_ptr + row, scale_ptr, rotation_ptr, e, E, V, ROTATES)
    slot = tl.load(count_ptr + b) % W
    newest = (w == slot)[:, None]
    place = ((b * 2 * W + w[:, None]) * H + h) * E + e[None, :]
    inside = (w[:, None] < W) & (e[None, :] < E)
    keys = tl.where(newest, key[None, :], tl.load(ring_ptr + place, mask=inside, other=0.0).to(tl.float32))
    score = tl.sum(keys * query[None, :], axis=1)
    there = place + W * H * E
    values = tl.where(newest, value[None, :], tl.load(ring_ptr + there, mask=inside, other=0.0).to(tl.float32))
    tl.store(ring_ptr + place, keys.to(ring_ptr.dtype.element_ty), mask=inside & newest)
    tl.store(ring_ptr + there, values.to(ring_ptr.dtype.element_ty), mask=inside & newest)
    out = tl.sum(tl.where(w < W, score, 0.0)[:, None] * values, axis=0)
    tl.store(out_ptr + row + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


@on_its_device
def step_kernel(query, hidden_states, factors, turned, memory, count, pattern, window, shift):
    """Output (B, d) for queries and inputs (B, d), contiguous; `memory` goes one token on in place, `count` (B,) does not.

    factors: `PositionFactors` or None. turned: whether queries, keys and values take them.
    """
    batch, heads = query.shape[0], memory.shape[3] if pattern == "sw" else memory.shape[1]
    head = query.shape[1] // heads
    out = torch.empty_like(query)
    scale, rotation = factors or (query, None)
    # A kernel never touches a pointer whose flag is off; any tensor will do.
    tables = scale.contiguous(), query if rotation is None else rotation.contiguous()
    stride = head if factors is not None and scale.shape[0] > 1 else 0
    flags = {"H": heads, "E": head, "EP": max(16, triton.next_power_of_2(head)), **dict(zip("QKV", turned))}
    flags |= {"ROTATES": rotation is not None, **early_options(query.device)}
    given = query.contiguous(), hidden_states.contiguous(), *tables, memory, count, out, stride
    if pattern == "sw":
        wide = triton.next_power_of_2(window)
        warps = max(1, min(8, wide * flags["EP"] // 1024))
        _ring_kernel[(heads, batch)](*given, W=window, WP=wide, num_warps=warps, **flags)
        return out
    columns = max(16, min(flags["EP"], NUMBERS // flags["EP"]))
    _memory_kernel[(heads, batch, triton.cdiv(head, columns))](
        *given, COLUMNS=columns, W=0 if pattern == "g" else window, SHIFT=shift, num_warps=4, **flags
    )
    return out


def take_step(attention, hidden_states, call) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output (B, 1, d) of a layer for one more token (B, 1, d), normalised and scaled; its state goes on in place.

    Also returns the counters that are one too low now: raised together at the end, those of all layers take one launch.
    """
    factors = call.factors[attention.code]
    query = step_linear(attention.query_proj, hidden_states)
    (memory, count), counts, length = call.layer_cache(attention.layer_idx).take_step()
    turned = [factors is not None and name in attention.scheme for name in "qkv"]
    shift = window_shift(attention.pattern, attention.window)
    out = step_kernel(
        query[:, 0], hidden_states[:, 0], factors, turned, memory, count, attention.pattern, attention.window, shift
    )
    return out[:, None], [x for x in (count, counts, length) if x is not None]


def _run(attention, hidden_states, call) -> LayerOutput:
    out, counters = take_step(attention, hidden_states, call)
    torch._foreach_add_(counters, 1)
    return LayerOutput(out)


def _suits(attention, hidden_states, call) -> bool:
    asks_for_more = call.return_state or call.output_attentions
    return hidden_states.shape[1] == 1 and call.cache is not None and not asks_for_more and not records_gradients()


def _covers(attention, hidden_states, call) -> str | None:
    layer_cache = call.layer_cache(attention.layer_idx)
    if attention.options:
        return without(attention.options)
    if type(layer_cache) is not RecurrentStateLayer or layer_cache.record_past or layer_cache.get_state() is None:
        return "the cache has no state that may change in place"
    if call.mask is not None or call.segment_ids is not None:
        return "it knows neither padding nor documents"
    if attention.training:
        return "the layer is in training mode, and it drops nothing"
    if weight_dtype(attention.query_proj) != hidden_states.dtype:
        return f"the queries' weight is not {hidden_states.dtype}, the dtype of the input"
    factors = call.factors[attention.code]
    if factors is not None and attention.scheme == ["qkv"]:
        return "the queries are made of turned inputs"
    return dtypes_as_written(hidden_states) or one_dtype(hidden_states) or _sizes(attention, hidden_states, layer_cache)


def _sizes(attention, hidden_states, layer_cache) -> str | None:
    """Why the kernel cannot hold the state of this layer, or None."""
    batch, _, width = hidden_states.shape
    head, is_ring = width // attention.num_heads, attention.pattern == "sw"
    memory = layer_cache.get_state()[0]
    expected = (batch, *memory_shape(attention.pattern, attention.window, attention.num_heads, head))
    if memory.shape != expected or not memory.is_contiguous() or not (is_ring or memory.dtype == torch.float32):
        return f"the state is not a float32 tensor of shape {expected}"
    return at_most("head", head, LARGEST_HEAD) or (
        at_most("ring of one head", head * attention.window, LARGEST_RING) if is_ring else None
    )


STEP = FastPath("one token, its state going on in place", run=_run, covers=_covers, suits=_suits)
