"""One token through a LEAP block in four Triton kernels: what decoding with a small batch is made of.

A step of a batch of 16 reads every weight once and does almost nothing with it, so its time is the bytes of the weights and the
number of kernels. PyTorch's operations start about forty a block; here they are

    1  LayerNorm, projection to q, f, k, v         3  LayerNorm, up-projection, GELU
    2  rotation, state, gated mean, residual       4  down-projection, residual

1, 3 and 4 are `step_linear`'s; 2 advances the state in place, a program a row and head.
"""

import ctypes
import math

import torch
from torch import nn

from ...kernels.conditions import at_most, dtypes_as_written, one_dtype, plain, unhooked
from ...kernels.dispatch import early_options, on_its_device
from ...kernels.step_linear import LARGEST_STEP_BATCH, counters_of, project
from ...kernels.tracing import records_gradients
from ...kernels.triton_shim import gdc_launch_dependents, gdc_wait, tl, triton
from ...shared.compat import GELUActivation
from ...shared.states.state_layer import RecurrentStateLayer
from ...shared.windowed_mean import EPS
from .own_layers import own_layers

LARGEST_STEP_WIDTH = 8192
LARGEST_STEP_WINDOW = 257


@triton.jit
def _turned(pointer, e, position, log_theta, log_theta_rest, E: tl.constexpr):
    """Features (EP,) of a query or key, turned by its position; float64 angles, as in `position_factors`.

    Numbers reach a kernel in float32: the logarithm comes in two, since its rounding alone turns position 10^7 by 0.04.
    """
    half: tl.constexpr = E // 2
    own = tl.load(pointer + e, mask=e < E, other=0.0)
    other = tl.load(pointer + tl.where(e < half, e + half, e - half), mask=e < E, other=0.0)
    share = (e % half).to(tl.float64) / half
    angle = position.to(tl.float64) * tl.exp(-(log_theta * share + log_theta_rest * share))
    cos, sin = tl.cos(angle).to(own.dtype).to(tl.float32), tl.sin(angle).to(own.dtype).to(tl.float32)
    turned = own.to(tl.float32) * cos + tl.where(e < half, -1.0, 1.0) * other.to(tl.float32) * sin
    return turned.to(own.dtype).to(tl.float32)


