"""GELU(x + bias) and the linear layer after it in training: Triton kernels for the passes over the wide activation.

The activation is four times as wide as the model, and is not kept: it is formed again in backward, in the pass that reads its
input for the derivative anyway, and the gradient of the first bias is summed there, too.

In half precision the error function is a polynomial (Abramowitz and Stegun, 7.1.26: off by at most 1.5e-7), since a GPU would
wait for the library's longer than for the memory; its exponential is that of the derivative, too.

Bytes a number in b bytes: forward 2 b, backward 4 b (the input and the gradient read, their gradient and the activation written).
"""

import torch
from torch import nn

from .conditions import dtypes_as_written, one_dtype, plain, untransformed
from .dispatch import on_its_device
from .second_derivatives import differentiable_gradients
from .triton_shim import tl, triton

# A program goes through its rows in steps that registers hold; backward asks for its inputs some steps ahead.
ROWS, STEP, COLUMNS = 64, 2, 512
FORWARD_STAGES, BACKWARD_STAGES = 1, 4


@triton.jit
def _normal(x, EXACT: tl.constexpr):
    """The standard normal distribution at x and its density."""
    density = tl.exp(-0.5 * x * x)
    if EXACT:
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
        tail = 1.061405429 * t - 1.453152027
        tail = ((tail * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
        tail = 0.5 * tail * t * density
        below = tl.where(x < 0, tail, 1.0 - tail)
    return below, density * 0.3989422804014327


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, out_ptr, rows, columns,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * C + tl.arange(0, C)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    for step in tl.range(R // S, num_stages=STAGES):
        row = tl.program_id(0).to(tl.int64) * R + step * S + tl.arange(0, S)
        place = row[:, None] * columns + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        below, _ = _normal(x, EXACT)
        tl.store(out_ptr + place, (x * below).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, bias_ptr, grad_ptr, out_ptr, dbias_ptr, rows, columns,
    R: tl.constexpr, S: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradient of x in the place of the activation's, the activation once more, and a part of the bias's gradient."""
    column = tl.program_id(1) * C + tl.arange(0, C)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    total = tl.zeros((S, C), tl.float32)
    for step in tl.range(R // S, num_stages=STAGES):
        row = tl.program_id(0).to(tl.int64) * R + step * S + tl.arange(0, S)
        place = row[:, None] * columns + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        below, density = _normal(x, EXACT)
        dx = grad * (below + x * density)
        tl.store(grad_ptr + place, dx.to(grad_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + place, (x * below).to(out_ptr.dtype.element_ty), mask=inside)
        total += tl.where(inside, dx, 0.0)
    tl.store(dbias_ptr + tl.program_id(0) * columns + column, tl.sum(total, axis=0), mask=column < columns)


def _sizes(x, stages):
    columns = x.shape[-1]
    rows = x.numel() // columns
    grid = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    flags = {"R": ROWS, "S": STEP, "C": COLUMNS, "STAGES": stages, "EXACT": x.dtype == torch.float32, "num_warps": 4}
    return grid, rows, columns, flags


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU(x + bias) for contiguous x (..., n); no gradient."""
    out = torch.empty_like(x)
    grid, rows, columns, flags = _sizes(x, FORWARD_STAGES)
    _forward_kernel[grid](x, bias, out, rows, columns, **flags)
    return out


@torch.library.custom_op("hf_linear_attn::bias_gelu_backward", mutates_args=("grad",))
@on_its_device
def bias_gelu_backward(x: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias's gradient and GELU(x + bias); the gradient of x takes the place of `grad`, all contiguous."""
    out = torch.empty_like(x)
    grid, rows, columns, flags = _sizes(x, BACKWARD_STAGES)
    dbias = torch.empty(grid[0], columns, device=x.device)
    _backward_kernel[grid](x, bias, grad, out, dbias, rows, columns, **flags)
    return dbias.sum(0).to(bias.dtype), out


@bias_gelu_backward.register_fake
def _(x, bias, grad):
    return torch.empty_like(bias), torch.empty_like(x)


@torch.library.custom_op("hf_linear_attn::gelu_linear", mutates_args=())
@on_its_device
def _gelu_linear(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, last_bias: torch.Tensor | None
) -> torch.Tensor:
    return torch.nn.functional.linear(bias_gelu(x, bias), weight, last_bias)


@_gelu_linear.register_fake
def _(x, bias, weight, last_bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output):
    x, bias, weight, last_bias = inputs
    ctx.save_for_backward(x, bias, weight, last_bias)


def gelu_linear_backward(x, bias, weight, grad, wants_weight, wants_last_bias):
    """Gradients of the arguments of `gelu_linear`; those that are not wanted are None."""
    dx = grad @ weight
    dbias, activation = bias_gelu_backward(x, bias, dx)
    rows = grad.flatten(0, -2)
    dweight = rows.mT @ activation.flatten(0, -2) if wants_weight else None
    return dx, dbias, dweight, rows.sum(0) if wants_last_bias else None


def _differentiate(ctx, grad):
    *inputs, last_bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradients must have one themselves
        return differentiable_gradients(_formula, (*inputs, last_bias), ctx.needs_input_grad, grad)
    return gelu_linear_backward(*inputs, grad, ctx.needs_input_grad[2], last_bias is not None)


def _formula(x, bias, weight, last_bias):
    return torch.nn.functional.linear(torch.nn.functional.gelu(x + bias), weight, last_bias)


_gelu_linear.register_autograd(_differentiate, setup_context=_save)


def gelu_linear(x, bias, weight, last_bias):
    """`linear(gelu(x + bias), weight, last_bias)` for x (..., n); keeps x alone."""
    return _gelu_linear(x.contiguous(), bias, weight, last_bias)


def gelu_linear_covers(up: nn.Linear, down: nn.Linear, x: torch.Tensor) -> str | None:
    """Why `gelu_linear` cannot stand for `down(gelu(up(x)))`, or None."""
    reason = plain(up, bias=True) or plain(down) or dtypes_as_written(x) or untransformed(x)
    return reason or one_dtype(x, up.weight, down.weight)
