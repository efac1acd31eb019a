"""Softmax attention as one layer of a recurrent model: over the whole text, or over the last W tokens.

    out_i = W_o sum_j softmax_j(<q_i, k_j> / sqrt(D)) v_j        j of the same document, j <= i, and i - j < W in real tokens

Over the whole text, keys and values lie in Transformers' own cache layers, which grow, and count columns. Over a window they are
a state of fixed size like that of any recurrent layer: the last W - 1 real tokens, whatever padding stands between them.

Notation: B batch, T time, H heads of queries, G heads of keys and values (H is a multiple), D head size, W window.
"""

from typing import Any

import torch
from torch import nn

from ...kernels.tracing import can_read_values, check_when_run
from ..call import Call, takes_call
from ..compat import ALL_ATTENTION_FUNCTIONS, CACHE_NAME, and_masks, create_causal_mask
from ..layer_output import LayerOutput, check_state, refuse_maps_after
from ..positions import apply_position_factors
from ..precision import accumulation_dtype
from ..states.cache import hold_in
from ..token_order import take_tokens
from .recent_tokens import behind_the_past, documents_behind_the_past, last_tokens

SHORTEST_BLOCK = 64  # queries that share the keys of a window


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention on `(B, T, d)` tensors, causal.

    Args:
        config (`PreTrainedConfig`): tells the attention function (`attn_implementation`) and the width.
        layer_idx (`int`): place in a cache.
        heads, key_value_heads (`int`): H and G; H a multiple of G.
        window (`int`, *optional*): tokens that are seen, the token itself included; `None` for all so far.
        rope_theta (`float`, *optional*): base of rotary positions; `None` for none.
        dropout (`float`): of the weights. bias (`bool`): whether projections have one.

    Time and memory: O(T W) with a window, else those of the attention function. A window takes masked blocks of queries, which
    flash kernels know nothing of: there it runs through "sdpa" instead.
    """

    is_causal = True

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        heads: int,
        key_value_heads: int,
        window: int | None = None,
        rope_theta: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.width = width = config.hidden_size
        self.num_heads, self.num_key_value_heads = heads, key_value_heads
        self.num_key_value_groups = heads // key_value_heads
        self.head_dim = width // heads
        self.window, self.rope_theta = window, rope_theta
        self.scaling = self.head_dim**-0.5
        self.dropout = nn.Dropout(dropout)
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    @takes_call("attention_mask", "position_ids", "segment_ids", "cache", "state", "return_state", "output_attentions")
    def forward(self, hidden_states: torch.Tensor, call: Call) -> LayerOutput:
        """(B, T, d) -> (B, T, d).

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`).
            attention_mask, position_ids, segment_ids: as for every layer; padding may stand anywhere.
            cache (`Cache`, *optional*): read and updated at `layer_idx`.
            state, return_state: of a window used alone: `(keys and values (B, 2, W - 1, G, D), 1 where one stands (B, W - 1))`.
            output_attentions (`bool`): also build the weights (B, H, T, T); O(T^2), whatever the attention function.

        Raises:
            ValueError: a state without a window (all keys are kept in a cache), packed documents together with a cache there
                (which keeps no document numbers), or attention maps of a text that was read in several calls.
        """
        heads = (-1, self.head_dim)
        query, key, value = (f(hidden_states).unflatten(-1, heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            at = call.positioned(hidden_states)
            factors = at.position_factors("rotary", self.head_dim, self.rope_theta, hidden_states.dtype)
            query, key = apply_position_factors(query, factors), apply_position_factors(key, factors)
        if call.output_attentions:
            refuse_maps_after(self._past(call))
        mixed, state = (self._over_all if self.window is None else self._over_window)(query, key, value, call)
        maps = softmax_rows(query, key, self.window, call.mask, call.segment_ids) if call.output_attentions else None
        return LayerOutput(self.o_proj(mixed.flatten(2)), maps, state=state if call.return_state else None)

    def _past(self, call):
        """What is left of earlier tokens, None at the beginning of a text."""
        if self.window is not None or call.cache is None:
            return call.state_of(self.layer_idx)
        layer = call.layer_cache(self.layer_idx)
        return layer if layer.is_initialized and int(layer.get_seq_length()) else None

    def _attend(self, query, key, value, mask, implementation) -> torch.Tensor:
        """Transformers' attention function on tokens first: (B, T, H, D), twice (B, S, G, D) -> (B, T, H, D)."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        return attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
        )[0]

    def _over_all(self, query, key, value, call):
        """All tokens so far; keys and values go to the cache."""
        if call.state is not None or call.return_state:
            raise ValueError(
                f"layer {self.layer_idx} is softmax attention over all tokens, which keeps no state of fixed size: give "
                f"`{CACHE_NAME}`, not `state` or `return_state`"
            )
        mask = call.once("keys of softmax layers", lambda: self._mask(query, call))
        if call.cache is not None:
            hold_in(call.layer_cache(self.layer_idx), key.dtype)
            key, value = call.cache.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        return self._attend(query, key, value, mask, self.config._attn_implementation), None

    def _mask(self, query, call):
        """What Transformers' attention functions take as the mask of all tokens."""
        documents, extra = call.segment_ids, {}
        if documents is not None and call.cache is not None:
            refuse_documents_with_a_cache(documents)
        elif documents is not None:
            extra["and_mask_function"] = and_masks(lambda b, h, i, j: documents[b, i] == documents[b, j])
        like = query.flatten(2)
        return create_causal_mask(self.config, like, call.mask_of_keys, call.cache, layer_idx=self.layer_idx, **extra)

    def _over_window(self, query, key, value, call):
        """The last W tokens; keys and values of the last W - 1 are the state."""
        batch, length = query.shape[:2]
        layout, past = call.layout(batch, length, query.device), self._past(call)
        if past is not None:
            shape = (batch, *window_state_shapes(self.num_key_value_heads, self.head_dim, self.window)[0])
            check_state(past, self.layer_idx, 2, shape)
        moved = query, key, value
        if layout.order is not None:  # a window counts real tokens: they move together, and their results back
            moved = tuple(take_tokens(x, layout.order) for x in moved)
        implementation = self.config._attn_implementation
        implementation = "sdpa" if "flash" in (implementation or "") else implementation
        mixed = self._in_blocks(*moved, past, layout, call, implementation)
        mixed = mixed if layout.slots is None else take_tokens(mixed, layout.slots)
        if call.mask is not None:
            mixed = mixed.masked_fill(~call.mask[..., None, None], 0.0)
        state = self._state_after(past, key, value, layout) if call.wants_state else None
        layer = call.layer_cache(self.layer_idx)
        if layer is not None:
            replay = self._advance, (key, value, call.mask, call.segment_ids)
            layer.update_state(state, length, call.mask, replay, call.segment_ids)
        return mixed, state

    def _in_blocks(self, query, key, value, past, layout, call, implementation):
        """Softmax over the window of real tokens that stand first: blocks of queries, each with the keys that it sees."""
        length, window = query.shape[1], self.window
        # First phase: the W tokens before these in front (the oldest of them is never seen, and keeps sizes even).
        keys, values = (None, None) if past is None else past[0].to(key.dtype).unbind(1)
        key, value = (
            nn.functional.pad(behind_the_past(x, before, window - 1), (0, 0, 0, 0, 1, 0))
            for x, before in ((key, keys), (value, values))
        )
        # Second phase: cut into blocks of C queries, and of the W + C keys that lie before and beside them.
        block = max(window, SHORTEST_BLOCK)
        single = isinstance(length, int) and length <= block
        if single:
            block, filling = length, 0
        else:
            cut = block if isinstance(length, int) else 2 * block  # pairs keep a dynamic number of blocks from being 1
            filling = (length + cut - 1) // cut * cut - length
            query, key, value = (nn.functional.pad(x, (0, 0, 0, 0, 0, filling)) for x in (query, key, value))
        query = query.unflatten(1, (-1, block))  # (B, n, C, H, D)
        mask = call.once(
            ("keys of a window", window, implementation, query.dtype),
            lambda: self._window_mask(past, layout, query, single, filling, implementation),
        )
        # Third phase: attention within the blocks.
        key, value = (_seen_by_blocks(x, window, block, single).flatten(0, 1) for x in (key, value))
        mixed = self._attend(query.flatten(0, 1), key, value, mask, implementation)
        mixed = mixed.unflatten(0, query.shape[:2]).flatten(1, 2)
        if isinstance(length, int):
            return mixed[:, :length]
        return mixed.index_select(1, torch.arange(length, device=mixed.device))  # export gives up a length for a slice

    def _window_mask(self, past, layout, query, single, filling, implementation):
        """Which keys (B n, 1, C, W + C) each query of the blocks (B, n, C, ...) sees: bool, or what is added to the scores."""
        batch, count, block = query.shape[:3]
        device, window = query.device, self.window
        gap = torch.arange(block, device=device)[:, None] + window - torch.arange(window + block, device=device)
        visible = (gap >= 0) & (gap < window)  # (C, W + C)
        there = torch.arange(window + count * block, device=device)[None] >= window  # of this call
        if past is not None:
            there = torch.cat([nn.functional.pad(past[1] > 0, (1, 0)), there[:, window:].expand(batch, -1)], dim=1)
        visible = visible & _seen_by_blocks(there, window, block, single)[:, :, None]  # (B or 1, n, C, W + C)
        documents = documents_behind_the_past(layout, window)
        if documents is not None:
            documents = nn.functional.pad(documents, (0, filling), value=-1)
            own = documents[:, window:].unflatten(1, (-1, block))
            seen = _seen_by_blocks(documents, window, block, single)
            visible = visible & (own[..., :, None] == seen[..., None, :])
        visible = visible.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        if implementation in (None, "eager", "sdpa"):
            return visible
        return torch.where(visible, 0.0, torch.finfo(query.dtype).min).to(query.dtype)

    def _state_after(self, past, key, value, layout):
        """Keys and values (B, 2, W - 1, G, D) of the last W - 1 real tokens, and where there are any (B, W - 1)."""
        kept, documents = self.window - 1, documents_behind_the_past(layout, self.window - 1)
        both = torch.stack((key, value), dim=2)  # (B, T, 2, G, D)
        both = both if layout.order is None else take_tokens(both, layout.order)
        there = torch.ones(both.shape[:2], dtype=accumulation_dtype(both.dtype), device=both.device)
        before, stood = (None, None) if past is None else (past[0].transpose(1, 2), past[1])
        both, there = behind_the_past(both, before, kept), behind_the_past(there, stood, kept)
        both, there = (last_tokens(x, kept, layout, documents) for x in (both, there))
        return both.transpose(1, 2).contiguous(), there

    def _advance(self, state, key, value, mask, segment_ids):
        """The state after more inputs alone: how a cache undoes tokens (it runs the ones that stay again)."""
        layout = Call(mask, None, segment_ids).layout(*key.shape[:2], key.device)
        return self._state_after(state, key, value, layout)


def _seen_by_blocks(x: torch.Tensor, window: int, block: int, single: bool) -> torch.Tensor:
    """Of tokens (B, W + n C, ...), the W + C that a block of C sees: (B, n, W + C, ...); W is at most C, unless n is 1."""
    if single:
        return x[:, None]
    before = x[:, :-window].unflatten(1, (-1, block))[:, :, :window]
    return torch.cat([before, x[:, window:].unflatten(1, (-1, block))], dim=2)


def window_state_shapes(key_value_heads: int, head_dim: int, window: int) -> list[tuple[int, ...]]:
    """Shapes, behind the batch, of the state of softmax attention over a window: keys and values, and where there are any."""
    return [(2, window - 1, key_value_heads, head_dim), (window - 1,)]


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention written out: (B, H, T, D) and (B, G, S, D) tensors give (B, T, H, D) and the weights (B, H, T, S).

    The mask is bool (True keeps), or added to the scores.
    """
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=accumulation_dtype(query.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def softmax_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights (B, H, T, T) of queries (B, T, H, D) over keys (B, T, G, D), 0 at padding. O(T^2): the definition."""
    dtype = accumulation_dtype(query.dtype)
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", query.to(dtype), key.to(dtype)) * query.shape[-1] ** -0.5
    real = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device) if mask is None else mask.bool()
    rank, place = real.cumsum(1), torch.arange(query.shape[1], device=query.device)
    visible = real[:, :, None] & real[:, None, :] & (place[:, None] >= place)
    if window is not None:
        visible = visible & (rank[:, :, None] - rank[:, None, :] < window)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    visible = visible[:, None]
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    return scores.softmax(-1).masked_fill(~visible, 0.0)


def refuse_documents_with_a_cache(segment_ids: torch.Tensor) -> None:
    """Keys and values in Transformers' own cache layers keep no document numbers.

    Raises:
        ValueError: packed documents; RuntimeError when it runs, in a program that is traced.
    """
    reason = (
        "packed documents and a cache cannot go together in a model with softmax layers, whose keys and values keep no document "
        "numbers: pass `use_cache=False`, or one document a row"
    )
    if can_read_values(segment_ids):
        raise ValueError(reason)
    check_when_run((segment_ids == 0).all(), reason)  # plain positions show no restart while traced
