"""The LEAP mechanism as operators of Triton kernels (`chunks`), forward and backward.

Global layers take two steps more than windows: every chunk's total, and their running sum. Near windows have a kernel of their
own in backward, which walks along strips of small chunks (`strips`).

Bytes a token and head of E features in b bytes: forward 5 E b (global 8 E b), backward 9 E b; far windows and global layers read
the projections and the gradient once more (and global ones keys, values and focus a third time), in a second kernel.
"""

from functools import partial

import torch

from ...kernels.dispatch import on_its_device
from ...kernels.running_sum import running_sum
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.tracing import records_gradients
from ...kernels.triton_shim import triton
from ...shared.windowed_mean import EPS, windowed_sum
from .chunks import backward_readers_kernel, backward_writers_kernel, forward_kernel, totals_kernel
from .eager_backward import plain_mechanism
from .strips import backward_strip_kernel

# Tokens a chunk and warps a program. Small chunks leave less for a program to wait for, and a near window wastes less of a table;
# products in float32 are not bound by that.
FAR_CHUNK, GLOBAL_CHUNK, NEAR_CHUNK = (64, 4), (32, 2), (16, 1)
SMALL_DTYPES = (torch.bfloat16,)
# The strips of near windows in backward: chunks, stages of the loads (inputs are asked for one step less ahead), warps.
STRIP, STAGES, STRIP_WARPS = 32, 3, 2


class _Call:
    """Sizes, strides and flags of one call, as the kernels take them."""

    def __init__(self, projected, query, key, window, dropout, mask, segment_ids):
        self.B, self.T, _, self.H, self.E = projected.shape
        bf16 = projected.dtype == torch.bfloat16
        small = projected.dtype in SMALL_DTYPES
        self.is_near = small and window is not None and window - 1 <= NEAR_CHUNK[0]
        self.C, warps = NEAR_CHUNK if self.is_near else GLOBAL_CHUNK if small and window is None else FAR_CHUNK
        self.N = triton.cdiv(self.T, self.C)
        self.grid = (self.N, self.H, self.B)
        self.EP = max(16, triton.next_power_of_2(self.E))
        self.scale = self.E**-0.5
        self.mask = None if mask is None else mask.to(torch.uint8).contiguous()
        self.segments = None if segment_ids is None else segment_ids.to(torch.int32).contiguous()
        rotated = key is not None
        self.query = query if rotated else projected[:, :, 0]
        self.readers = (self.query, *self.query.stride()[:3])
        self.sizes = (self.T, self.H, self.N)
        self.strides = (*projected.stride()[:4], *(key if rotated else self.query).stride()[:3])
        # A kernel never touches a pointer whose flag is off; any tensor will do.
        self.inputs = (
            projected,
            key if rotated else projected,
            projected if mask is None else self.mask,
            projected if segment_ids is None else self.segments,
        )
        self.load_flags = {
            "E": self.E,
            "EP": self.EP,
            "C": self.C,
            "FLAGS": (mask is not None, segment_ids is not None, dropout > 0, rotated),
            "num_warps": warps if self.EP <= 64 else 2 * warps,
            "num_stages": 1,
        }
        # How far a window reaches into the chunk before: as few rows as its length and the matrix units allow.
        lookback = 16 if window is None else min(self.C, max(16, triton.next_power_of_2(window - 1)))
        self.flags = {
            **self.load_flags,
            "W": 0 if window is None else window,  # 0 is a global layer
            "L": lookback if bf16 else self.C,
            "BF16": bf16,
        }

    def strips(self):
        """Grid and flags of the kernel for near windows."""
        warps = STRIP_WARPS if self.EP <= 64 else 2 * STRIP_WARPS
        flags = {**self.load_flags, "W": self.flags["W"], "BF16": self.flags["BF16"]}
        strip = min(STRIP, max(4, triton.next_power_of_2(self.N)))  # a short row fills no long strip
        flags |= {"S": strip, "STAGES": STAGES, "num_warps": warps}
        return (triton.cdiv(self.N, strip), self.H, self.B), flags

    def scratch(self):
        """Empty totals of all chunks: (B, N, H, 2, EP) and (B, N, H)."""
        device = self.query.device
        total = torch.empty(self.B, self.N, self.H, 2, self.EP, device=device)
        return total, torch.empty(self.B, self.N, self.H, device=device)

    def ends(self):
        """Document at the last and at the first place of each chunk, (B, N) each."""
        place = torch.arange(self.N, device=self.segments.device) * self.C
        return self.segments[:, (place + self.C - 1).clamp(max=self.T - 1)], self.segments[:, place]

    def pointers(self, *tensors):
        """Pointers of tensors that only some calls have."""
        return tuple(self.query if x is None else x for x in tensors)

    def drop(self, seed, dropout):
        """Seed and probability of dropout."""
        return (*self.pointers(seed), dropout)