@triton.jit
def _mix_kernel(
    x_ptr, residual_ptr, out_ptr, positions, theta, state, counts, scale, eps, H: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, ROTARY: tl.constexpr, COUNTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Out = residual + gated mean of one token and head; the state (see `windowed_mean`) goes one token on in place.

    positions: their pointer and stride. theta: the logarithm of its base, in two numbers (`_turned`). state: pointers to values
    and weights. counts: pointers to those of the rows and, if COUNTED, to the length of a static cache.
    """
    position_ptr, position_stride = positions
    log_theta, log_theta_rest = theta
    values_ptr, weights_ptr = state
    counts_ptr, length_ptr = counts
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = tl.arange(0, EP)
    inside = e < E
    x_ptr += b * 4 * H * E + h * E
    focus = tl.load(x_ptr + H * E + e, mask=inside, other=0.0).to(tl.float32)
    plain_key = tl.load(x_ptr + 2 * H * E + e, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + 3 * H * E + e, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        position = tl.load(position_ptr + b * position_stride)
        query = _turned(x_ptr, e, position, log_theta, log_theta_rest, E)
        key = _turned(x_ptr + 2 * H * E, e, position, log_theta, log_theta_rest, E)
    else:
        query = tl.load(x_ptr + e, mask=inside, other=0.0).to(tl.float32)
        key = plain_key
    logit = tl.sum(focus * plain_key, axis=0) * scale
    weight = tl.where(logit > 0, logit + 1.0, tl.exp(tl.minimum(logit, 0.0)))
    sum_k, sum_v, norm = weight * key, weight * value, weight
    if W == 0:
        place = values_ptr + (b * 2 * H + h) * E + e
        sum_k += tl.load(place, mask=inside, other=0.0)
        sum_v += tl.load(place + H * E, mask=inside, other=0.0)
        norm += tl.load(weights_ptr + b * H + h)
        tl.store(place, sum_k, mask=inside)
        tl.store(place + H * E, sum_v, mask=inside)
        tl.store(weights_ptr + b * H + h, norm)
    if W > 1:
        w = tl.arange(0, WP)
        row = b * (W - 1) + w
        held = w < W - 1
        both = held[:, None] & inside[None, :]
        place = values_ptr + (row[:, None] * 2 * H + h) * E + e[None, :]
        keys = tl.load(place, mask=both, other=0.0)
        values = tl.load(place + H * E, mask=both, other=0.0)
        weights = tl.load(weights_ptr + row * H + h, mask=held, other=0.0)
        sum_k += tl.sum(weights[:, None] * keys, axis=0)
        sum_v += tl.sum(weights[:, None] * values, axis=0)
        norm += tl.sum(weights, axis=0)
        tl.debug_barrier()  # everything is read before the rows move up by one
        up = both & (w[:, None] > 0)
        tl.store(place - 2 * H * E, keys, mask=up)
        tl.store(place - H * E, values, mask=up)
        tl.store(weights_ptr + (row - 1) * H + h, weights, mask=held & (w > 0))
        newest = b * (W - 1) + W - 2
        tl.store(values_ptr + (newest * 2 * H + h) * E + e, key, mask=inside)
        tl.store(values_ptr + (newest * 2 * H + H + h) * E + e, value, mask=inside)
        tl.store(weights_ptr + newest * H + h, weight)
    share = 1.0 / (norm + eps)
    gate = tl.sigmoid(tl.sum(query * sum_k, axis=0) * share * scale)
    place = b * H * E + h * E + e
    dtype = out_ptr.dtype.element_ty
    mixed = (sum_v * share * gate).to(dtype).to(tl.float32)
    mixed += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, mixed.to(dtype), mask=inside)
    if h == 0:
        tl.store(counts_ptr + b, tl.load(counts_ptr + b) + 1)
        if COUNTED and b == 0:
            tl.store(length_ptr, tl.load(length_ptr) + 1)


def step_kernels(block, hidden_states, position_ids, state, counts, length):
    """The block's output (B, d) for the token with hidden states (B, d).

    The tensors of the state, the `counts` (B,) of tokens and the `length` of a static cache (or None) go on in place.
    """
    attention, mlp = block.attention, block.mlp
    projected = project(hidden_states.contiguous(), attention.qfkv_proj, block.attention_norm)
    mixed = _mix(attention, projected, hidden_states.contiguous(), position_ids, state, counts, length)
    done = counters_of(mlp.down_proj, hidden_states.device)
    inner = project(mixed, mlp.up_proj, block.mlp_norm, gelu=True, clears=done)
    return project(inner, mlp.down_proj, residual=mixed, done=done)


@on_its_device
def _mix(attention, projected, residual, position_ids, state, counts, length):
    """The mechanism for one token, the state taken along: (B, 4 d) and the residual (B, d) -> (B, d)."""
    batch = residual.shape[0]
    head, window, rotary = attention.head_dim, attention.window, attention.rope_theta is not None
    out = torch.empty_like(residual)
    held = 0 if window is None else window - 1
    log_theta = math.log(attention.rope_theta) if rotary else 0.0
    single = ctypes.c_float(log_theta).value
    positions = (projected, 0)
    if rotary:
        positions = position_ids, position_ids.stride(0) if position_ids.shape[0] > 1 else 0
    _mix_kernel[(attention.num_heads, batch)](
        projected, residual, out, positions, (single, log_theta - single), tuple(state),
        (counts, counts if length is None else length), head**-0.5, EPS,
        H=attention.num_heads, W=0 if window is None else window, WP=max(1, triton.next_power_of_2(held)), E=head,
        EP=max(16, triton.next_power_of_2(head)), ROTARY=rotary, COUNTED=length is not None, num_warps=1,
        **early_options(residual.device),
    )  # fmt: skip
    return out


def is_step(block, hidden_states, call) -> bool:
    """One more token a row behind a cache, without gradients, padding, new documents or a look at weights."""
    if hidden_states.shape[1] != 1 or call.cache is None or call.mask is not None or call.segment_ids is not None:
        return False
    return not (call.return_state or call.wants_maps or records_gradients())


def step_covers(block, hidden_states, call) -> str | None:
    """Why the kernels cannot do this step, or None."""
    attention, mlp = block.attention, block.mlp
    if (reason := own_layers(attention, mlp)) is not None:
        return reason
    layer = call.layer_cache(attention.layer_idx)
    state = layer.get_state() if type(layer) is RecurrentStateLayer and not layer.record_past else None
    if state is None:
        return "the cache has no state that may change in place"
    if attention.exponential or type(mlp.activation) is not GELUActivation:
        return "they know the focus weight elu + 1 and the exact GELU"
    if attention.rope_theta is not None and call.position_ids is None:
        return "`position_ids` of rotary positions are not given"
    if block.training:
        return "the block is in training mode, and they drop nothing"
    batch, _, width = hidden_states.shape
    norms, linears = (block.attention_norm, block.mlp_norm), (attention.qfkv_proj, mlp.up_proj, mlp.down_proj)
    reason = (
        at_most("batch", batch, LARGEST_STEP_BATCH)
        or at_most("width", width, LARGEST_STEP_WIDTH)
        or at_most("window", attention.window or 0, LARGEST_STEP_WINDOW)
        or dtypes_as_written(hidden_states)
        or plain(*norms, kind=nn.LayerNorm, bias=True)
        or plain(*linears)
        or unhooked(attention, mlp, mlp.activation)
        or one_dtype(hidden_states, *(x.weight for x in (*norms, *linears)))
    )
    if reason is None and any(x.dtype != torch.float32 or not x.is_contiguous() or x.shape[0] != batch for x in state):
        return "the state is not float32 or of another batch"
    return reason


def step_block(block, hidden_states, call) -> torch.Tensor:
    """The output (B, 1, d) of a `LeapBlock` for one more token, the cache taken along."""
    state, counts, length = call.layer_cache(block.attention.layer_idx).take_step()
    return step_kernels(block, hidden_states[:, 0], call.position_ids, state, counts, length)[:, None]
