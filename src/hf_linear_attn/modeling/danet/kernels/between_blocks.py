"""All blocks of a DANet with the norms between two of them in one pass over memory, forward and backward, as Triton kernels.

Between the products of two blocks stand a norm, a residual sum and a norm: h <- h + Norm_post(y), x = s Norm_pre(h). Apart, they
read and write (B, T, d) five times, and their gradients nine times. Here they take three and six: the stream is carried as x and
one number a row, h = x (size / s), which rounds h no more often than storing h would. With padding, where s is 0, h is stored as
well: four.

A program does one row. Sums and factors are float32; see `max_norm` for the norm itself.
"""

from functools import partial
from itertools import pairwise

import torch

from ...kernels.conditions import NextPath, dtypes_as_written, unhooked, untransformed
from ...kernels.dispatch import early_options, on_its_device
from ...kernels.fast_paths import FastPath
from ...kernels.plain_layers import has_hooks
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.tracing import records_gradients
from ...kernels.triton_shim import gdc_launch_dependents, gdc_wait, tl, triton
from .attention_step import STEP, take_step
from .max_norm import kernel_reason, launch_sizes, max_norm_formula, row_numbers, taken


@triton.jit
def _between_blocks_kernel(
    y_ptr, stream_ptr, factor_ptr, keep_ptr, scale_ptr, normed_ptr, out_ptr, eps, next_eps, width,
    WIDTH: tl.constexpr, LAZY_IN: tl.constexpr, LAZY_OUT: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """H += keep Norm(y), then x = scale Norm(h). A lazy stream holds x and h / x, one number a row, instead of h."""
    if EARLY:  # see `step_linear`
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, WIDTH)
    inside = features < width
    place = row * width + features
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(stream_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if LAZY_IN:
        h *= tl.load(factor_ptr + row)
    share = 1.0 / (tl.max(tl.abs(y), axis=0) + eps)
    if MASKED:
        share *= tl.load(keep_ptr + row)
    h += y * share
    size = tl.max(tl.abs(h), axis=0) + next_eps
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + row)
    tl.store(normed_ptr + place, (h * (scale / size)).to(normed_ptr.dtype.element_ty), mask=inside)
    if LAZY_OUT:
        tl.store(out_ptr + row, size / scale)
    else:
        tl.store(out_ptr + place, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _between_blocks_backward_kernel(
    y_ptr, stream_ptr, factor_ptr, keep_ptr, scale_ptr, dnormed_ptr, dstream_ptr, dy_ptr, dh_ptr, eps, next_eps, width,
    WIDTH: tl.constexpr, LAZY: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Gradients of y and of h before the block's end, from those of x and of h after it (`dstream`)."""
    row = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, WIDTH)
    inside = features < width
    place = row * width + features
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(stream_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dnormed_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + row)
    size = tl.max(tl.abs(h), axis=0)
    if LAZY:  # h holds x = h scale / (max |h| + next_eps)
        share, rate = tl.sum(grad * h, axis=0) / scale, 1.0 / tl.load(factor_ptr + row)
    else:
        share, rate = tl.sum(grad * h, axis=0) / (size + next_eps), scale / (size + next_eps)
    grad = rate * (grad - taken(h, size, share, inside))
    grad += tl.load(dstream_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dh_ptr + place, grad.to(dh_ptr.dtype.element_ty), mask=inside)
    size = tl.max(tl.abs(y), axis=0)
    factor = 1.0 / (size + eps)
    grad -= taken(y, size, tl.sum(grad * y, axis=0) * factor, inside)
    if MASKED:
        factor *= tl.load(keep_ptr + row)
    tl.store(dy_ptr + place, (factor * grad).to(dy_ptr.dtype.element_ty), mask=inside)


def between_blocks(y, stream, factor, keep, scale, eps, next_eps, lazy):
    """The end of one block and the beginning of the next in one pass: x and the new stream.

        h <- h + keep Norm(y)        x = scale Norm(h)

    Args:
        y: (B, T, d). keep, scale: `row_numbers`, or None for 1. A lazy result needs a scale that is never 0.
        stream, factor: the last `stream` and `factor` that this function returned, or h (B, T, d) and None.
        eps, next_eps: of the two norms.
        lazy: let the stream share the memory of x, with a number a row beside it: three passes over memory instead of four.

    Returns:
        x (B, T, d), stream (B, T, d), factor (B, T, 1) or None: h = stream factor. The gradient of `stream` is that of h:
        it may go into this function and into `leave_stream` alone.
    """
    decodes = y.shape[1] == 1 and not records_gradients()
    normed, stream, *factors = _BetweenBlocks.apply(
        y.contiguous(), stream.contiguous(), factor, keep, scale, eps, next_eps, lazy, decodes
    )
    return normed, stream, *(factors or [None])


class _BetweenBlocks(torch.autograd.Function):
    """Keeps y and x (or h, where x and h are stored both)."""

    @staticmethod
    @on_its_device
    def forward(ctx, y, stream, factor, keep, scale, eps, next_eps, lazy, decodes):
        grid, width, options = launch_sizes(y)
        normed = torch.empty_like(y)
        out = torch.empty(*y.shape[:-1], 1, device=y.device) if lazy else torch.empty_like(y)
        _between_blocks_kernel[grid](
            y, stream, *(y if x is None else x for x in (factor, keep, scale)), normed, out, eps, next_eps, width,
            LAZY_IN=factor is not None, LAZY_OUT=lazy, MASKED=keep is not None, SCALED=scale is not None,
            **early_options(y.device, decodes), **options,
        )  # fmt: skip
        before = stream, factor  # held by the block before, too
        ctx.save_for_backward(y, normed if lazy else out, out if lazy else None, keep, scale, *before)
        ctx.arguments = eps, next_eps
        if not lazy:
            return normed, out
        ctx.mark_non_differentiable(out)
        return normed, normed.detach(), out

    @staticmethod
    @on_its_device
    def backward(ctx, dnormed, dstream, *unused):
        y, stream, factor, keep, scale, *before = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients must have one themselves
            formula = partial(_between_blocks_formula, factor=before[1], keep=keep, scale=scale, eps=ctx.arguments)
            found = differentiable_gradients(formula, (y, before[0]), ctx.needs_input_grad, dnormed, dstream)
            return *found, *[None] * 7
        grid, width, options = launch_sizes(y)
        dy, dh = torch.empty_like(y), torch.empty_like(y)
        _between_blocks_backward_kernel[grid](
            y, stream, *(y if x is None else x for x in (factor, keep, scale)), dnormed.contiguous(),
            dstream.contiguous(), dy, dh, *ctx.arguments, width,
            LAZY=factor is not None, MASKED=keep is not None, SCALED=scale is not None, **options,
        )  # fmt: skip
        return dy, dh, *[None] * 7


def _between_blocks_formula(y, stream, factor, keep, scale, eps):
    hidden = leave_stream(stream, factor) + max_norm_formula(y, keep, eps[0])
    return max_norm_formula(hidden, scale, eps[1]), hidden


def leave_stream(stream, factor):
    """The hidden states h that `between_blocks` carries."""
    return stream if factor is None else _LeaveStream.apply(stream, factor)


class _LeaveStream(torch.autograd.Function):
    """The gradient of the stream is that of h already."""

    @staticmethod
    def forward(ctx, stream, factor):
        return (stream * factor).to(stream.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _run(model, layers, hidden_states: torch.Tensor, call) -> torch.Tensor:
    norm, first, last, lazy = model.norm, layers[0], layers[-1], call.keep is None
    keep = row_numbers(call.keep, hidden_states)
    scales = {code: row_numbers(scale, hidden_states) for code, scale in call.input_scales.items()}
    counters: list[torch.Tensor] = []
    # From block to block: y is what a block adds, before its norm; x the normalised, scaled input of the next.
    x, stream, factor = first.pre_norm(hidden_states, scales[first.code]), hidden_states, None
    for block, following in pairwise(layers):
        y = _added(block, x, call, counters)
        eps = block.post_norm.eps, following.pre_norm.eps
        x, stream, factor = between_blocks(y, stream, factor, keep, scales[following.code], *eps, lazy)
    y = _added(last, x, call, counters)
    if counters:
        torch._foreach_add_(counters, 1)
    # The end: the last block's norm and sum, and the final norm where there is one.
    if norm is not None and _is_max_norm(norm):
        return between_blocks(y, stream, factor, keep, None, last.post_norm.eps, norm.eps, factor is not None)[0]
    hidden_states = last.post_norm(y, keep, residual=leave_stream(stream, factor))
    return hidden_states if norm is None else norm(hidden_states)


def _added(block, x, call, counters) -> torch.Tensor:
    """FFN(DenseAttention(x)) of a block, (B, T, d); a decoding step adds to `counters` what is one too low after it."""
    from ..block import DenseAttention  # the model files import this one

    attention = block.attention
    if type(attention) is DenseAttention and not has_hooks(attention) and STEP.takes(attention, x, call):
        mixed, raised = take_step(attention, x, call)
        counters += raised
        return block.mlp(mixed)
    return block.mix(x, call)[0]


def _is_max_norm(norm) -> bool:
    from ..norms import VectorNorm

    return type(norm) is VectorNorm and norm.scale is None and not norm.mean and not has_hooks(norm)


def _suits(model, layers, hidden_states, call) -> bool:
    return len(layers) > 0 and hidden_states.shape[1] > 0 and not call.output_attentions


def _covers(model, layers, hidden_states, call) -> str | None:
    reason = _reason(layers, hidden_states)
    return None if reason is None else NextPath(reason)  # block by block, the norms and steps have kernels, too


def _reason(layers, hidden_states) -> str | None:
    from ..block import DanetBlock

    for layer in layers:
        if type(layer) is not DanetBlock:
            return f"it runs DanetBlocks alone, a layer is a {type(layer).__name__}"
        if not _is_max_norm(layer.pre_norm) or not _is_max_norm(layer.post_norm):
            return "a norm around a block is not MaxNorm without a weight, or a hook is registered on it"
        if layer._compiled_call_impl is not None:
            return "a block is compiled by itself"
        if layer.training and layer.gradient_checkpointing:
            return "blocks run again in backward (gradient checkpointing)"
    # Under autocast the stream is wider than what a block adds.
    return (
        unhooked(*layers)
        or untransformed(hidden_states)
        or dtypes_as_written(hidden_states)
        or kernel_reason(hidden_states)
    )


BETWEEN_BLOCKS = FastPath("norms between blocks in one pass", run=_run, covers=_covers, suits=_suits)
