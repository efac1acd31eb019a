"""All of a LEAP block after its projections, in training: mechanism, residual, norm and feed-forward layer as one step.

Kept for backward are the block's input, its projections and the wide inner activation (nine hidden states where the inner one is
four times as wide), or without the last where that is formed again. What the mechanism gives is formed once more, which is a pass
over the projections, and with it the hidden states after it and their norm, inside the norm's own backward.
"""

import torch
import torch.nn.functional as F

from ...kernels.conditions import NextPath
from ...kernels.gelu_linear import gelu_linear, gelu_linear_backward, gelu_linear_covers
from ...kernels.normed_linear import layer_norm_backward, normed_linear, normed_linear_covers
from ...kernels.plain_layers import has_hooks
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.tracing import records_gradients
from ...shared.compat import GELUActivation
from .mechanism import carry_and_state, kernel_formula, leap_backward, leap_forward, leap_forward_again
from .mechanism_path import kernel_covers
from .own_layers import own_layers


def in_training(block, hidden_states, call) -> bool:
    """Whether a backward will come."""
    return records_gradients()


def training_covers(block, hidden_states, call) -> str | None:
    """Why the block cannot run as one step after its projections, or None; after a `NextPath` its layers run one by one."""
    attention, mlp = block.attention, block.mlp
    if (reason := own_layers(attention, mlp)) is not None:
        return reason
    if hidden_states.shape[1] == 1 or call.wants_state or call.state is not None or call.wants_maps:
        return NextPath("a single token, a state, or weights that are to be shown take the layers one by one")
    if attention.rope_theta is not None:
        return NextPath("queries and keys are rotated: the layers run one by one")
    if call.mask is not None and attention.window is not None:
        return NextPath("a windowed layer moves real tokens together where there is padding: the layers run one by one")
    if type(mlp.activation) is not GELUActivation:
        return NextPath(f"its activation is the exact GELU, not {type(mlp.activation).__name__}")
    if any(has_hooks(x) for x in (attention.dropout, mlp.activation, mlp.dropout)):
        return NextPath("a forward hook is registered on a dropout or an activation")
    projected = hidden_states.unflatten(-1, (1, attention.num_heads, attention.head_dim))  # for head size and dtype
    return (
        normed_linear_covers(block.attention_norm, attention.qfkv_proj, attention, hidden_states)
        or kernel_covers(projected, attention.window, exponential=attention.exponential, mask=call.mask)
        or normed_linear_covers(block.mlp_norm, mlp.up_proj, mlp, hidden_states)
        or gelu_linear_covers(mlp.up_proj, mlp.down_proj, hidden_states)
    )


def training_block(block, hidden_states, call) -> torch.Tensor:
    """A `LeapBlock`'s output: norm and projections as one step, everything after them as another."""
    attention, norm, mlp = block.attention, block.mlp_norm, block.mlp
    hidden_states, projected = normed_linear(block.attention_norm, attention.qfkv_proj, hidden_states)
    dropout = attention.dropout.p if attention.training else 0.0
    seed = torch.randint(2**31 - 1, (), device=hidden_states.device) if dropout else None
    hidden_states, added = _Rest.apply(
        hidden_states, projected.unflatten(-1, (4, attention.num_heads, attention.head_dim)), norm.weight, norm.bias,
        mlp.up_proj.weight, mlp.up_proj.bias, mlp.down_proj.weight, mlp.down_proj.bias, seed, call.mask, call.segment_ids,
        attention.window, dropout, norm.eps, block.recomputes_mlp,
    )  # fmt: skip
    return hidden_states + mlp.dropout(added)


class _Rest(torch.autograd.Function):
    """The hidden states h after the mechanism, and `down_proj(gelu(up_proj(mlp_norm(h))))` before its dropout.

    Keeps its input, the projections, and the inner activation unless it `recomputes`.
    """

    @staticmethod
    def forward(
        ctx, x, projected, norm_weight, norm_bias, up, up_bias, down, down_bias, seed, mask, segment_ids, window, dropout,
        eps, recomputes,
    ):  # fmt: skip
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
        if records_gradients():  # create_graph=True: the gradients must have one themselves
            return _through_formula(ctx, dhidden, dout)
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
