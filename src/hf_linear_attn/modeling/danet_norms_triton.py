"""Triton kernels of MaxNorm with what stands around it in a DANet block, one pass forward and one backward.

    out = r + y s / (max |y| + eps)         s: a number a row (scale, 0 for padding), r: the residual; both optional

A program does one row. Bytes: forward reads y and r and writes out; backward reads y and the gradient and writes that of y
(the residual's is the gradient itself). The end of a block and the beginning of the next are one pass, too (`between_blocks`).
Sums and factors are float32. Equal maxima share the gradient, as in PyTorch's spelling.
Source: DANet specification, section 2.
"""

from functools import partial

import torch

try:  # inside `try`, since loading a checkpoint's own code demands every other import, also where there is no GPU
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError("the GPU kernels need the package triton: pip install triton") from error

from .backend import early_options, on_its_device
from .second_derivatives import differentiable_gradients


@triton.jit
def _forward_kernel(
    y_ptr, scale_ptr, residual_ptr, out_ptr, eps, width,
    WIDTH: tl.constexpr, SCALED: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, WIDTH)
    inside = features < width
    place = row * width + features
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / (tl.max(tl.abs(y), axis=0) + eps)
    if SCALED:
        factor *= tl.load(scale_ptr + row)
    out = y * factor
    if ADDS:
        out += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _taken(y, size, share, inside):
    """What the largest entries of a row take off the gradient: sign(y) `share` at |y| = `size`, split among equal ones."""
    # Half to each sign where both occur, and evenly within a sign.
    highest, lowest = (inside & (y == size)).to(tl.float32), (inside & (-y == size)).to(tl.float32)
    number_high, number_low = tl.sum(highest, axis=0), tl.sum(lowest, axis=0)
    share = tl.where((number_high > 0) & (number_low > 0), 0.5 * share, share)
    return highest * (share / tl.maximum(number_high, 1.0)) - lowest * (share / tl.maximum(number_low, 1.0))


