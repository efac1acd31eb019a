"""The layers of DANet: DenseAttention with its one projection, the feed-forward layers, and the block around them.

    x = Norm_pre(h) n^(-1/3)            q = x W^T, k = v = x            W (d, d) is the only projection of the attention
    o = DenseAttention(q, k, v)         h <- h + Norm_post(FFN(o))      one residual a block, no biases, 0 maps to 0

A decoder's configuration may add, not of the published model: a short convolution of x, a norm, a gate and a projection of o, and
terms that fade in global layers.

Source: DANet specification, sections 0 and 3. Each layer works alone on `(B, T, d)` tensors.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.fast_paths import fast_paths
from ..shared.call import Call, takes_call
from ..shared.compat import GradientCheckpointingLayer
from ..shared.layer_output import LayerOutput, check_state, refuse_maps_after
from ..shared.layers.gated_output import GatedOutput
from ..shared.layers.half_lives import HalfLives
from ..shared.layers.short_convolution import ShortConvolution
from ..shared.positions import apply_position_factors
from ..shared.token_order import take_tokens, token_layout
from .call import DanetCall, danet_call, works_in_slots
from .configuration_danet import DanetConfig
from .dense_attention import dense_attention_scores, front_packed_dense_attention, pattern_mask
from .fading import fading_factors
from .fast_paths import ATTENTION, FEED_FORWARD, MIX
from .norms import build_norm
from .state import DenseAttentionState, final_state, memory_shape

# What a layer that is used alone may be called with.
ARGUMENTS = (
    "attention_mask", "position_ids", "segment_ids", "cache", "state", "return_state", "output_attentions"
)  # fmt: skip


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


class DenseAttention(HalfLives, nn.Module):
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
        self.code = config.layer_codes[layer_idx]
        kind, self.window = config.layer_kinds[layer_idx]
        self.pattern = "g" if kind == "decay" else kind
        self.width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.is_causal = config.is_causal
        self.scheme = config.relpe_scheme.split(",")
        self.query_proj = linear(config.hidden_size, config.hidden_size, std=config.query_initializer_range)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.convolution = self.output = None
        self.set_half_lives(config.half_lives if kind == "decay" else None)
        if config.conv_kernel is not None:
            self.convolution = ShortConvolution(config.hidden_size, config.conv_kernel)
        parts = config.head_norm, config.output_gate, config.output_projection
        if any(parts):
            self.output = GatedOutput(config.hidden_size, self.num_heads, *parts, eps=config.scaled_norm_eps)
        more = {
            "terms that fade": self.half_lives,
            "short convolution": self.convolution,
            "norm, gate or projection behind the heads": self.output,
        }
        self.options = tuple(name for name, part in more.items() if part is not None)  # beyond the published layer's

    @takes_call(*ARGUMENTS)
    def forward(self, hidden_states: torch.Tensor, call: Call) -> LayerOutput:
        """Mix tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`): normalised and scaled.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 keeps; padding may stand anywhere.
            position_ids (`torch.Tensor` of shape `(B, T)` or `(1, T)`, *optional*): counted if not given.
            segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): documents, non-decreasing; 0 goes on from the state.
            cache (`Cache`, *optional*): read and updated at `layer_idx`; instead of `state`.
            state, return_state: what an earlier call returned, and whether to return it (causal layers only).
            output_attentions (`bool`): also return the raw scores A_ij (q_i . k_j), which are not normalised; O(T^2).
            call (`Call`, *optional*): all of these but `hidden_states`, as a model hands them to its layers.
        """
        if not isinstance(call, DanetCall):
            call = danet_call(call, self.config, hidden_states, (self.layer_idx,))
            if call.keep is not None:
                hidden_states = hidden_states * call.keep.to(hidden_states.dtype)
        state = call.state_of(self.layer_idx)
        if state is not None:
            if call.output_attentions:
                refuse_maps_after(state)
            shape = memory_shape(self.pattern, self.window, self.num_heads, self.width // self.num_heads)
            check_state(state, self.layer_idx, 2 + (self.convolution is not None), (hidden_states.shape[0], *shape))
        return self.attend(hidden_states, call)

    @fast_paths(*ATTENTION)
    def attend(self, hidden_states: torch.Tensor, call: DanetCall) -> LayerOutput:
        """`forward` after its inputs are known to be right."""
        tokens, in_slots = call.tokens, works_in_slots(self.code, call.tokens)
        before, inputs = call.state_of(self.layer_idx), hidden_states
        if self.convolution is not None:
            hidden_states = self.convolution(inputs, tokens, None if before is None else before[-1])
            if call.keep is not None:  # padding stays 0
                hidden_states = hidden_states * call.keep.to(hidden_states.dtype)
        ordered = take_tokens(hidden_states, tokens.order) if in_slots else hidden_states  # real tokens first
        query, key, value = self._project(ordered, call.factors[self.code])  # (B, T, H, D) each
        decay = self.decay()
        mixed, state = front_packed_dense_attention(
            query,
            key,
            value,
            pattern=self.pattern,
            is_causal=self.is_causal,
            window_size=self.window,
            mode=self.config.attention_mode if self.pattern == "g" else "auto",
            chunk_size=self.config.chunk_size,
            lengths=tokens.lengths,
            segment_ids=tokens.segment_ids,
            initial_state=None if before is None else DenseAttentionState(*before[:2]),
            output_final_state=call.wants_state,
            decay=decay,
        )
        mixed = take_tokens(mixed, tokens.slots) if in_slots else mixed
        mixed = mixed.flatten(2) if self.output is None else self.output(mixed, hidden_states)  # (B, T, d)
        if self.convolution is not None and call.wants_state:
            state = *state, self.convolution.state_after(inputs, tokens, None if before is None else before[-1])
        layer_cache = call.layer_cache(self.layer_idx)
        if layer_cache is not None:
            replay = self._replay(key, value, inputs, decay, call, in_slots) if layer_cache.record_past else None
            layer_cache.update_state(state, mixed.shape[1], call.mask, replay, call.segment_ids)
        scores = self._scores(query, key, call, in_slots) if call.output_attentions else None
        return LayerOutput(mixed, scores, state=state if call.return_state else None)

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

    def _scores(self, query, key, call, in_slots):
        """The raw scores (B, H, T, T), tokens in their places."""
        if in_slots:
            query, key = take_tokens(query, call.tokens.slots), take_tokens(key, call.tokens.slots)
        ids, ranks = call.segment_ids, call.tokens.ranks
        same = None if ids is None else ids[:, :, None] == ids[:, None, :]
        mask = pattern_mask(self.pattern, ranks, ranks, self.is_causal, self.window, same)
        decay = self.decay()
        if decay is not None:
            mask = (mask if mask.dim() == 2 else mask[:, None]) * fading_factors(ranks, decay)  # (B or 1, H, T, T)
        return dense_attention_scores(query, key, mask)

    def _replay(self, key, value, inputs, decay, call, in_slots):
        """What a cache needs to undo tokens of this call: keys, values and inputs of the convolution in token order.

        Rates are held as they are now: the layer's weights may be elsewhere when tokens are undone.
        """
        if in_slots:
            key, value = take_tokens(key, call.tokens.slots), take_tokens(value, call.tokens.slots)
        inputs = None if self.convolution is None else inputs
        return partial(self._advance, decay), (key, value, inputs, call.mask, call.segment_ids)

    def _advance(self, decay, state, key, value, inputs, mask, segment_ids):
        """The state after some more tokens alone."""
        layout = token_layout(*key.shape[:2], key.device, mask, segment_ids)
        if layout.order is not None:
            key, value = take_tokens(key, layout.order), take_tokens(value, layout.order)
        initial = None if state is None else DenseAttentionState(*state[:2])
        documents = layout.lengths, layout.segment_ids
        after = final_state(key, value, self.pattern, self.window, *documents, initial, decay)
        if self.convolution is None:
            return after
        return *after, self.convolution.state_after(inputs, layout, None if state is None else state[-1])


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
        self.code = config.layer_codes[layer_idx]
        self.pattern = config.layer_kinds[layer_idx].name
        self.width = config.hidden_size
        eps = (config.maxnorm_eps, config.scaled_norm_eps)
        self.pre_norm = build_norm(config.pre_norm, config.hidden_size, *eps)
        self.attention = DenseAttention(config, layer_idx)
        self.mlp = DanetMLP(config)
        self.post_norm = build_norm(config.post_norm, config.hidden_size, *eps)

    @takes_call(*ARGUMENTS)
    def forward(self, hidden_states: torch.Tensor, call: Call):
        """See the class."""
        if not isinstance(call, DanetCall):
            call = danet_call(call, self.config, hidden_states, (self.layer_idx,))
        x = self.pre_norm(hidden_states, call.input_scales[self.code])  # Norm(h) n^(-1/3), (B, T, d)
        added, state = self.mix(x, call)  # (B, T, d)
        hidden_states = self.post_norm(added, call.keep, residual=hidden_states)  # h + Norm(added), h at padding
        return (hidden_states, state) if call.return_state else hidden_states

    @fast_paths(*MIX)
    def mix(self, x: torch.Tensor, call: DanetCall):
        """FFN(DenseAttention(x)) of the normalised, scaled input x (B, T, d), before the norm, and the state or None."""
        mixed = self.attention(x, call=call)
        return self.mlp(mixed.hidden_states), mixed.state
