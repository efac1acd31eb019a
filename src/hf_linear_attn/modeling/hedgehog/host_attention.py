"""What a host's attention layer becomes: a learned part inside it, and the function that Transformers' registry gives it.

The host's code stays Transformers': it projects, turns by positions, and calls the registered function with its attention
module. The host gets no cache and builds no mask (none is registered under that name): states, keys and values are read and
written here.

Transformers looks the function up by the name in a configuration, which anybody may change. The layers' own copy of the
configuration keeps the name (`keep_attention`), so that no switch turns a linear layer into a softmax one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..shared.call import Call
from ..shared.compat import ALL_ATTENTION_FUNCTIONS, init
from ..shared.layer_output import check_state, refuse_maps_after
from ..shared.precision import accumulation_dtype
from .hosts import ATTENTION_NAME
from .mechanism import HedgehogState, hedgehog_attention, hedgehog_weights, state_shapes
from .softmax_layers import softmax_attention

NEVER_FORGETS = 8.0  # initial bias of forgetting: a token leaves 1 - e^-8 of what is older


@dataclass(frozen=True)
class HedgehogCall(Call):
    """One forward of a Hedgehog model; of `Call`, and what only its softmax layers need.

    softmax_masks: by layer, the mask that Transformers' attention functions take.
    softmax_function: name of the attention function of softmax layers.
    """

    softmax_masks: Any = None
    softmax_function: str | None = None


class HedgehogAttention(nn.Module):
    """The learned part of a linear layer: feature maps of queries (H, D, F) and keys (G, D, F), the window's gain, forgetting.

    Args:
        config (`HedgehogConfig`): sizes, window, forgetting.
        layer_idx (`int`): the layer's place in a cache.
    """

    def __init__(self, config, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.window, self.chunk_size = config.window, config.chunk_size
        self.forgetting, self.feature_size = config.forgetting, config.feature_size
        self.num_heads, self.key_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.query_map = nn.Parameter(torch.empty(self.num_heads, self.head_dim, self.feature_size))
        self.key_map = nn.Parameter(torch.empty(self.key_heads, self.head_dim, self.feature_size))
        self.window_gain = nn.Parameter(torch.empty(self.num_heads))
        if self.forgetting != "none":
            self.forget_bias = nn.Parameter(torch.empty(self.key_heads))
        if self.forgetting == "token":
            self.forget_weight = nn.Parameter(torch.empty(self.key_heads, self.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Maps of columns of the identity, then random ones of that length; window and features weighed alike; no forgetting."""
        for weight in (self.query_map, self.key_map):
            shape = self.head_dim, max(0, self.feature_size - self.head_dim)
            more = torch.randn(weight.shape[0], *shape, device=weight.device, dtype=torch.float32) * self.head_dim**-0.5
            own = torch.eye(self.head_dim, min(self.head_dim, self.feature_size), device=weight.device)
            first = torch.cat((own.expand(weight.shape[0], -1, -1), more), dim=-1)
            init.copy_(weight, first.to(weight.dtype))
        init.zeros_(self.window_gain)
        if self.forgetting != "none":
            init.constant_(self.forget_bias, NEVER_FORGETS)
        if self.forgetting == "token":
            init.zeros_(self.forget_weight)

    def log_decay(self, value: torch.Tensor) -> torch.Tensor | None:
        """Logarithm (B, T, G) of what tokens with these values (B, T, G, D) leave of what is older than their window, or None."""
        if self.forgetting == "none":
            return None
        wide = accumulation_dtype(value.dtype)
        kept = self.forget_bias.to(wide).expand(value.shape[:3])
        if self.forgetting == "token":
            kept = kept + (value.to(wide) * self.forget_weight.to(wide)).sum(-1)
        return nn.functional.logsigmoid(kept)

    def forward(self, query, key, value, call: Call, scale: float | None = None, softcap: float | None = None):
        """(B, T, H, D) queries and (B, T, G, D) keys and values -> (B, T, H, D), and with maps asked for also (B, H, T, T)."""
        state, layer_cache = call.state_of(self.layer_idx), call.layer_cache(self.layer_idx)
        if state is not None:
            shapes = state_shapes(self.window, self.key_heads, self.head_dim, self.feature_size)
            check_state(state, self.layer_idx, len(shapes), (query.shape[0], *shapes[0]))
        if call.output_attentions:
            refuse_maps_after(state)
        decay = self.log_decay(value)
        layout = None
        if call.mask is not None or call.segment_ids is not None:
            layout = call.layout(query.shape[0], query.shape[1], query.device)
        options: dict[str, Any] = {"window": self.window, "scale": scale, "softcap": softcap, "log_decay": decay}
        learned = (self.query_map, self.key_map, self.window_gain)
        mixed, state = hedgehog_attention(
            query,
            key,
            value,
            *learned,
            **options,
            initial_state=None if state is None else HedgehogState(*state),
            return_state=call.wants_state,
            chunk_size=self.chunk_size,
            layout=layout,
        )
        if layer_cache is not None and state is not None:
            advance = partial(self._advance, learned)  # the weights may be elsewhere when tokens are undone
            replay = advance, (key, value, decay, call.mask, call.segment_ids)
            layer_cache.update_state(tuple(state), query.shape[1], call.mask, replay, call.segment_ids)
        maps = None
        if call.output_attentions:
            maps = hedgehog_weights(query, key, *learned, **options, mask=call.mask, segment_ids=call.segment_ids)
        return mixed, maps

    def _advance(self, learned, state, key, value, decay, mask, segment_ids):
        """The state after more tokens alone: how a cache undoes some (it runs the ones that stay again)."""
        query = key.repeat_interleave(self.num_heads // self.key_heads, dim=2)  # its outputs are not looked at
        return tuple(
            hedgehog_attention(
                query,
                key,
                value,
                *learned,
                window=self.window,
                log_decay=decay,
                mask=mask,
                segment_ids=segment_ids,
                initial_state=None if state is None else HedgehogState(*state),
                return_state=True,
                chunk_size=self.chunk_size,
            )[1]
        )


def hedgehog_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    hedgehog_call: HedgehogCall | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one host layer: query (B, H, T, D), key and value (B, G, T, D) -> (B, T, H, D) and maps or None.

    The host's attention dropout is for its softmax layers alone: weights of a state are summed before they could be dropped.
    """
    if hedgehog_call is None:
        raise ValueError(
            "this layer belongs to a Hedgehog model: call that model, not its host, because positions and states are prepared "
            'there. A dense model of the same configuration takes a copy of it and `attn_implementation="sdpa"`'
        )
    core, softcap = getattr(module, "hedgehog", None), kwargs.get("softcap")
    if core is None:
        return softmax_attention(module, query, key, value, hedgehog_call, scaling, dropout, softcap, kwargs)
    mixed, maps = core(*(x.transpose(1, 2) for x in (query, key, value)), hedgehog_call, scaling, softcap)
    return mixed, None if maps is None else maps.to(query.dtype)


def register_attention() -> None:
    """Make the registry know the attention function; harmless when repeated."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, hedgehog_attention_forward)
