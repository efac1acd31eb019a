"""A LEAP block in training, its layers one by one: a norm folded into the projection after it, GELU as one step.

Adapters, hooks and quantized layers leave one half of a block plain; then the other half is folded alone.
"""

from torch import nn

from ...kernels.fast_paths import FastPath
from ...kernels.gelu_linear import gelu_linear, gelu_linear_covers
from ...kernels.normed_linear import normed_linear, normed_linear_covers
from ...kernels.plain_layers import has_hooks
from ...kernels.tracing import records_gradients
from ...shared.compat import GELUActivation
from .own_layers import own_layers


def has_gelu(mlp, hidden_states) -> bool:
    """Whether a feed-forward layer has the exact GELU, and a backward will come."""
    return records_gradients() and type(mlp.activation) is GELUActivation and not has_hooks(mlp.activation)


def gelu_covers(mlp, hidden_states) -> str | None:
    """Why GELU and the product after it cannot be one step, or None."""
    return gelu_linear_covers(mlp.up_proj, mlp.down_proj, hidden_states)


def gelu_feed_forward(mlp, hidden_states):
    """A `LeapMLP` on (B, T, d), which keeps the first product and not its GELU."""
    return _after_first(mlp, nn.functional.linear(hidden_states, mlp.up_proj.weight))


def _after_first(mlp, inner):
    """The feed-forward layer from its first product (B, T, I), without bias, on."""
    return mlp.dropout(gelu_linear(inner, mlp.up_proj.bias, mlp.down_proj.weight, mlp.down_proj.bias))


GELU = FastPath("GELU and the product after it as one step", gelu_feed_forward, gelu_covers, has_gelu, traceable=True)


def first_half_covers(block, hidden_states, call) -> str | None:
    """Why the first norm cannot be folded into the mechanism's projections, or None."""
    attention = block.attention
    return own_layers(attention) or normed_linear_covers(
        block.attention_norm, attention.qfkv_proj, attention, hidden_states
    )


def second_half_covers(block, hidden_states, call) -> str | None:
    """Why the second norm cannot be folded into the feed-forward layer, or None."""
    mlp = block.mlp
    return own_layers(mlp) or normed_linear_covers(block.mlp_norm, mlp.up_proj, mlp, hidden_states)


def both_halves_cover(block, hidden_states, call) -> str | None:
    """Why not both, or None."""
    return first_half_covers(block, hidden_states, call) or second_half_covers(block, hidden_states, call)


def folded_block(block, hidden_states, call, first: bool = True, second: bool = True):
    """A `LeapBlock` whose norms are folded where `first` and `second` say so."""
    if first:
        hidden_states, projected = normed_linear(block.attention_norm, block.attention.qfkv_proj, hidden_states)
        mixed = block.attention.mix(projected, call)
    else:
        mixed = block.attention(block.attention_norm(hidden_states), call=call)
    hidden_states = hidden_states + mixed.hidden_states

    def feed_forward(hidden_states):
        return _folded_feed_forward(block, hidden_states) if second else block.feed_forward(hidden_states)

    hidden_states = block.formed_again(feed_forward, hidden_states)
    return (hidden_states, mixed.state) if call.return_state else hidden_states


def _folded_feed_forward(block, hidden_states):
    mlp = block.mlp
    hidden_states, inner = normed_linear(block.mlp_norm, mlp.up_proj, hidden_states, with_bias=False)
    if GELU.takes(mlp, hidden_states):
        return hidden_states + _after_first(mlp, inner)
    return hidden_states + mlp.dropout(mlp.down_proj(mlp.activation(inner + mlp.up_proj.bias)))
