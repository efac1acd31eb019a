"""MaxNorm with what stands around it in a DANet block as Triton kernels, one pass forward and one backward.

    out = r + y s / (max |y| + eps)         s: a number a row (scale, 0 for padding), r: the residual; both optional

A program does one row. Bytes: forward reads y and r and writes out; backward reads y and the gradient and writes that of y
(the residual's is the gradient itself). Sums and factors are float32. Equal maxima share the gradient, as in PyTorch.
Source: DANet specification, section 2.
"""

from functools import partial

import torch

from ...kernels.conditions import at_most, one_dtype
from ...kernels.dispatch import on_its_device
from ...kernels.fast_paths import FastPath
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.triton_shim import tl, triton

WIDEST_ROW = 16384


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
def taken(y, size, share, inside):
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
    grad -= taken(y, size, tl.sum(grad * y, axis=0) * factor, inside)
    if SCALED:
        factor *= tl.load(scale_ptr + row)
    tl.store(dy_ptr + place, (factor * grad).to(dy_ptr.dtype.element_ty), mask=inside)


def launch_sizes(y):
    width = y.shape[-1]
    block = triton.next_power_of_2(width)
    return (y.numel() // width,), width, {"WIDTH": block, "num_warps": max(1, min(16, block // 256))}


@torch.library.custom_op("hf_linear_attn::max_norm", mutates_args=())
@on_its_device
def _max_norm(
    y: torch.Tensor, row_scale: torch.Tensor | None, residual: torch.Tensor | None, eps: float
) -> torch.Tensor:
    grid, width, options = launch_sizes(y)
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
    grid, width, options = launch_sizes(y)
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
        formula = partial(max_norm_formula, row_scale=row_scale, eps=ctx.eps)
        dy = differentiable_gradients(formula, (y,), ctx.needs_input_grad, grad)[0]
        return dy, None, grad if ctx.adds else None, None
    return _max_norm_backward(y, row_scale, grad, ctx.eps), None, grad if ctx.adds else None, None


def max_norm_formula(y, row_scale, eps):
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


def _run(norm, hidden_states, row_scale=None, residual=None) -> torch.Tensor:
    return max_norm_kernel(hidden_states, row_scale, residual, norm.eps)


def _suits(norm, hidden_states, row_scale=None, residual=None) -> bool:
    return norm.scale is None and not norm.mean


def kernel_reason(hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    """Why the kernels cannot take rows like these, or None."""
    tensors = (hidden_states,) if residual is None else (hidden_states, residual)
    return one_dtype(*tensors) or at_most("row", hidden_states.shape[-1], WIDEST_ROW)


def _covers(norm, hidden_states, row_scale=None, residual=None) -> str | None:
    return kernel_reason(hidden_states, residual)


MAX_NORM = FastPath("scale, norm and residual sum in one pass", run=_run, covers=_covers, suits=_suits)
