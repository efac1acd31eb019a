"""Global attention of an encoder layer with one head, q = x W^T and k = v = x, in training: one step with its own backward.

x has three parts in the output (four products either way), and each hands back a gradient: the products of backward add to the
same (B, T, d) instead of leaving that to passes over memory. K^T V is symmetric, and so is what its gradient does.
"""

import torch

from .backend import prefers_fused
from .compat import is_transformed
from .gram import gram, with_transpose
from .second_derivatives import differentiable_gradients


def can_fuse_self_attention(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `self_attention` is a gain for x (B, T, d) and W (d, d)."""
    if not torch.is_grad_enabled() or not prefers_fused(x) or is_transformed(x):
        return False
    return not torch.is_autocast_enabled(x.device.type) and x.dtype == weight.dtype


def self_attention(x: torch.Tensor, weight: torch.Tensor, linear: bool) -> torch.Tensor:
    """(x W^T) (x^T x) for x (B, T, d), or with `linear=False` ((x W^T) x^T) x."""
    return (_Linear if linear else _Quadratic).apply(x, weight)


def _formula(x, weight):
    return (x @ weight.t()) @ (x.mT @ x)


class _Linear(torch.autograd.Function):
    """Q (X^T X): 4 T d^2 operations a row besides the queries."""

    @staticmethod
    def forward(ctx, x, weight):
        query, memory = x @ weight.t(), gram(x[:, None])[:, 0]
        ctx.save_for_backward(x, weight, query, memory)
        return query @ memory

    @staticmethod
    def backward(ctx, grad):
        x, weight, query, memory = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must have one itself
            return differentiable_gradients(_formula, (x, weight), ctx.needs_input_grad, grad)
        dquery = grad @ memory  # which is its own transpose
        dx = (dquery @ weight).baddbmm_(x, with_transpose(query.mT @ grad))
        return dx, dquery.flatten(0, 1).mT @ x.flatten(0, 1)


class _Quadratic(torch.autograd.Function):
    """(Q X^T) X: 4 T^2 d operations a row besides the queries."""

    @staticmethod
    def forward(ctx, x, weight):
        query = x @ weight.t()
        scores = query @ x.mT
        ctx.save_for_backward(x, weight, query, scores)
        return scores @ x

    @staticmethod
    def backward(ctx, grad):
        x, weight, query, scores = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must have one itself
            return differentiable_gradients(_formula, (x, weight), ctx.needs_input_grad, grad)
        dscores = grad @ x.mT
        dquery = dscores @ x
        dx = (dquery @ weight).baddbmm_(scores.mT, grad).baddbmm_(dscores.mT, query)
        return dx, dquery.flatten(0, 1).mT @ x.flatten(0, 1)
