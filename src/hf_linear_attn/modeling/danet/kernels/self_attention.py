"""Global attention of an encoder layer with one head, q = x W^T and k = v = x, in training: one step with its own backward.

x has three parts in the output (four products either way), and each hands back a gradient: the products of backward add to the
same (B, T, d) instead of leaving that to passes over memory. K^T V is symmetric, and so is what its gradient does.
"""

import torch

from ...kernels.conditions import (
    dtypes_as_written,
    no_bias,
    on_cuda,
    plain,
    torch_not_asked_for,
    training_only,
    untransformed,
)
from ...kernels.fast_paths import FastPath
from ...kernels.second_derivatives import differentiable_gradients
from ...shared.layer_output import LayerOutput
from .folded import is_one_sum
from .gram import gram, with_transpose


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


def _run(attention, hidden_states, call) -> LayerOutput:
    length, width = hidden_states.shape[1:]
    mode = attention.config.attention_mode
    linear = mode == "linear" or (mode == "auto" and width <= length)
    return LayerOutput(self_attention(attention.dropout(hidden_states), attention.query_proj.weight, linear))


def _suits(attention, hidden_states, call) -> bool:
    return attention.num_heads == 1 and is_one_sum(attention, call)


def _covers(attention, hidden_states, call) -> str | None:
    query_proj = attention.query_proj
    if hidden_states.dtype != getattr(query_proj.weight, "dtype", None):
        return "the queries' weight has another dtype than the input"
    return (
        on_cuda(hidden_states)
        or torch_not_asked_for()
        or training_only()
        or untransformed(hidden_states)
        or dtypes_as_written(hidden_states)
        or plain(query_proj)
        or no_bias(query_proj)
    )


SELF_ATTENTION = FastPath(
    "queries and products as one step of backward",
    run=_run, covers=_covers, suits=_suits, backend="torch", traceable=True,
)  # fmt: skip
