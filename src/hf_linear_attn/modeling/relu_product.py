"""ReLU(x M) in one pass: on CUDA the ReLU runs inside the matrix product, where it costs no pass over memory.

For the first product of a ReLU feed-forward layer, whose output is f times as wide as the model: a separate ReLU would read
and write it once more, which takes a third of the product's own time.
"""

import torch

from .backend import prefers_fused


@torch.library.custom_op("hf_linear_attn::relu_product", mutates_args=())
def _relu_product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(*x.shape[:-1], matrix.shape[-1])
    bias = x.new_zeros(matrix.shape[-1])
    # The library's product with an epilogue takes one matrix at a time; rows of a batch with a matrix each are long.
    parts = [(x.flatten(0, -2), matrix, out.flatten(0, -2))] if matrix.dim() == 2 else zip(x, matrix, out)
    for rows, weight, result in parts:
        torch.ops.aten._addmm_activation.out(bias, rows, weight, out=result)
    return out


@_relu_product.register_fake
def _(x, matrix):
    return x.new_empty(*x.shape[:-1], matrix.shape[-1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx, grad):
    x, matrix, out = ctx.saved_tensors
    return product_gradients(torch.ops.aten.threshold_backward(grad, out, 0), x, matrix, ctx.needs_input_grad)


def product_gradients(grad, x, matrix, wanted):
    """Gradients of x and M, where wanted, from that of the product x M."""
    grad_x = grad @ matrix.mT if wanted[0] else None
    if not wanted[1]:
        return grad_x, None
    if matrix.dim() == 2:
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    return grad_x, (grad.mT @ x).mT  # laid out as the weight whose transpose the matrix is


_relu_product.register_autograd(_differentiate, setup_context=_save)


def relu_product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """max(x M, 0) for x (..., n, d) and M (d, f), or x (B, n, d) and M (B, d, f): a matrix for each row of the batch.

    Same dtype as the inputs; equal to `torch.relu(x @ matrix)` and its gradients, to rounding.
    """
    obstacle = torch.is_autocast_enabled(x.device.type) or x.dtype != matrix.dtype
    if not obstacle and prefers_fused(x):
        return _relu_product(x, matrix)
    return torch.relu_(x @ matrix)  # a product needs no output for backward
