"""The softmax layers of a hybrid DANet: an ordinary pre-norm Transformer block through Transformers' attention
interface.

It keeps keys and values in the ordinary cache, beside the fixed-size states of the DenseAttention layers.
Unlike the published
hybrid it honours padding. Source: DANet specification, section 3.4.
"""

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat import GradientCheckpointingLayer, can_read_values
from .configuration_danet import SOFTMAX_PATTERNS, DanetConfig
from .danet_block import DanetMLP
from .danet_context import DanetContext
from .danet_norms import build_norm
from .layer_output import LayerOutput
from .relative_positions import apply_position_factors, position_factors


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention written out: (B, H, T, D) tensors give (B, T, H, D) and the weights (B, H, T, Tk)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DanetSoftmaxAttention(nn.Module):
    """Multi-head softmax attention with rotary positions, full (`softmax`) or over a causal window (`swa@softmax`)."""

    def __init__(self, config: DanetConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = SOFTMAX_PATTERNS[config.layer_codes[layer_idx]]
        self.sliding_window = config.window_size if self.layer_type == "sliding_attention" else None
        self.is_causal = config.is_causal
        self.num_heads = config.softmax_attention_heads
        self.num_key_value_groups = 1
        self.scaling = (config.hidden_size // self.num_heads) ** -0.5
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: DanetContext,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> LayerOutput:
        """(B, T, d) -> (B, T, d); `attentions` where the attention implementation computes them ("eager")."""
        heads = (self.num_heads, -1)
        query = self.q_proj(hidden_states).unflatten(-1, heads)  # (B, T, H, D)
        key = self.k_proj(hidden_states).unflatten(-1, heads)
        value = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)  # (B, H, T, D)
        query = apply_position_factors(query, context.softmax_positions).transpose(1, 2)
        key = apply_position_factors(key, context.softmax_positions).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            context.softmax_masks[self.layer_type],
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            sliding_window=self.sliding_window,
        )
        return LayerOutput(self.o_proj(mixed.flatten(2)), weights if output_attentions else None)


class DanetSoftmaxBlock(GradientCheckpointingLayer):
    """h + Attention(LN(h)), then h + FFN(LN(h))."""

    def __init__(self, config: DanetConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = build_norm("standard_ln", config.hidden_size, scaled_norm_eps=config.scaled_norm_eps)
        self.attention = DanetSoftmaxAttention(config, layer_idx)
        self.mlp_norm = build_norm("standard_ln", config.hidden_size, scaled_norm_eps=config.scaled_norm_eps)
        self.mlp = DanetMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: DanetContext,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        mixed = self.attention(self.attention_norm(hidden_states), context, past_key_values, output_attentions)
        hidden_states = hidden_states + mixed.hidden_states
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


def prepare_softmax_layers(
    context: DanetContext,
    config: DanetConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """Add to `context` the masks and positions of the softmax layers.
    `attention_mask` covers the tokens of the cache, too.

    Raises ValueError for packed documents together with a cache, and for padding inside a text under a sliding window:
    Transformers' caches and windows count columns, not real tokens.
    """
    types = set(config.layer_types) & set(SOFTMAX_PATTERNS.values())
    if not types:
        return
    if segment_ids is not None and past_key_values is not None:
        raise ValueError(
            "packed documents and a cache cannot go together in a model with softmax layers, whose keys and values keep no "
            "document numbers: pass `use_cache=False`, or one document a row"
        )
    if "sliding_attention" in types and attention_mask is not None and can_read_values():
        real = attention_mask.bool()
        if bool((real[:, 1:] & ~real[:, :-1] & (real.cumsum(-1)[:, :-1] > 0)).any()):
            raise ValueError(
                "`attention_mask` has padding between real tokens, which the sliding softmax windows of 'swa@softmax' layers "
                "would count: put the padding on the left, also of a prompt that generation goes on from"
            )

    def same_document(batch, head, query, key):
        return segment_ids[batch, query] == segment_ids[batch, key]

    documents = {} if segment_ids is None else {"and_mask_function": same_document}
    for layer_type in types:
        create = create_causal_mask if layer_type == "full_attention" else create_sliding_window_causal_mask
        first = config.layer_types.index(layer_type)  # the layer of the cache whose length counts
        context.softmax_masks[layer_type] = create(
            config, hidden_states, attention_mask, past_key_values, layer_idx=first, **documents
        )
    head_dim = config.hidden_size // config.softmax_attention_heads
    context.softmax_positions = position_factors(
        "rotary", position_ids, head_dim, config.rope_theta, hidden_states.dtype
    )
