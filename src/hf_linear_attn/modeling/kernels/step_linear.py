"""A linear layer on one token a row, with what stands around it, as one Triton kernel.

With few rows such a product is the reading of its weight. The library's kernels for it need more launches, and a weight whose
number of rows is odd (a vocabulary of 50,257) sends them to one that reads two bytes at a time. A program here holds all rows of
the batch and a few columns; LayerNorm's statistics are formed again in each, which costs less than a launch.

Up to 16 rows in half precision, a program asks for its whole part of the weight at once and waits for the memory one time, and
each of its warps multiplies a part of the depth; deeper weights are cut, and the last program to finish a column adds the pieces
up, always in the same order (an earlier product sets the counters of this one to 0, on request). Otherwise it goes through the
depth in a loop.

From Hopper on, a program asks for its weights while the kernel before is still at work (programmatic dependent launch), which
therefore must not be one that writes them. Nothing else is read, and nothing is written, before that kernel has ended.
"""

import torch
from torch import nn

from .conditions import KERNEL_DTYPES, at_most, dtypes_as_written, one_dtype, plain
from .dispatch import early_options, on_its_device
from .fast_paths import FastPath, fast_paths
from .plain_layers import has_hooks
from .tracing import records_gradients
from .triton_shim import gdc_launch_dependents, gdc_wait, tl, triton

LARGEST_STEP_BATCH = 64  # rows that a program of the kernel holds at once
LOOP_TILE = {"BN": 16, "BK": 128, "STAGES": 4, "num_warps": 4}
FLOAT32_TILE = {"BN": 16, "BK": 32, "STAGES": 2, "num_warps": 4}
WHOLE_ROWS, WHOLE_DEPTH, WARPS = 16, 1024, 4
WHOLE_DTYPES = (torch.bfloat16, torch.float16)
NARROW = 16  # columns a program
MANY_COLUMNS = 16384  # from so many on (a vocabulary), programs are plenty and take twice as many columns


# What belongs together travels together, also into the kernels:
#   norm     pointers to LayerNorm's weight and bias, and its eps
#   added    pointers to the bias and to the residual
#   split    pointers to the pieces of a product and to the counters of those that are finished
#   cleared  pointer to counters that become 0, and their number
#   FLAGS    NORM, BIAS, GELU, RELU, RESIDUAL: which of these a call has; pointers of what it has not are never touched
@triton.jit
def _finish(total, m, n, added, out_ptr, B, N, dtype: tl.constexpr, FLAGS: tl.constexpr):
    """What follows a product (BM, BN), and its store."""
    bias_ptr, residual_ptr = added
    BIAS: tl.constexpr = FLAGS[1]
    GELU: tl.constexpr = FLAGS[2]
    RELU: tl.constexpr = FLAGS[3]
    RESIDUAL: tl.constexpr = FLAGS[4]
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = total * 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
    if RELU:
        total = tl.maximum(total, 0.0)
    place = m[:, None] * N + n[None, :]
    inside = (m[:, None] < B) & (n[None, :] < N)
    if RESIDUAL:
        # What a layer adds is rounded before it is added, as the layers themselves do.
        total = total.to(dtype).to(tl.float32) + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(dtype), mask=inside)


