"""The feed-forward layer down(ReLU(x M)) in training as one step: the gradient in front of the ReLU is made by one product."""

import torch
import torch.nn.functional as F
from torch import nn

from .backend import prefers_fused, runs_triton
from .compat import is_transformed
from .plain_layers import is_plain
from .relu_product import product_gradients, relu_product
from .second_derivatives import differentiable_gradients

FEWEST_ROWS = 4096  # with fewer there are too few tiles for all processors


def relu_feed_forward(x: torch.Tensor, matrix: torch.Tensor, down: nn.Module) -> torch.Tensor:
    """`down(relu_product(x, matrix))`; arguments as there."""
    fits = torch.is_grad_enabled() and is_plain(down) and down.bias is None and not is_transformed(x)
    if not fits or not prefers_fused(x) or torch.is_autocast_enabled(x.device.type) or down.weight.dtype != x.dtype:
        return down(relu_product(x, matrix))
    return _ReluFeedForward.apply(x, matrix, down.weight)


def _formula(x, matrix, down):
    return F.linear(torch.relu(x @ matrix), down)


class _ReluFeedForward(torch.autograd.Function):
    """Keeps its input and the wide activation."""

    @staticmethod
    def forward(ctx, x, matrix, down):
        inner = relu_product(x, matrix)
        ctx.save_for_backward(x, matrix, down, inner)
        return F.linear(inner, down)

    @staticmethod
    def backward(ctx, grad):
        x, matrix, down, inner = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must have one itself
            return differentiable_gradients(_formula, (x, matrix, down), ctx.needs_input_grad, grad)
        rows, wide = grad.flatten(0, -2), inner.flatten(0, -2)
        ddown = rows.mT @ wide if ctx.needs_input_grad[2] else None
        dinner = masked_product(rows, down, wide).view(inner.shape)
        return *product_gradients(dinner, x, matrix, ctx.needs_input_grad), ddown


def masked_product(grad: torch.Tensor, weight: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """G W (M, N) where `active` (M, N) is positive, 0 elsewhere."""
    if _is_faster(grad, weight) and runs_triton(grad, None):
        from .masked_product_triton import masked_product_kernel

        return masked_product_kernel(grad.contiguous(), weight.contiguous(), active.contiguous())
    return torch.ops.aten.threshold_backward(grad @ weight, active, 0)


def _is_faster(grad, weight) -> bool:
    """Whether the kernel takes this product, and the GPU has what it lives on (Hopper's tensor memory accelerator)."""
    half = grad.dtype in (torch.bfloat16, torch.float16)
    whole_tiles = weight.shape[0] % 64 == 0 and weight.shape[1] % 256 == 0
    if torch.compiler.is_compiling() or not half or not whole_tiles or grad.shape[0] < FEWEST_ROWS:
        return False
    return not grad.is_cuda or torch.cuda.get_device_capability(grad.device) >= (9, 0)