def _running(total, norm, documents):
    """Sum of the totals up to and with each chunk, over chunks whose document is the same."""
    if documents is None:
        return running_sum(total, 1), running_sum(norm, 1)
    joined = torch.cat([total.flatten(3), norm[..., None]], dim=-1)
    joined = windowed_sum(joined.flatten(2), None, documents).view(joined.shape)
    return joined[..., :-1].reshape(total.shape).contiguous(), joined[..., -1].contiguous()


def _before(running, norm):
    shift = torch.nn.functional.pad
    return (
        shift(running[:, :-1], [0, 0] * 3 + [1, 0]).contiguous(),
        shift(norm[:, :-1], [0, 0, 1, 0]).contiguous(),
    )


@torch.library.custom_op("hf_linear_attn::leap_carry", mutates_args=())
@on_its_device
def leap_carry(
    projected: torch.Tensor,
    key: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    state_sum: torch.Tensor | None,
    state_norm: torch.Tensor | None,
) -> list[torch.Tensor]:
    """For a global layer: the state after the row, what came before each chunk, and with documents the one it belongs to.

    Sums (B, 2, H, E), norms (B, H), carried sums (B, N, H, 2, EP), carried norms (B, N, H), documents (B, N).
    """
    call = _Call(projected, key, key, None, dropout, mask, segment_ids)
    total, norm = call.scratch()
    totals_kernel[call.grid](
        call.inputs, (total, norm), call.drop(seed, dropout), call.scale, call.sizes, call.strides, **call.load_flags
    )
    last = None if call.segments is None else call.ends()[0]
    running, running_norm = _running(total, norm, last)
    carry, carry_norm = _before(running, running_norm)
    final, final_norm = running[:, -1], running_norm[:, -1]
    if state_sum is not None and state_norm is not None:
        padded = torch.nn.functional.pad(state_sum.float(), [0, call.EP - call.E]).transpose(1, 2)
        still = torch.ones(call.B, call.N + 1, device=padded.device)
        if last is not None:
            still = torch.cat([torch.ones_like(still[:, :1]), (last == 0).float()], dim=1)
        carry = carry + still[:, :-1, None, None, None] * padded[:, None]
        carry_norm = carry_norm + still[:, :-1, None] * state_norm.float()[:, None]
        final, final_norm = (
            final + still[:, -1, None, None, None] * padded,
            final_norm + still[:, -1, None] * state_norm,
        )
    final = final.transpose(1, 2)[..., : call.E].contiguous()
    # What reaches the first chunk is the state, which belongs to document 0.
    documents = [] if last is None else [torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], dim=1).contiguous()]
    return [final, final_norm.clone(), carry, carry_norm, *documents]


@leap_carry.register_fake
def _(projected, key, dropout, seed, mask, segment_ids, state_sum, state_norm):
    call = _Call(projected, key, key, None, dropout, mask, segment_ids)
    new = partial(projected.new_empty, dtype=torch.float32)
    found = [new(call.B, 2, call.H, call.E), new(call.B, call.H), new(call.B, call.N, call.H, 2, call.EP)]
    documents = [] if segment_ids is None else [new(call.B, call.N, dtype=torch.int32)]
    return [*found, new(call.B, call.N, call.H), *documents]


def carry_and_state(projected, key, window, dropout, seed, mask, segment_ids, state=None):
    """What came before each chunk (three tensors, or None in their place), and the state after the row (global layers)."""
    if window is not None:
        return (None, None, None), None
    final, final_norm, *carry = leap_carry(projected, key, dropout, seed, mask, segment_ids, *(state or (None, None)))
    return (*carry, None)[:3], (final, final_norm)