@triton.jit
def _whole_kernel(
    x_ptr, norm, weight_ptr, added, out_ptr, split, cleared, B, N, K: tl.constexpr, KP: tl.constexpr, G: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr, FLAGS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `_loop_kernel`; program (i, j) multiplies columns i with the depth from j KP on, in G parts at once: a warp each."""
    norm_weight_ptr, norm_bias_ptr, norm_eps = norm
    pieces_ptr, done_ptr = split
    clears_ptr, number_cleared = cleared
    NORM: tl.constexpr = FLAGS[0]
    if EARLY:
        gdc_launch_dependents()
    m, n = tl.arange(0, BM), tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * KP + tl.arange(0, G)[:, None] * (KP // G) + tl.arange(0, KP // G)[None, :]
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    known = (k[:, :, None] < K) & (n[None, None, :] < N)
    weight = tl.load(weight_ptr + n[None, None, :] * K + k[:, :, None], mask=known, other=0.0)
    if EARLY:
        gdc_wait()
    for place in range(tl.program_id(0), number_cleared, tl.num_programs(0)):
        tl.store(clears_ptr + place, 0)
    inside = (m[None, :, None] < B) & (k[:, None, :] < K)
    x = tl.load(x_ptr + m[None, :, None] * K + k[:, None, :], mask=inside, other=0.0)
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        mean = tl.sum(tl.sum(wide, axis=2), axis=0) / K
        centred = tl.where(inside, wide - mean[None, :, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, axis=2), axis=0) / K + norm_eps)
        x = (centred * scale[None, :, None] * norm_weight[:, None, :] + norm_bias[:, None, :]).to(dtype)
    total = tl.sum(tl.dot(x, weight), axis=0)
    if PIECES == 1:
        _finish(total, m, n, added, out_ptr, B, N, dtype, FLAGS)
    else:
        place = m[:, None] * N + n[None, :]
        known = (m[:, None] < B) & (n[None, :] < N)
        tl.store(pieces_ptr + tl.program_id(1) * B * N + place, total, mask=known)
        tl.debug_barrier()  # the whole piece is on its way before this program counts as done
        if tl.atomic_add(done_ptr + tl.program_id(0), 1, sem="acq_rel") == PIECES - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for piece in tl.static_range(PIECES):
                total += tl.load(pieces_ptr + piece * B * N + place, mask=known, other=0.0, cache_modifier=".cg")
            _finish(total, m, n, added, out_ptr, B, N, dtype, FLAGS)


@triton.jit
def _loop_kernel(
    x_ptr, norm, weight_ptr, added, out_ptr, B, N, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Out (B, N) = gelu(layer_norm(x) (B, K) weight^T (N, K) + bias) + residual, each part where its flag is set."""
    norm_weight_ptr, norm_bias_ptr, norm_eps = norm
    NORM: tl.constexpr = FLAGS[0]
    m, n = tl.arange(0, BM), tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    mean = tl.zeros((BM,), tl.float32)
    scale = tl.zeros((BM,), tl.float32)
    if NORM:
        all_k = tl.arange(0, KP)
        known = (m[:, None] < B) & (all_k[None, :] < K)
        whole = tl.load(x_ptr + m[:, None] * K + all_k[None, :], mask=known, other=0.0).to(tl.float32)
        mean = tl.sum(whole, axis=1) / K
        centred = tl.where(known, whole - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + norm_eps)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        weight = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < B) & (k[None, :] < K), other=0.0)
        if NORM:
            norm_weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) - mean[:, None]) * scale[:, None] * norm_weight[None, :] + norm_bias[None, :]
            x = x.to(dtype)
        total = tl.dot(x, weight, total, input_precision="ieee")
    _finish(total, m, n, added, out_ptr, B, N, dtype, FLAGS)


def counters_of(linear, device: torch.device) -> torch.Tensor:
    """Room for what `project` counts at a deep layer: pieces of each column that are finished. It must be 0 before."""
    return torch.empty(triton.cdiv(linear.out_features, NARROW), dtype=torch.int32, device=device)


