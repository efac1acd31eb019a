"""The layers of DANet: DenseAttention with its one projection, the feed-forward layers, and the block around them.

    x = Norm_pre(h) n^(-1/3)            q = x W^T, k = v = x            W (d, d) is the only projection of the attention
    o = DenseAttention(q, k, v)         h <- h + Norm_post(FFN(o))      one residual a block, no biases, 0 maps to 0

Source: DANet specification, sections 0 and 3. Each layer works alone on `(B, T, d)` tensors.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from ..kernels.fast_paths import fast_paths
from ..shared.compat import GradientCheckpointingLayer, either_cache_name
from ..shared.layer_output import LayerOutput, check_state, refuse_maps_after
from ..shared.positions import apply_position_factors
from ..shared.sequence import check_layer_inputs
from ..shared.token_order import TokenLayout, take_tokens, token_layout
from .configuration_danet import DanetConfig
from .context import DanetContext, build_context, works_in_slots
from .dense_attention import dense_attention_scores, front_packed_dense_attention, pattern_mask
from .fast_paths import ATTENTION, FEED_FORWARD, MIX
from .norms import build_norm
from .state import DenseAttentionState, final_state, memory_shape


def linear(inputs: int, outputs: int, std: float | None = None, bound: float | None = None) -> nn.Linear:
    """A projection without bias, drawn from N(0, std^2) or uniform(-bound, bound). Specification 1.7.

    It remembers `std`: Transformers draws weights layer by layer, and a linear layer does not know whose it is.
    """
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.initial_std = std
    if std is not None:
        nn.init.normal_(layer.weight, std=std)
    else:
        nn.init.uniform_(layer.weight, -bound, bound)
    return layer


class DenseAttention(nn.Module):
    """Softmax-free attention on `(B, T, d)` tensors, in linear time: q = x W^T, k = v = x. Usable in any network.

    The input should be of size T^(-1/3) (a normalised vector times that), as in `DanetBlock`: the output is cubic in it.

    Args:
        config (`DanetConfig`): heads, pattern, window, positions, dropout.
        layer_idx (`int`, defaults to 0): which code of `config.layer_pattern` applies, and the place in a cache.
    """

    def __init__(self, config: DanetConfig, layer_idx: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.pattern = config.layer_codes[layer_idx]
        self.window = None if self.pattern == "g" else config.window_size
        self.num_heads = config.num_attention_heads
        self.is_causal = config.is_causal
        self.scheme = config.relpe_scheme.split(",")
        self.query_proj = linear(config.hidden_size, config.hidden_size, std=config.query_initializer_range)
        self.dropout = nn.Dropout(config.attention_dropout)

    @either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        state: DenseAttentionState | None = None,
        return_state: bool = False,
        output_attentions: bool = False,
        context: DanetContext | None = None,
    ) -> LayerOutput:
        """Mix tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`): normalised and scaled.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 keeps; padding may stand anywhere.
            position_ids (`torch.Tensor` of shape `(B, T)` or `(1, T)`, *optional*): counted if not given.
            segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): documents, non-decreasing; 0 goes on from the state.
            cache (`Cache`, *optional*): read and updated at `layer_idx`; instead of `state`.
            state, return_state: what an earlier call returned, and whether to return it (causal layers only).
            output_attentions (`bool`): also return the raw scores A_ij (q_i . k_j), which are not normalised; O(T^2).
            context: what a model has prepared for all its layers, instead of mask, positions and segments.
        """
        layer_cache = None if cache is None else cache.layers[self.layer_idx]
        if layer_cache is not None:
            state = _held(layer_cache)
        if output_attentions:
            refuse_maps_after(state)
        if context is None:
            context = _context_of(self, hidden_states, attention_mask, position_ids, segment_ids, state)
            if context.keep is not None:
                hidden_states = hidden_states * context.keep.to(hidden_states.dtype)
        if state is not None:
            head_dim = self.config.hidden_size // self.num_heads
            shape = memory_shape(self.pattern, self.window, self.num_heads, head_dim)
            check_state(state, self.layer_idx, 2, (hidden_states.shape[0], *shape))
        return self.attend(hidden_states, context, state, layer_cache, return_state, output_attentions)

    @fast_paths(*ATTENTION)
    def attend(
        self, hidden_states, context, state=None, layer_cache=None, return_state=False, output_attentions=False
    ) -> LayerOutput:
        """`forward` after its inputs are known to be right: `layer_cache` holds `state` and takes the next one."""
        layout, in_slots = context.layout, works_in_slots(self.pattern, context.layout)
        if in_slots:
            hidden_states = take_tokens(hidden_states, layout.order)  # real tokens first
        query, key, value = self._project(hidden_states, context.factors[self.pattern])  # (B, T, H, D) each
        mixed, new_state = front_packed_dense_attention(
            query,
            key,
            value,
            pattern=self.pattern,
            is_causal=self.is_causal,
            window_size=self.window,
            mode=self.config.attention_mode if self.pattern == "g" else "auto",
            chunk_size=self.config.chunk_size,
            lengths=layout.lengths,
            segment_ids=layout.segment_ids,
            initial_state=state,
            output_final_state=return_state or layer_cache is not None,
        )
        mixed = mixed.flatten(2)  # (B, T, d)
        if in_slots:
            mixed = take_tokens(mixed, layout.slots)
        if layer_cache is not None:
            replay = self._replay(layer_cache, key, value, layout, in_slots)
            layer_cache.update_state(new_state, mixed.shape[1], layout.mask, replay, _documents_of_tokens(layout))
        scores = self._scores(query, key, layout, in_slots) if output_attentions else None
        return LayerOutput(mixed, scores, state=new_state if return_state else None)

    def _project(self, hidden_states, factors):
        """Queries, keys and values (B, T, H, D) with their positions. Scheme "qkv" turns the input, before the projection."""
        heads = (self.num_heads, -1)
        hidden_states = self.dropout(hidden_states)
        key = hidden_states.unflatten(-1, heads)
        if factors is not None and self.scheme == ["qkv"]:
            key = apply_position_factors(key, factors)
            return self.query_proj(key.flatten(2)).unflatten(-1, heads), key, key
        query = self.query_proj(hidden_states).unflatten(-1, heads)
        if factors is None:
            return query, key, key
        turned = apply_position_factors(key, factors) if {"k", "v"} & set(self.scheme) else key
        if "q" in self.scheme:
            query = apply_position_factors(query, factors)
        return query, turned if "k" in self.scheme else key, turned if "v" in self.scheme else key

    def _scores(self, query, key, layout, in_slots):
        """The raw scores (B, H, T, T), tokens in their places."""
        if in_slots:
            query, key = take_tokens(query, layout.slots), take_tokens(key, layout.slots)
        ids = _documents_of_tokens(layout)
        same = None if ids is None else ids[:, :, None] == ids[:, None, :]
        mask = pattern_mask(self.pattern, layout.ranks, layout.ranks, self.is_causal, self.window, same)
        return dense_attention_scores(query, key, mask)

    def _replay(self, layer_cache, key, value, layout, in_slots):
        """What a cache needs to undo tokens of this call: keys and values in token order. None unless it records."""
        if not layer_cache.record_past:
            return None
        if in_slots:
            key, value = take_tokens(key, layout.slots), take_tokens(value, layout.slots)
        return self._advance, (key, value, layout.mask, _documents_of_tokens(layout))

    def _advance(self, state, key, value, mask, segment_ids):
        """The state after some more tokens alone."""
        layout = token_layout(*key.shape[:2], key.device, mask, segment_ids)
        if layout.order is not None:
            key, value = take_tokens(key, layout.order), take_tokens(value, layout.order)
        initial = None if state is None else DenseAttentionState(*state)
        return final_state(key, value, self.pattern, self.window, layout.lengths, layout.segment_ids, initial)


class DanetMLP(nn.Module):
    """ReLU feed-forward layer, d -> f -> d, or SwiGLU: (SiLU(gate) * up) -> d. No biases. Specification 3.3."""

    def __init__(self, config: DanetConfig):
        super().__init__()
        width = config.intermediate_size
        self.gated = config.ffn_type == "swiglu"
        if self.gated:
            initial = {"bound": config.initializer_range}
            self.gate_up_proj = linear(config.hidden_size, 2 * width, **initial)
        else:
            initial = {"std": (2 * width) ** -0.5}
            self.up_proj = linear(config.hidden_size, width, **initial)
        self.down_proj = linear(width, config.hidden_size, **initial)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @fast_paths(*FEED_FORWARD)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        first = self.gate_up_proj if self.gated else self.up_proj
        inner = self.activate(first(hidden_states))  # (B, T, f)
        return self.dropout(self.down_proj(self.dropout(inner)))

    def activate(self, inner: torch.Tensor) -> torch.Tensor:
        """What stands between the products: (B, T, f), or gate and up beside each other (B, T, 2 f), -> (B, T, f)."""
        if not self.gated:
            return F.relu(inner)
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate) * up


class DanetBlock(GradientCheckpointingLayer):
    """h + Norm_post(FFN(DenseAttention(Norm_pre(h) n^(-1/3)))). Usable in any network, arguments as for `DenseAttention`.

    Returns the hidden states (B, T, d), or `(hidden_states, state)` with `return_state=True`.
    """

    def __init__(self, config: DanetConfig, layer_idx: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.pattern = config.layer_codes[layer_idx]
        eps = (config.maxnorm_eps, config.scaled_norm_eps)
        self.pre_norm = build_norm(config.pre_norm, config.hidden_size, *eps)
        self.attention = DenseAttention(config, layer_idx)
        self.mlp = DanetMLP(config)
        self.post_norm = build_norm(config.post_norm, config.hidden_size, *eps)

    @either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        state: DenseAttentionState | None = None,
        return_state: bool = False,
        output_attentions: bool = False,
        context: DanetContext | None = None,
    ):
        """See the class."""
        if context is None:
            if cache is not None and state is None:
                state = _held(cache.layers[self.layer_idx])
            context = _context_of(self, hidden_states, attention_mask, position_ids, segment_ids, state)
        x = self.pre_norm(hidden_states, context.input_scales[self.pattern])  # Norm(h) n^(-1/3), (B, T, d)
        added, state = self.mix(x, context, cache, state, return_state, output_attentions)  # (B, T, d)
        hidden_states = self.post_norm(added, context.keep, residual=hidden_states)  # h + Norm(added), h at padding
        return (hidden_states, state) if return_state else hidden_states

    @fast_paths(*MIX)
    def mix(self, x, context, cache=None, state=None, return_state=False, output_attentions=False):
        """FFN(DenseAttention(x)) of the normalised, scaled input x (B, T, d), before the norm, and the state or None."""
        options = {"return_state": return_state, "output_attentions": output_attentions}
        mixed = self.attention(x, cache=cache, state=state, context=context, **options)
        return self.mlp(mixed.hidden_states), mixed.state


def _held(layer_cache) -> DenseAttentionState | None:
    """The state in a layer of a cache."""
    held = layer_cache.get_state()
    return None if held is None else DenseAttentionState(*held)


def _context_of(layer, hidden_states, attention_mask, position_ids, segment_ids, state) -> DanetContext:
    """What a model prepares for all its layers, for one that is called alone."""
    seen = None if state is None else state.count
    mask = check_layer_inputs(hidden_states, layer.config.hidden_size, attention_mask, segment_ids)
    return build_context(layer.config, hidden_states, mask, position_ids, segment_ids, seen, {layer.pattern})


def _documents_of_tokens(layout: TokenLayout) -> torch.Tensor | None:
    """The document (B, T) of each token, from a layout that has those of slots."""
    if layout.segment_ids is None or layout.slots is None:
        return layout.segment_ids
    return layout.segment_ids.gather(1, layout.slots)
