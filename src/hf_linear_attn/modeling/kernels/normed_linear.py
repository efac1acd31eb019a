"""LayerNorm and the linear layer after it in training, without keeping what the norm gives.

What the linear layer needs for the gradient of its weight is a row that LayerNorm's backward holds anyway: one Triton pass forms
it again, and adds the gradient of the residual stream, and before it what a layer added to the stream, where that was not kept.

Bytes a number in b bytes: 5 b (input and two gradients read, a gradient and the normed row written), 6 b with an update.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .conditions import at_most, dtypes_as_written, one_dtype, plain, unhooked, untransformed
from .dispatch import on_its_device
from .second_derivatives import differentiable_gradients
from .tracing import records_gradients
from .triton_shim import tl, triton

WIDEST_KERNEL_ROW = 8192
# All programs run at once; each takes some rows at a time, NUMBERS features together.
PROGRAMS, NUMBERS, MOST_ROWS = 396, 4096, 16


@triton.jit
def _backward_kernel(
    x_ptr, update_ptr, grad_ptr, stream_ptr, weight_ptr, bias_ptr, dx_ptr, normed_ptr, parts_ptr, eps, rows, width,
    S: tl.constexpr, WIDTH: tl.constexpr, UPDATED: tl.constexpr,
):  # fmt: skip
    """Normed = n weight + bias with n = (x - mean x) / std x.

    With g = grad weight, dx = stream + (g - mean g - n mean (g n)) / std x.
    """
    column = tl.arange(0, WIDTH)
    known = column < width
    weight = tl.load(weight_ptr + column, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=known, other=0.0).to(tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    dbias = tl.zeros((WIDTH,), tl.float32)
    for step in tl.range(tl.program_id(0), tl.cdiv(rows, S), tl.num_programs(0)):
        row = (step * S + tl.arange(0, S)).to(tl.int64)
        place = row[:, None] * width + column[None, :]
        inside = (row[:, None] < rows) & known[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if UPDATED:  # rounded as in forward
            x += tl.load(update_ptr + place, mask=inside, other=0.0).to(tl.float32)
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        stream = tl.load(stream_ptr + place, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
        weighted = grad * weight[None, :]
        rate = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
        mean = tl.sum(weighted, axis=1) / width
        along = tl.sum(weighted * centred, axis=1) / width * rate
        unit = centred * rate[:, None]
        dx = stream + (weighted - mean[:, None] - unit * along[:, None]) * rate[:, None]
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        normed = unit * weight[None, :] + bias[None, :]
        tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=inside)
        dweight += tl.sum(grad * unit, axis=0)
        dbias += tl.sum(grad, axis=0)
    part = parts_ptr + tl.program_id(0) * 2 * width + column
    tl.store(part, dweight, mask=known)
    tl.store(part + width, dbias, mask=known)


@torch.library.custom_op("hf_linear_attn::layer_norm_backward", mutates_args=())
@on_its_device
def layer_norm_backward(
    x: torch.Tensor,
    update: torch.Tensor | None,
    grad: torch.Tensor,
    stream: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of LayerNorm of h = x + update (..., d), all contiguous: dh, the normed rows once more, dweight and dbias (2, d).

    `grad` is the gradient of the normed rows, `stream` one that h has from elsewhere.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    block = max(16, triton.next_power_of_2(width))
    step = max(1, min(MOST_ROWS, NUMBERS // block))
    programs = min(PROGRAMS, triton.cdiv(rows, step))
    dx, normed = torch.empty_like(x), torch.empty_like(x)
    parts = torch.empty(programs, 2, width, device=x.device)
    _backward_kernel[(programs,)](
        x, x if update is None else update, grad.contiguous(), stream.contiguous(), weight, bias, dx, normed, parts, eps,
        rows, width, S=step, WIDTH=block, UPDATED=update is not None, num_warps=max(4, block // 1024),
    )  # fmt: skip
    return dx, normed, parts.sum(0).to(weight.dtype)


@layer_norm_backward.register_fake
def _(x, update, grad, stream, weight, bias, eps):
    return torch.empty_like(x), torch.empty_like(x), weight.new_empty(2, x.shape[-1])


def normed_linear(
    norm: nn.LayerNorm, linear: nn.Linear, x: torch.Tensor, with_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x, linear(norm(x))`, for layers that `normed_linear_covers`. Go on with the returned x.

    Its gradient, the residual stream's, is added in the pass of the norm's own backward. `with_bias=False` leaves the linear
    layer's bias out.
    """
    bias = linear.bias if with_bias else None
    return _NormedLinear.apply(x, norm.weight, norm.bias, linear.weight, bias, norm.eps)


def normed_linear_covers(norm: nn.LayerNorm, linear: nn.Linear, owner: nn.Module, x: torch.Tensor) -> str | None:
    """Why these layers cannot be folded, or None. `owner`: the module that `linear` begins, called without the normed rows."""
    return (
        plain(norm, kind=nn.LayerNorm, bias=True)
        or plain(linear)
        or unhooked(owner)
        or dtypes_as_written(x)
        or untransformed(x)
        or at_most("row", x.shape[-1], WIDEST_KERNEL_ROW)
        or one_dtype(x, norm.weight, linear.weight)
    )


def _formula(x, norm_weight, norm_bias, weight, bias, eps):
    normed = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, eps)
    return x.view_as(x), F.linear(normed, weight, bias)


class _NormedLinear(torch.autograd.Function):
    """Keeps x alone; its output x is the input itself."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps):
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
        ctx.eps = eps
        return _formula(x, norm_weight, norm_bias, weight, bias, eps)

    @staticmethod
    def backward(ctx, dstream, dout):
        *inputs, bias = ctx.saved_tensors
        if records_gradients():  # create_graph=True: the gradients must have one themselves
            formula = partial(_formula, eps=ctx.eps)
            return *differentiable_gradients(formula, (*inputs, bias), ctx.needs_input_grad, dstream, dout), None
        x, norm_weight, norm_bias, weight = inputs
        dx, normed, dnorm = layer_norm_backward(
            x.contiguous(), None, dout @ weight, dstream, norm_weight, norm_bias, ctx.eps
        )
        rows = dout.flatten(0, -2)
        dweight = rows.mT @ normed.flatten(0, -2) if ctx.needs_input_grad[3] else None
        return dx, dnorm[0], dnorm[1], dweight, rows.sum(0) if ctx.needs_input_grad[4] else None, None