@torch.library.custom_op("hf_linear_attn::leap_forward", mutates_args=())
@on_its_device
def leap_forward(
    projected: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    carry: torch.Tensor | None,
    carry_norm: torch.Tensor | None,
    documents: torch.Tensor | None,
    window: int | None,
    dropout: float,
    seed: torch.Tensor | None,
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The output (B, T, H, E); `query`, `key` are the rotated ones or None, the carry is that of `carry_and_state`."""
    call = _Call(projected, query, key, window, dropout, mask, segment_ids)
    out = projected.new_empty(call.B, call.T, call.H, call.E)
    forward_kernel[call.grid](
        call.readers, call.inputs, call.pointers(carry, carry_norm, documents), out, call.drop(seed, dropout),
        call.scale, EPS, call.sizes, call.strides, **call.flags,
    )  # fmt: skip
    return out


@leap_forward.register_fake
def _(projected, *rest):
    batch, length, _, heads, width = projected.shape
    return projected.new_empty(batch, length, heads, width)


@torch.library.custom_op("hf_linear_attn::leap_backward", mutates_args=())
@on_its_device
def leap_backward(
    grad: torch.Tensor,
    projected: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    carry: torch.Tensor | None,
    carry_norm: torch.Tensor | None,
    documents: torch.Tensor | None,
    window: int | None,
    dropout: float,
    seed: torch.Tensor | None,
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of `projected`, and of the rotated queries and keys where there are; arguments as for `leap_forward`."""
    call = _Call(projected, query, key, window, dropout, mask, segment_ids)
    rotated = query is not None and key is not None
    dx = torch.empty_like(projected, memory_format=torch.contiguous_format)
    grads = [dx]
    if query is not None and key is not None:
        dx[:, :, 0] = 0
        grads += [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key)]
    dq = (grads[1] if rotated else dx, call.H * call.E * (1 if rotated else 4))
    written = (dx, grads[2] if rotated else dx)
    drop = call.drop(seed, dropout)
    if call.is_near:
        grid, flags = call.strips()
        backward_strip_kernel[grid](
            call.readers, call.inputs, grad.contiguous(), dq, written, drop, call.scale, EPS, call.sizes, call.strides, **flags,
        )  # fmt: skip
        return grads
    total, total_norm = call.scratch() if window is None else (None, None)
    grad = grad.contiguous()
    readers = torch.empty(call.B, call.H, 3, call.T, device=projected.device)
    backward_readers_kernel[call.grid](
        call.readers, call.inputs, call.pointers(carry, carry_norm, documents), grad, dq, readers,
        call.pointers(total, total_norm), drop, call.scale, EPS, call.sizes, call.strides, **call.flags,
    )  # fmt: skip
    if total is not None and total_norm is not None:
        # The same running sum from the end: what the chunks after each one hand back.
        last, first = (None, None) if call.segments is None else call.ends()
        running = _running(total.flip(1), total_norm.flip(1), None if first is None else first.flip(1))
        carry, carry_norm = (x.flip(1).contiguous() for x in _before(*running))
        if first is not None and last is not None:
            documents = torch.cat([first[:, 1:], last[:, -1:]], dim=1).contiguous()
    backward_writers_kernel[call.grid](
        call.readers, call.inputs, call.pointers(carry, carry_norm, documents), grad, readers, written, drop,
        call.scale, call.sizes, call.strides, **call.flags,
    )  # fmt: skip
    return grads


@leap_backward.register_fake
def _(grad, projected, query, key, *rest):
    like = [projected] if key is None else [projected, query, key]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


@torch.library.custom_op("hf_linear_attn::leap_forward_again", mutates_args=())
def leap_forward_again(
    grad: torch.Tensor,
    projected: torch.Tensor,
    carry: torch.Tensor | None,
    carry_norm: torch.Tensor | None,
    documents: torch.Tensor | None,
    window: int | None,
    dropout: float,
    seed: torch.Tensor | None,
    mask: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The output of `leap_forward` once more, in backward.

    `grad` is any gradient that is there by then: a compiler keeps the first output if nothing says that this call comes later.
    """
    return leap_forward(projected, None, None, carry, carry_norm, documents, window, dropout, seed, mask, segment_ids)


@leap_forward_again.register_fake
def _(grad, projected, *rest):
    batch, length, _, heads, width = projected.shape
    return projected.new_empty(batch, length, heads, width)


def kernel_formula(window, dropout, mask, segment_ids):
    """`plain_mechanism` of what a kernel computed."""
    if dropout:
        raise RuntimeError(
            "`create_graph=True` (a gradient penalty, a Hessian) with `attention_dropout` > 0 on a GPU: LEAP's kernel draws "
            "what it drops, and draws it for first derivatives alone. Set `attention_dropout` to 0, or run forward and backward "
            'under `use_backend("torch")`'
        )
    return plain_mechanism(window, None, mask, segment_ids)


def _save(ctx, inputs, output):
    *tensors, window, dropout, seed, mask, segment_ids = inputs
    ctx.save_for_backward(*tensors, seed, mask, segment_ids)
    ctx.arguments = window, dropout


def _differentiate(ctx, grad):
    *tensors, seed, mask, segment_ids = ctx.saved_tensors
    if records_gradients():  # create_graph=True: the gradients must have one themselves
        formula = kernel_formula(*ctx.arguments, mask, segment_ids)
        return *differentiable_gradients(formula, tensors[:3], ctx.needs_input_grad, grad), *[None] * 8
    dx, *rotated = leap_backward(grad, *tensors, *ctx.arguments, seed, mask, segment_ids)
    return dx, *(rotated or (None, None)), *[None] * 8


leap_forward.register_autograd(_differentiate, setup_context=_save)


def leap_kernel(projected, rotated, window, dropout, mask, segment_ids, state):
    """Run the kernels on CUDA tensors; arguments as for `leap_mechanism`. `state` is that of a global layer, or None.

    Returns the output (B, T, H, E) and the state after the row (global layers; None for a window).
    """
    seed = torch.randint(2**31 - 1, (), device=projected.device) if dropout else None
    projected, query, key = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (projected, *(rotated or (None, None)))
    )
    with torch.no_grad():  # the kernels' backward is that of both together
        carry, final = carry_and_state(projected, key, window, dropout, seed, mask, segment_ids, state)
    return leap_forward(projected, query, key, *carry, window, dropout, seed, mask, segment_ids), final
