"""LayerNorm and the linear layer after it in training, without keeping what the norm gives."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .backend import runs_triton
from .compat import is_transformed
from .plain_layers import has_hooks, is_plain
from .second_derivatives import differentiable_gradients

WIDEST_KERNEL_ROW = 8192


def normed_linear(
    norm: nn.Module, linear: nn.Module | None, owner: nn.Module, x: torch.Tensor, with_bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`norm(x), x, None`; or, where the kernel runs, `x, x, linear(norm(x))`. Go on with the second x.

    The normed rows, which the gradient of the layer's weight needs, are formed again in backward, in the pass of the norm's own
    backward. That pass also adds the gradient of the returned x, the residual stream's. `owner` is the module that `linear` is
    the first layer of (None: not known), and that is then called without `norm(x)`; `with_bias=False` leaves the layer's bias to
    it.
    """
    if not torch.is_grad_enabled() or not runs_triton(x, normed_linear_obstacle(norm, linear, owner, x)):
        return norm(x), x, None
    bias = linear.bias if with_bias else None
    x, out = _NormedLinear.apply(x, norm.weight, norm.bias, linear.weight, bias, norm.eps)
    return x, x, out


def normed_linear_obstacle(norm, linear, owner, x) -> str | None:
    """Why the kernel cannot do these layers, or None."""
    if not is_plain(norm, nn.LayerNorm) or norm.bias is None or not is_plain(linear):
        return "a layer is more than its weight and bias"
    if has_hooks(owner):
        return "somebody waits for the normed rows"
    if torch.is_autocast_enabled(x.device.type) or is_transformed(x):
        return "it neither converts nor knows function transforms"
    if x.shape[-1] > WIDEST_KERNEL_ROW:
        return f"its rows end at {WIDEST_KERNEL_ROW} features, these have {x.shape[-1]}"
    dtypes = {x.dtype, norm.weight.dtype, linear.weight.dtype}
    if len(dtypes) > 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16 throughout, not {dtypes}"
    return None


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
        if torch.is_grad_enabled():  # create_graph=True: the gradients must have one themselves
            formula = partial(_formula, eps=ctx.eps)
            return *differentiable_gradients(formula, (*inputs, bias), ctx.needs_input_grad, dstream, dout), None
        from .normed_linear_triton import layer_norm_backward

        x, norm_weight, norm_bias, weight = inputs
        dx, normed, dnorm = layer_norm_backward(
            x.contiguous(), None, dout @ weight, dstream, norm_weight, norm_bias, ctx.eps
        )
        rows = dout.flatten(0, -2)
        dweight = rows.mT @ normed.flatten(0, -2) if ctx.needs_input_grad[3] else None
        return dx, dnorm[0], dnorm[1], dweight, rows.sum(0) if ctx.needs_input_grad[4] else None, None
