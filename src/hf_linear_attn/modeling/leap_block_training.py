"""All of a LEAP block after its projections, in training: mechanism, residual, norm and feed-forward layer as one step.

Kept for backward are the block's input, its projections and the wide inner activation (nine hidden states where the inner one is
four times as wide), or without the last where that is formed again. What the mechanism gives is formed once more, which is a pass
over the projections, and with it the hidden states after it and their norm, inside the norm's own backward.
"""

import torch
import torch.nn.functional as F

from .backend import runs_triton
from .compat import GELUActivation
from .gelu_linear import gelu_linear_obstacle
from .leap_mechanism import kernel_obstacle
from .leap_mechanism_torch import kernel_formula
from .normed_linear import normed_linear_obstacle
from .plain_layers import has_hooks
from .second_derivatives import differentiable_gradients


def leap_block_rest(
    block, hidden_states, projected, attention_mask, cache, return_state, kwargs
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The hidden states h after the mechanism, and `down_proj(gelu(up_proj(mlp_norm(h))))` before its dropout.

    None where the layers must run one by one. `block` is a `LeapBlock`, `projected` (B, T, 4 d) what its projections gave; the
    other arguments are those of its `forward`.
    """
    if not torch.is_grad_enabled() or cache is not None or return_state or hidden_states.shape[1] == 1:
        return None
    if any(kwargs.get(name) not in (None, False) for name in ("output_attentions", "output_focus_weights")) or (
        kwargs.get("state") is not None
    ):
        return None
    attention, norm, mlp = block.attention, block.mlp_norm, block.mlp
    if attention.rope_theta is not None or (attention_mask is not None and attention.window is not None):
        return None  # the layer turns queries and keys, or moves real tokens together, and then runs the kernels itself
    if type(mlp.activation) is not GELUActivation or any(
        has_hooks(x) for x in (attention.dropout, mlp.activation, mlp.dropout)
    ):
        return None
    projected = projected.unflatten(-1, (4, attention.num_heads, attention.head_dim))
    obstacle = kernel_obstacle(projected, attention.window, attention.exponential, attention_mask, None, False)
    obstacle = obstacle or normed_linear_obstacle(norm, mlp.up_proj, mlp, hidden_states)
    obstacle = obstacle or gelu_linear_obstacle(mlp.up_proj, mlp.down_proj, hidden_states)
    if not runs_triton(hidden_states, obstacle):
        return None
    dropout = attention.dropout.p if attention.training else 0.0
    seed = torch.randint(2**31 - 1, (), device=hidden_states.device) if dropout else None
    return _Rest.apply(
        hidden_states, projected, norm.weight, norm.bias, mlp.up_proj.weight, mlp.up_proj.bias, mlp.down_proj.weight,
        mlp.down_proj.bias, seed, attention_mask, kwargs.get("segment_ids"), attention.window, dropout, norm.eps,
        block.recomputes_mlp,
    )  # fmt: skip


class _Rest(torch.autograd.Function):
    """Keeps its input, the projections, and the inner activation unless it `recomputes`."""

    @staticmethod
    def forward(
        ctx, x, projected, norm_weight, norm_bias, up, up_bias, down, down_bias, seed, mask, segment_ids, window, dropout,
        eps, recomputes,
    ):  # fmt: skip
        from .gelu_linear_triton import gelu_linear
        from .leap_mechanism_triton import carry_and_state, leap_forward

        call = window, dropout, seed, mask, segment_ids
        carry, _ = carry_and_state(projected, None, *call)
        mixed = leap_forward(projected, None, None, *carry, *call)
        hidden = x + mixed.flatten(2)
        inner = F.linear(F.layer_norm(hidden, (hidden.shape[-1],), norm_weight, norm_bias, eps), up)
        kept = None if recomputes else inner
        ctx.save_for_backward(
            x, projected, kept, norm_weight, norm_bias, up, up_bias, down, down_bias, *carry, seed, mask, segment_ids
        )
        ctx.arguments = window, dropout, eps
        return hidden, gelu_linear(inner, up_bias, down, down_bias)

    @staticmethod
    def backward(ctx, dhidden, dout):
        if torch.is_grad_enabled():  # create_graph=True: the gradients must have one themselves
            return _through_formula(ctx, dhidden, dout)
        from .gelu_linear_triton import gelu_linear_backward
        from .leap_mechanism_triton import leap_backward, leap_forward_again
        from .normed_linear_triton import layer_norm_backward

        x, projected, inner, norm_weight, norm_bias, up, up_bias, down, _, *carry, seed, mask, segment_ids = (
            ctx.saved_tensors
        )
        window, dropout, eps = ctx.arguments
        call = *carry, window, dropout, seed, mask, segment_ids
        mixed = None
        if inner is None:
            mixed = leap_forward_again(dout, projected, *call)
            hidden = x + mixed.flatten(2)
            inner = F.linear(F.layer_norm(hidden, (hidden.shape[-1],), norm_weight, norm_bias, eps), up)
        dinner, dup_bias, ddown, ddown_bias = gelu_linear_backward(
            inner, up_bias, down, dout, ctx.needs_input_grad[6], ctx.needs_input_grad[7]
        )
        dnormed = dinner @ up
        if mixed is None:  # not before: the wide tensors above are the most that backward holds
            mixed = leap_forward_again(dnormed, projected, *call)
        dx, normed, dnorm = layer_norm_backward(
            x.contiguous(), mixed.flatten(2), dnormed, dhidden, norm_weight, norm_bias, eps
        )
        dup = dinner.flatten(0, -2).mT @ normed.flatten(0, -2) if ctx.needs_input_grad[4] else None
        del inner, dinner, normed
        dprojected = leap_backward(dx.view(mixed.shape), projected, None, None, *call)[0]
        return dx, dprojected, dnorm[0], dnorm[1], dup, dup_bias, ddown, ddown_bias, *[None] * 7


def _through_formula(ctx, dhidden, dout):
    x, projected, _, *weights = ctx.saved_tensors[:9]
    *_, mask, segment_ids = ctx.saved_tensors
    window, dropout, eps = ctx.arguments
    mechanism = kernel_formula(window, dropout, mask, segment_ids)

    def formula(x, projected, norm_weight, norm_bias, up, up_bias, down, down_bias):
        hidden = x + mechanism(projected, None, None).flatten(2)
        normed = F.layer_norm(hidden, (hidden.shape[-1],), norm_weight, norm_bias, eps)
        return hidden, F.linear(F.gelu(F.linear(normed, up, up_bias)), down, down_bias)

    return *differentiable_gradients(formula, (x, projected, *weights), ctx.needs_input_grad, dhidden, dout), *[
        None
    ] * 7