@on_its_device
def project(x, linear, norm=None, gelu=False, relu=False, residual=None, done=None, clears=None):
    """`linear` on x (B, K), B <= 64, with a LayerNorm before it and the exact GELU, a ReLU or a residual after it: (B, N).

    done: `counters_of(linear)` that an earlier kernel set to 0; without it a launch more does that, where the layer is deep.
    clears: such counters of a later product, which this one sets to 0.
    """
    rows, depth = x.shape
    columns = linear.out_features
    out = x.new_empty(rows, columns)
    # A kernel never touches a pointer whose flag is off; any tensor will do.
    added = tuple(x if tensor is None else tensor for tensor in (linear.bias, residual))
    scaled = (x, x, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    sizes = {
        "K": depth,
        "BM": max(16, triton.next_power_of_2(rows)),
        "FLAGS": (norm is not None, linear.bias is not None, gelu, relu, residual is not None),
    }
    pieces = triton.cdiv(depth, WHOLE_DEPTH)
    if rows > WHOLE_ROWS or x.dtype not in WHOLE_DTYPES or (norm is not None and pieces > 1):
        if clears is not None:
            clears.zero_()
        tile = FLOAT32_TILE if x.dtype == torch.float32 else LOOP_TILE
        _loop_kernel[(triton.cdiv(columns, tile["BN"]),)](
            x, scaled, linear.weight, added, out, rows, columns, KP=triton.next_power_of_2(depth), **tile, **sizes
        )
        return out
    width = 2 * NARROW if columns > MANY_COLUMNS else NARROW
    parts = x
    if pieces > 1:
        parts = torch.empty(pieces, rows, columns, device=x.device)
        done = counters_of(linear, x.device).zero_() if done is None else done
    split = parts, x if done is None else done
    cleared = (x, 0) if clears is None else (clears, clears.numel())
    _whole_kernel[triton.cdiv(columns, width), pieces](
        x, scaled, linear.weight, added, out, split, cleared, rows, columns,
        KP=min(WHOLE_DEPTH, max(16 * WARPS, triton.next_power_of_2(depth))), G=WARPS, BN=width, PIECES=pieces, num_warps=WARPS,
        **early_options(x.device), **sizes,
    )  # fmt: skip
    return out


def _is_step(linear, hidden_states, relu=False) -> bool:
    """One token a row, without gradients."""
    one = hidden_states.dim() == 3 and hidden_states.shape[1] == 1
    return one and isinstance(linear, nn.Linear) and not records_gradients()


def _covers(linear, hidden_states, relu=False) -> str | None:
    return (
        plain(linear)
        or dtypes_as_written(hidden_states)
        or at_most("batch", hidden_states.shape[0], LARGEST_STEP_BATCH)
        or one_dtype(hidden_states, linear.weight)
    )


def _are_steps(up, down, hidden_states) -> bool:
    return _is_step(up, hidden_states) and isinstance(down, nn.Linear)


def _covers_both(up, down, hidden_states) -> str | None:
    return _covers(up, hidden_states) or _covers(down, hidden_states)


def _one_product(linear, hidden_states, relu=False):
    return project(hidden_states[:, 0].contiguous(), linear, relu=relu)[:, None]


def _two_products(up, down, hidden_states):
    done = counters_of(down, hidden_states.device)
    inner = project(hidden_states[:, 0].contiguous(), up, relu=True, clears=done)
    return project(inner, down, done=done)[:, None]


@fast_paths(FastPath("one kernel that reads the weight once", _one_product, _covers, _is_step))
def step_linear(linear: nn.Module, hidden_states: torch.Tensor, relu: bool = False) -> torch.Tensor:
    """`linear(hidden_states)` or its ReLU; for (B, 1, d) without gradients (decoding) in a kernel that reads the weight once."""
    out = linear(hidden_states)
    if not relu:
        return out
    return out.relu() if has_hooks(linear) else out.relu_()  # a hook may have kept it


@fast_paths(FastPath("two kernels, of which the first prepares the second", _two_products, _covers_both, _are_steps))
def step_feed_forward(up: nn.Module, down: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`down(ReLU(up(hidden_states)))`; for (B, 1, d) without gradients in two kernels."""
    return step_linear(down, step_linear(up, hidden_states, relu=True))


__all__ = ["KERNEL_DTYPES", "LARGEST_STEP_BATCH", "counters_of", "project", "step_feed_forward", "step_linear"]