@triton.jit
def _backward_kernel(
    y_ptr, scale_ptr, grad_ptr, dy_ptr, eps, width, WIDTH: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """Dy = s g / (M + eps) - [|y| = M] sign(y) s <g, y> / (M + eps)^2, split among the entries of size M = max |y|."""
    row = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, WIDTH)
    inside = features < width
    place = row * width + features
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    size = tl.max(tl.abs(y), axis=0)
    factor = 1.0 / (size + eps)
    grad -= _taken(y, size, tl.sum(grad * y, axis=0) * factor, inside)
    if SCALED:
        factor *= tl.load(scale_ptr + row)
    tl.store(dy_ptr + place, (factor * grad).to(dy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _between_blocks_kernel(
    y_ptr, stream_ptr, factor_ptr, keep_ptr, scale_ptr, normed_ptr, out_ptr, eps, next_eps, width,
    WIDTH: tl.constexpr, LAZY_IN: tl.constexpr, LAZY_OUT: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """H += keep Norm(y), then x = scale Norm(h). A lazy stream holds x and h / x, one number a row, instead of h."""
    if EARLY:  # see `step_linear_triton`
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
    grad = rate * (grad - _taken(h, size, share, inside))
    grad += tl.load(dstream_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dh_ptr + place, grad.to(dh_ptr.dtype.element_ty), mask=inside)
    size = tl.max(tl.abs(y), axis=0)
    factor = 1.0 / (size + eps)
    grad -= _taken(y, size, tl.sum(grad * y, axis=0) * factor, inside)
    if MASKED:
        factor *= tl.load(keep_ptr + row)
    tl.store(dy_ptr + place, (factor * grad).to(dy_ptr.dtype.element_ty), mask=inside)


def _sizes(y):
    width = y.shape[-1]
    block = triton.next_power_of_2(width)
    return (y.numel() // width,), width, {"WIDTH": block, "num_warps": max(1, min(16, block // 256))}


@torch.library.custom_op("hf_linear_attn::max_norm", mutates_args=())
@on_its_device
def _max_norm(
    y: torch.Tensor, row_scale: torch.Tensor | None, residual: torch.Tensor | None, eps: float
) -> torch.Tensor:
    grid, width, options = _sizes(y)
    out = torch.empty_like(y)
    _forward_kernel[grid](
        y, y if row_scale is None else row_scale, y if residual is None else residual, out, eps, width,
        SCALED=row_scale is not None, ADDS=residual is not None, **options,
    )  # fmt: skip
    return out


@_max_norm.register_fake
def _(y, row_scale, residual, eps):
    return torch.empty_like(y)


@torch.library.custom_op("hf_linear_attn::max_norm_backward", mutates_args=())
@on_its_device
def _max_norm_backward(y: torch.Tensor, row_scale: torch.Tensor | None, grad: torch.Tensor, eps: float) -> torch.Tensor:
    grid, width, options = _sizes(y)
    dy = torch.empty_like(y)
    _backward_kernel[grid](
        y, y if row_scale is None else row_scale, grad.contiguous(), dy, eps, width,
        SCALED=row_scale is not None, **options,
    )  # fmt: skip
    return dy


@_max_norm_backward.register_fake
def _(y, row_scale, grad, eps):
    return torch.empty_like(y)


def _save(ctx, inputs, output):
    y, row_scale, residual, ctx.eps = inputs
    ctx.save_for_backward(y, row_scale)
    ctx.adds = residual is not None


def _differentiate(ctx, grad):
    y, row_scale = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient must have one itself
        formula = partial(_max_norm_formula, row_scale=row_scale, eps=ctx.eps)
        dy = differentiable_gradients(formula, (y,), ctx.needs_input_grad, grad)[0]
        return dy, None, grad if ctx.adds else None, None
    return _max_norm_backward(y, row_scale, grad, ctx.eps), None, grad if ctx.adds else None, None


def _max_norm_formula(y, row_scale, eps):
    wide = y.float()
    size = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    out = wide / (size + eps)
    return (out if row_scale is None else out * row_scale).to(y.dtype)


_max_norm.register_autograd(_differentiate, setup_context=_save)


def row_numbers(numbers: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor | None:
    """A number for each row of y (..., d) as the kernels read them, from what broadcasts to (..., 1)."""
    return None if numbers is None else numbers.expand(*y.shape[:-1], 1).to(torch.float32).contiguous()


def max_norm_kernel(y, row_scale, residual, eps):
    """MaxNorm of the rows of `y` (..., d), times `row_scale` (broadcast to (..., 1); no gradient), plus `residual`."""
    row_scale = row_numbers(row_scale, y)
    return _max_norm(y.contiguous(), row_scale, None if residual is None else residual.contiguous(), eps)


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
    decodes = y.shape[1] == 1 and not torch.is_grad_enabled()
    normed, stream, *factors = _BetweenBlocks.apply(
        y.contiguous(), stream.contiguous(), factor, keep, scale, eps, next_eps, lazy, decodes
    )
    return normed, stream, *(factors or [None])


class _BetweenBlocks(torch.autograd.Function):
    """Keeps y and x (or h, where x and h are stored both)."""

    @staticmethod
    @on_its_device
    def forward(ctx, y, stream, factor, keep, scale, eps, next_eps, lazy, decodes):
        grid, width, options = _sizes(y)
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
            return *differentiable_gradients(formula, (y, before[0]), ctx.needs_input_grad, dnormed, dstream), *[
                None
            ] * 7
        grid, width, options = _sizes(y)
        dy, dh = torch.empty_like(y), torch.empty_like(y)
        _between_blocks_backward_kernel[grid](
            y, stream, *(y if x is None else x for x in (factor, keep, scale)), dnormed.contiguous(),
            dstream.contiguous(), dy, dh, *ctx.arguments, width,
            LAZY=factor is not None, MASKED=keep is not None, SCALED=scale is not None, **options,
        )  # fmt: skip
        return dy, dh, *[None] * 7


def _between_blocks_formula(y, stream, factor, keep, scale, eps):
    hidden = leave_stream(stream, factor) + _max_norm_formula(y, keep, eps[0])
    return _max_norm_formula(hidden, scale, eps[1]), hidden


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
