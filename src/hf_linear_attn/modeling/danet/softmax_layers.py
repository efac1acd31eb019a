"""The softmax layers of a hybrid DANet: ordinary pre-norm blocks through Transformers' attention interface.

A decoder's `softmax` and `softmax:W` are the layer that families share (`shared.layers.softmax_attention`). The other codes, and
encoders, have `DanetSoftmaxAttention`: windows of Transformers' own masks and caches. Keys and values are in the ordinary cache
beside the fixed-size states of the DenseAttention layers, those of `softmax:W` in such a state. Unlike the published hybrid
they honour padding. Source: DANet specification, section 3.4.
"""

import functools
from dataclasses import replace

import torch
from torch import nn

from ..kernels.tracing import can_read_values
from ..shared.compat import (
    ALL_ATTENTION_FUNCTIONS,
    GradientCheckpointingLayer,
    and_masks,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from ..shared.configuration import softmax_heads
from ..shared.layer_output import LayerOutput
from ..shared.layers.softmax_attention import SoftmaxAttention, eager_attention, refuse_documents_with_a_cache
from ..shared.positions import apply_position_factors
from ..shared.states.cache import hold_in
from .block import DanetMLP
from .call import DanetCall
from .configuration_danet import SOFTMAX_PATTERNS, DanetConfig
from .norms import build_norm
from .state import window_shift


def through_masks(config: DanetConfig, code: str) -> bool:
    """Whether layers of this code are `DanetSoftmaxAttention`, whose masks `with_softmax_layers` makes."""
    return code in SOFTMAX_PATTERNS and not (config.is_causal and code == "softmax")


def softmax_attention(config: DanetConfig, layer_idx: int) -> nn.Module:
    """The softmax layer of a block."""
    if through_masks(config, config.layer_codes[layer_idx]):
        return DanetSoftmaxAttention(config, layer_idx)
    return SoftmaxAttention(
        config,
        layer_idx,
        *softmax_heads(config),
        window=config.layer_kinds[layer_idx].window,
        rope_theta=config.rope_theta if config.softmax_positions == "rotary" else None,
        dropout=config.attention_dropout,
        bias=config.attention_bias,
    )


class DanetSoftmaxAttention(nn.Module):
    """Multi-head softmax attention: full in an encoder (`softmax`), over a causal window (`swa@softmax`) or inside (shifted)
    local windows (`l@softmax`, `sl@softmax`).

    A window is a mask: FlexAttention skips what it hides, SDPA computes T x T scores and hides them.
    """

    def __init__(self, config: DanetConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.pattern = config.layer_codes[layer_idx]
        self.sliding_window = config.window_size if self.pattern == "swa@softmax" else None
        self.is_causal = config.is_causal
        self.num_heads, key_value_heads = softmax_heads(config)
        self.num_key_value_groups = self.num_heads // key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, hidden_states: torch.Tensor, call: DanetCall) -> LayerOutput:
        """(B, T, d) -> (B, T, d); `attentions` where the attention implementation computes them ("eager")."""
        heads, factors = (-1, self.head_dim), call.softmax_factors
        query, key, value = (f(hidden_states).unflatten(-1, heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        if factors is not None:  # (B, T, H, D)
            query, key = apply_position_factors(query, factors), apply_position_factors(key, factors)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, T, D)
        if call.cache is not None:
            hold_in(call.cache.layers[self.layer_idx], key.dtype)
            key, value = call.cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            call.softmax_masks[self.pattern],
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            sliding_window=self.sliding_window,
        )
        return LayerOutput(self.o_proj(mixed.flatten(2)), weights if call.output_attentions else None)


class DanetSoftmaxBlock(GradientCheckpointingLayer):
    """h + Attention(LN(h)), then h + FFN(LN(h))."""

    def __init__(self, config: DanetConfig, layer_idx: int):
        super().__init__()
        self.attention_norm = build_norm("standard_ln", config.hidden_size, scaled_norm_eps=config.scaled_norm_eps)
        self.attention = softmax_attention(config, layer_idx)
        self.mlp_norm = build_norm("standard_ln", config.hidden_size, scaled_norm_eps=config.scaled_norm_eps)
        self.mlp = DanetMLP(config)

    def forward(self, hidden_states: torch.Tensor, call: DanetCall) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        mixed = self.attention(self.attention_norm(hidden_states), call=call)
        hidden_states = hidden_states + mixed.hidden_states
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


def maps_in_their_places(forward):
    """A body's `forward` whose `attentions` have one entry a layer: None for a softmax layer that gave no map.

    Transformers collects those that there are, which would shift the maps of later layers to other indices.
    """

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        as_output = kwargs.pop("return_dict", None)
        if as_output is None:
            as_output = self.config.return_dict
        output = forward(self, *args, return_dict=True, **kwargs)
        codes = self.config.layer_codes
        found = output.get("attentions")
        if found is not None and len(found) < len(codes):
            there = iter(found)
            output.attentions = tuple(None if through_masks(self.config, code) else next(there) for code in codes)
        return output if as_output else output.to_tuple()

    return wrapper


def with_softmax_layers(
    call: DanetCall, config: DanetConfig, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> DanetCall:
    """The call with masks and positions of `DanetSoftmaxAttention` layers. `attention_mask` covers the tokens of the cache, too.

    Raises:
        ValueError: packed documents together with a cache; padding inside a text under a sliding window or a window with a cache
            (Transformers' caches and sliding windows count columns, not real tokens); or an attention function that knows no
            local windows.
    """
    codes = {code for code in config.layer_codes if through_masks(config, code)}
    if not codes:
        return call
    if call.cache is not None:
        if call.segment_ids is not None:
            refuse_documents_with_a_cache(call.segment_ids)
        attention_mask = call.kept_mask
    _check_windows(codes - {"softmax"}, config, attention_mask, call.cache)
    masks = {code: _mask(code, call, config, hidden_states, attention_mask) for code in codes}
    factors = None
    if config.softmax_positions == "rotary":
        head_dim = config.hidden_size // config.softmax_attention_heads
        factors = call.position_factors("rotary", head_dim, config.rope_theta, hidden_states.dtype)
    return replace(call, softmax_masks=masks, softmax_factors=factors)


def _check_windows(windowed: set[str], config, attention_mask, cache) -> None:
    """Refuse a mask that columns and real tokens count differently under, and attention functions without local windows."""
    counts_columns = "swa@softmax" in windowed or (windowed and cache is not None)
    if counts_columns and attention_mask is not None and can_read_values(attention_mask):
        real = attention_mask.bool()
        if bool((real[:, 1:] & ~real[:, :-1] & (real.cumsum(-1)[:, :-1] > 0)).any()):
            raise ValueError(
                "`attention_mask` has padding between real tokens, which the softmax windows of "
                f"{', '.join(map(repr, sorted(windowed)))} layers would count: put the padding on the left, also of a prompt "
                "that generation goes on from"
            )
    local = windowed - {"swa@softmax"}
    if local and "flash" in (config._attn_implementation or ""):
        raise ValueError(
            f"`attn_implementation` {config._attn_implementation!r} knows no local windows, which {sorted(local)} layers need: "
            "use 'sdpa', 'flex_attention' or 'eager'"
        )


def _mask(code, call, config, hidden_states, attention_mask):
    """What Transformers' attention functions take as the mask of a layer with pattern `code`."""
    conditions, cache, segment_ids = [], call.cache, call.segment_ids
    if segment_ids is not None and cache is None:
        conditions.append(lambda batch, head, query, key: segment_ids[batch, query] == segment_ids[batch, key])
    if code in ("l@softmax", "sl@softmax"):
        conditions.append(_same_window(code, call, config, hidden_states, attention_mask))
    # With a cache a local window lies within the last w columns, which is what its layer keeps.
    sliding = code == "swa@softmax" or (code != "softmax" and cache is not None)
    create = create_sliding_window_causal_mask if sliding else create_causal_mask
    first = config.layer_codes.index(code)  # the layer of the cache whose length counts
    extra = {"and_mask_function": and_masks(*conditions)} if conditions else {}
    return create(config, hidden_states, attention_mask, cache, layer_idx=first, **extra)


def _same_window(code, call, config, hidden_states, attention_mask):
    """The mask function of `l` and `sl` windows, which count real tokens."""
    window = config.window_size
    shift = window_shift(code.removesuffix("@softmax"), window)
    batch = hidden_states.shape[0]
    if call.cache is None:
        windows = ((call.tokens.ranks + shift) // window).expand(batch, -1)
        return lambda row, head, query, key: windows[row, query] == windows[row, key]
    # Padding stands on the left alone here. Columns of a static cache that are still empty have ranks, too.
    padding = torch.zeros(batch, dtype=torch.long, device=hidden_states.device)
    if attention_mask is not None:
        padding = (attention_mask.cumsum(-1) == 0).sum(-1)
    start = shift - padding

    def same(row, head, query, key):
        return (query + start[row]) // window == (key + start[row]) // window

    return same
