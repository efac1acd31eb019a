"""Global encoder layers whose queries are never made: once K^T V is known, such a layer is one matrix, the same for a whole row.

    x W_h^T (K_h^T K_h)  =  x M            M (B, d, d): W_h^T (K_h^T K_h) of all heads beside each other

2 T d (D + d) operations and 2 d^2 D once, instead of 2 T d (2 D + d): cheaper in rows of more than d tokens. In rows of more
tokens than the feed-forward layer is wide, its first matrix joins, too: x (M W^T) instead of (x M) W^T saves 2 T d^2 and costs
2 d^2 f once a row.
"""

import torch

from ...kernels.conditions import no_bias, plain, unhooked
from ...kernels.fast_paths import FastPath
from ...kernels.tracing import product_dtype, records_gradients
from ...shared.layer_output import LayerOutput
from ..layouts import heads_first
from .gram import gram
from .relu_feed_forward import feed_forward_of_product


def folded_attention(weight: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """M (B, d, d) from W (d, d) and keys that are the values (B, T, H, D). Products in the key's dtype."""
    batch, _, heads, head_dim = key.shape
    memory = gram(heads_first(key))  # (B, H, D, D)
    folded = weight.view(heads, head_dim, -1).transpose(1, 2) @ memory  # (B, H, d, D)
    return folded.transpose(1, 2).reshape(batch, -1, heads * head_dim)


def is_one_sum(attention, call) -> bool:
    """Whether every token of a row reads the same sum, wherever it stands, and the output is all that is asked for."""
    if attention.pattern != "g" or attention.is_causal or call.segment_ids is not None or call.factors["g"] is not None:
        return False
    return call.state is None and not call.wants_state and not call.output_attentions


def _fold(attention, hidden_states) -> tuple[torch.Tensor, torch.Tensor]:
    """The input x (B, T, d) after dropout, and M (B, d, d): x M is the layer's output."""
    hidden_states = attention.dropout(hidden_states)
    key = hidden_states.unflatten(-1, (attention.num_heads, -1))
    return hidden_states, folded_attention(attention.query_proj.weight, key)


def _run_attention(attention, hidden_states, call) -> LayerOutput:
    hidden_states, matrix = _fold(attention, hidden_states)
    return LayerOutput(hidden_states @ matrix)


def _suits_attention(attention, hidden_states, call) -> bool:
    return is_one_sum(attention, call) and attention.config.attention_mode == "auto"


def _covers_attention(attention, hidden_states, call) -> str | None:
    length, width = hidden_states.shape[1:]
    if not isinstance(length, int) or length <= width:
        return f"it pays in rows of more than {width} tokens"
    query_proj = attention.query_proj
    reason = plain(query_proj) or no_bias(query_proj)
    if reason is None and hidden_states.dtype != query_proj.weight.dtype:
        return "the queries' weight has another dtype than the input"
    if records_gradients() and product_dtype(hidden_states) == torch.float16:
        return "the gradient of M sums a whole row without the small W in front, which float16 cannot hold"
    return reason


def _run_block(block, normed, call) -> tuple[torch.Tensor, None]:
    hidden_states, matrix = _fold(block.attention, normed)
    first = _first_layer(block.mlp)
    product = matrix @ first.weight.t()  # (B, d, f)
    return feed_forward_of_product(block.mlp, hidden_states, product), None


def _suits_block(block, normed, call) -> bool:
    if block.pattern != "g" or call.cache is not None or call.factors["g"] is not None:
        return False  # as most calls: the import below takes time
    from ..block import DanetMLP, DenseAttention  # the model files import this one

    if type(block.attention) is not DenseAttention or type(block.mlp) is not DanetMLP:
        return False
    return _suits_attention(block.attention, normed, call)


def _covers_block(block, normed, call) -> str | None:
    reason = _covers_attention(block.attention, normed, call)
    first = _first_layer(block.mlp)
    reason = reason or plain(first) or no_bias(first)
    if reason is None and normed.shape[1] <= first.out_features:
        reason = f"it pays in rows of more than {first.out_features} tokens"
    return reason or unhooked(block.attention, block.mlp)


def _first_layer(mlp):
    return mlp.gate_up_proj if mlp.gated else mlp.up_proj


FOLDED_QUERIES = FastPath(
    "queries folded into one matrix",
    run=_run_attention, covers=_covers_attention, suits=_suits_attention, backend="torch", traceable=True,
)  # fmt: skip
FOLDED_FEED_FORWARD = FastPath(
    "queries and feed-forward folded into one matrix",
    run=_run_block, covers=_covers_block, suits=_suits_block, backend="torch", traceable=True,
)  # fmt: skip
