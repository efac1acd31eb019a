"""LayerNorm of many narrow rows, as SEA's estimator has them, in Triton: one pass forward, one backward.

PyTorch's CUDA kernel gives each row a block of threads, which rows of 16 to 128 numbers leave mostly idle. Here a program holds
thousands of numbers of many rows.
"""

import torch

from ...kernels.dispatch import on_its_device
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.triton_shim import tl, triton

NUMBERS = 4096  # numbers of a tile


@triton.jit
def _tile(x_ptr, row, feature, rows, WIDTH: tl.constexpr):
    """Rows (R, WP) in float32, 0 outside, and where they are inside."""
    inside = (row[:, None] < rows) & (feature[None, :] < WIDTH)
    return tl.load(x_ptr + row[:, None] * WIDTH + feature[None, :], mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _normed(x, inside, eps, WIDTH: tl.constexpr):
    """Rows without mean and with variance 1, and the factor that this took (R,)."""
    centred = tl.where(inside, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
    return centred * factor[:, None], factor


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, eps, rows, WIDTH: tl.constexpr, WP: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    row, feature = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, WP)
    x, inside = _tile(x_ptr, row, feature, rows, WIDTH)
    normed, _ = _normed(x, inside, eps, WIDTH)
    weight = tl.load(weight_ptr + feature, mask=feature < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + feature, mask=feature < WIDTH, other=0.0).to(tl.float32)
    out = normed * weight[None, :] + bias[None, :]
    tl.store(out_ptr + row[:, None] * WIDTH + feature[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, grad_ptr, dx_ptr, dweight_ptr, dbias_ptr, eps, rows,
    WIDTH: tl.constexpr, WP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows, and what this tile adds to those of weight and bias, (tiles, WP) float32."""
    tile = tl.program_id(0).to(tl.int64)
    row, feature = tile * R + tl.arange(0, R), tl.arange(0, WP)
    x, inside = _tile(x_ptr, row, feature, rows, WIDTH)
    grad, _ = _tile(grad_ptr, row, feature, rows, WIDTH)
    normed, factor = _normed(x, inside, eps, WIDTH)
    weight = tl.load(weight_ptr + feature, mask=feature < WIDTH, other=0.0).to(tl.float32)
    weighted = grad * weight[None, :]
    mean, along = tl.sum(weighted, axis=1) / WIDTH, tl.sum(weighted * normed, axis=1) / WIDTH
    dx = (weighted - mean[:, None] - normed * along[:, None]) * factor[:, None]
    tl.store(dx_ptr + row[:, None] * WIDTH + feature[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + tile * WP + feature, tl.sum(grad * normed, axis=0))
    tl.store(dbias_ptr + tile * WP + feature, tl.sum(grad, axis=0))


def _sizes(x):
    width = x.shape[-1]
    padded = triton.next_power_of_2(width)
    rows, each = x.numel() // width, max(1, NUMBERS // padded)
    return rows, (triton.cdiv(rows, each),), {"WIDTH": width, "WP": padded, "R": each, "num_warps": 4}


@torch.library.custom_op("hf_linear_attn::narrow_norm", mutates_args=())
@on_its_device
def _narrow_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    rows, grid, options = _sizes(x)
    _forward_kernel[grid](x, weight, bias, out, eps, rows, **options)
    return out


@_narrow_norm.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(x)


@torch.library.custom_op("hf_linear_attn::narrow_norm_backward", mutates_args=())
@on_its_device
def _narrow_norm_backward(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x)
    rows, grid, options = _sizes(x)
    dweight, dbias = torch.empty(2, grid[0], options["WP"], device=x.device).unbind()
    _backward_kernel[grid](x, weight, grad.contiguous(), dx, dweight, dbias, eps, rows, **options)
    width = x.shape[-1]
    return dx, dweight.sum(0)[:width].to(weight.dtype), dbias.sum(0)[:width].to(weight.dtype)


@_narrow_norm_backward.register_fake
def _(x, weight, grad, eps):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradients must have one themselves

        def formula(x, weight, bias):
            return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, ctx.eps)

        return *differentiable_gradients(formula, (x, weight, bias), ctx.needs_input_grad, grad), None
    return *_narrow_norm_backward(x, weight, grad, ctx.eps), None


_narrow_norm.register_autograd(_differentiate, setup_context=_save)


def narrow_norm(x, weight, bias, eps):
    """LayerNorm of the rows of x (..., width); sums in float32."""
    return _narrow_norm(x.contiguous(), weight, bias, eps)
