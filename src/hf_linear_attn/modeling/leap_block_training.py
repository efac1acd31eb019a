"""The middle of a LEAP block in training: mechanism, residual, norm and the first feed-forward product as one step.

Kept for backward are the block's input and its projections alone. What the mechanism gives is formed once more, which is a pass
over the projections, and with it the hidden states after it and their norm, inside the norm's own backward.
"""

import torch
import torch.nn.functional as F

from .backend import runs_triton
from .leap_mechanism import kernel_obstacle
from .normed_linear import normed_linear_obstacle
from .plain_linear import has_hooks


def leap_block_middle(
    block, hidden_states, projected, attention_mask, past_key_values, return_state, kwargs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """With h the hidden states after the mechanism: `h, h, up_proj(mlp_norm(h))` without the bias, as `normed_linear`.

    None where the layers must run one by one. `block` is a `LeapBlock`, `projected` (B, T, 4 d) what its projections gave; the
    other arguments are those of its `forward`.
    """
    if not torch.is_grad_enabled() or past_key_values is not None or return_state or hidden_states.shape[1] == 1:
        return None
    if any(kwargs.get(name) not in (None, False) for name in ("output_attentions", "output_focus_weights")) or (
        kwargs.get("state") is not None
    ):
        return None
    attention, mlp = block.attention, block.mlp
    if attention.rope_theta is not None or (attention_mask is not None and attention.window is not None):
        return None  # the layer turns queries and keys, or moves real tokens together, and then runs the kernels itself
    if has_hooks(attention.dropout):
        return None
    projected = projected.unflatten(-1, (4, attention.num_heads, attention.head_dim))
    obstacle = kernel_obstacle(projected, attention.window, attention.exponential, attention_mask, None, False)
    obstacle = obstacle or normed_linear_obstacle(block.mlp_norm, mlp.up_proj, mlp, hidden_states)
    if not runs_triton(hidden_states, obstacle):
        return None
    dropout = attention.dropout.p if attention.training else 0.0
    seed = torch.randint(2**31 - 1, (), device=hidden_states.device) if dropout else None
    hidden_states, inner = _Middle.apply(
        hidden_states, projected, block.mlp_norm.weight, block.mlp_norm.bias, mlp.up_proj.weight,
        seed, attention_mask, kwargs.get("segment_ids"), attention.window, dropout, block.mlp_norm.eps,
    )  # fmt: skip
    return hidden_states, hidden_states, inner


class _Middle(torch.autograd.Function):
    """Keeps its input and the projections."""

    @staticmethod
    def forward(ctx, x, projected, norm_weight, norm_bias, weight, seed, mask, segment_ids, window, dropout, eps):
        from .leap_mechanism_triton import leap_forward

        ctx.save_for_backward(x, projected, norm_weight, norm_bias, weight, seed, mask, segment_ids)
        ctx.arguments = window, dropout, eps
        mixed = leap_forward(projected, None, None, window, dropout, seed, mask, segment_ids, None, None)[0]
        hidden = x + mixed.flatten(2)
        return hidden, F.linear(F.layer_norm(hidden, (hidden.shape[-1],), norm_weight, norm_bias, eps), weight)

    @staticmethod
    def backward(ctx, dhidden, dout):
        from .leap_mechanism_triton import leap_backward, leap_forward_again
        from .normed_linear_triton import layer_norm_backward

        x, projected, norm_weight, norm_bias, weight, seed, mask, segment_ids = ctx.saved_tensors
        window, dropout, eps = ctx.arguments
        mixed = leap_forward_again(dout, projected, window, dropout, seed, mask, segment_ids)
        dx, normed, dnorm = layer_norm_backward(
            x.contiguous(), mixed.flatten(2), dout @ weight, dhidden, norm_weight, norm_bias, eps
        )
        grad = dx.view(mixed.shape)
        dprojected = leap_backward(grad, projected, None, None, window, dropout, seed, mask, segment_ids)[0]
        dweight = dout.flatten(0, -2).mT @ normed.flatten(0, -2) if ctx.needs_input_grad[4] else None
        return dx, dprojected, dnorm[0], dnorm[1], dweight, *[None] * 6
