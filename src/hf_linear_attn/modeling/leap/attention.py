"""The LEAP mechanism as a layer: projections, positions, state, and what a configuration may set around them."""

from functools import partial

import torch
from torch import nn

from ..shared.call import Call, takes_call
from ..shared.layer_output import LayerOutput, check_state, refuse_maps_after, shown_weights
from ..shared.layers.gated_output import GatedOutput
from ..shared.layers.half_lives import HalfLives
from ..shared.layers.short_convolution import ShortConvolution
from ..shared.positions import apply_position_factors
from ..shared.windowed_mean import attention_rows, state_shapes, windowed_mean
from .configuration_leap import LeapConfig
from .formula import averaged, focus_weights
from .mechanism import leap_mechanism


class LeapAttention(HalfLives, nn.Module):
    """The LEAP mechanism as a layer on `(B, T, d)` tensors; usable in any network.

    Args:
        config (`LeapConfig`): sizes, focus function, dropout, positions.
        layer_idx (`int`, defaults to 0): which of `config.layer_windows` applies, and the place in a cache.

    O(T) time and memory. No output projection, unless `config.output_projection` (specification, section 2).
    """

    def __init__(self, config: LeapConfig, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        kind = config.layer_kinds[layer_idx]
        self.window = kind.window
        self.width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta if config.position_embedding_type == "rotary" else None
        self.exponential = config.focus_function == "exp"
        self.qfkv_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.attention_dropout or 0.0)
        self.convolution = self.output = None
        self.set_half_lives(config.half_lives if kind.name == "decay" else None)
        if config.conv_kernel is not None:
            self.convolution = ShortConvolution(config.hidden_size, config.conv_kernel)
        parts = config.head_norm, config.output_gate, config.output_projection
        if any(parts):
            self.output = GatedOutput(config.hidden_size, self.num_heads, *parts, eps=config.layer_norm_eps)
        more = {
            "weights that fade": self.half_lives,
            "short convolution": self.convolution,
            "norm, gate or projection behind the heads": self.output,
        }
        self.options = tuple(name for name, part in more.items() if part is not None)  # beyond the published layer's

    @takes_call(
        "attention_mask",
        "position_ids",
        "segment_ids",
        "cache",
        "state",
        "return_state",
        "output_attentions",
        "output_focus_weights",
    )
    def forward(self, hidden_states: torch.Tensor, call: Call) -> LayerOutput:
        """Mix tokens causally.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`).
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 keeps; padding may stand anywhere.
            position_ids (`torch.Tensor` of shape `(B, T)` or `(1, T)`, *optional*): for rotary positions; counted if not given.
            segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): non-decreasing document numbers, to restart at each.
            cache (`Cache`, *optional*): read and updated at `layer_idx`; instead of `state`.
            state, return_state: the tensors an earlier call returned, and whether to return them (see `windowed_mean`).
            output_attentions (`bool`): also build the (B, H, T, T) rows behind the means; O(T^2).
            output_focus_weights (`bool` or `"log"`): also return the focus weights (B, H, T), or their logarithms, which no exp
                focus overflows.
            call (`Call`, *optional*): all of these but `hidden_states`, as a model hands them to its layers.

        Returns:
            [`LayerOutput`].
        """
        if self.convolution is None:
            output = self.mix(self.qfkv_proj(hidden_states), call)
        else:
            hidden_states, inputs = self.convolved(hidden_states, call), hidden_states
            output = self.mix(self.qfkv_proj(hidden_states), call, inputs)
        if self.output is None:
            return output
        mixed = output.hidden_states.unflatten(-1, (self.num_heads, self.head_dim))
        return output._replace(hidden_states=self.output(mixed, hidden_states))

    def mix(self, projected: torch.Tensor, call: Call, inputs: torch.Tensor | None = None) -> LayerOutput:
        """`forward` from the projections (B, T, 4 d) to the heads' outputs; `inputs` (B, T, d) are those of the convolution."""
        projected = projected.unflatten(-1, (4, self.num_heads, self.head_dim))  # queries, focus, keys, values
        before = self._state_before(projected, call)
        state = before if before is None or inputs is None else before[:-1]
        rotated, decay = self.rotated(projected, call), self.decay()
        mixed, state = leap_mechanism(
            projected,
            self.window,
            rotated=rotated,
            exponential=self.exponential,
            dropout=self.dropout.p if self.training else 0.0,
            mask=call.mask,
            segment_ids=call.segment_ids,
            initial_state=state,
            return_state=call.wants_state,
            layout=self._layout(projected, call),
            decay=decay,
        )
        if inputs is not None and call.wants_state:
            state = *state, self._taps(inputs, call, before)
        layer_cache, weights = call.layer_cache(self.layer_idx), None
        if call.wants_maps or (layer_cache is not None and layer_cache.record_past):
            weights = focus_weights(projected[:, :, 1], projected[:, :, 2], self.exponential)  # (B, T, H)
        if layer_cache is not None:
            advance = partial(self._advance, decay)  # the weights may be elsewhere when tokens are undone
            replay = advance, (averaged(projected, rotated), weights, call.mask, call.segment_ids, inputs)
            layer_cache.update_state(state, projected.shape[1], call.mask, replay, call.segment_ids)
        rows, shown = self._maps(weights, call) if call.wants_maps else (None, None)
        return LayerOutput(mixed.flatten(2), rows, shown, state if call.return_state else None)

    def _state_before(self, inputs, call):
        """What tokens before `inputs` (B, ...) left; None at the beginning of a text."""
        state = call.state_of(self.layer_idx)
        if state is not None:
            shapes = state_shapes((2, self.num_heads, self.head_dim), self.window, self.exponential)
            count = len(shapes) + (self.convolution is not None)
            check_state(state, self.layer_idx, count, (inputs.shape[0], *shapes[0]))
        if call.output_attentions:
            refuse_maps_after(state)
        return state

    def convolved(self, hidden_states, call):
        """The layer's input (B, T, d) after the short convolution, if it has one."""
        if self.convolution is None:
            return hidden_states
        state = self._state_before(hidden_states, call)
        layout = call.layout(*hidden_states.shape[:2], hidden_states.device)
        return self.convolution(hidden_states, layout, None if state is None else state[-1])

    def _taps(self, inputs, call, state):
        """The convolution's part of the state: its last inputs."""
        layout = call.layout(*inputs.shape[:2], inputs.device)
        return self.convolution.state_after(inputs, layout, None if state is None else state[-1])

    def rotated(self, projected, call):
        """Queries and keys (B, T, H, D) turned by their positions, or None."""
        if self.rope_theta is None:
            return None
        at = call.positioned(projected)
        factors = at.position_factors("rotary", self.head_dim, self.rope_theta, projected.dtype)
        return tuple(apply_position_factors(projected[:, :, i], factors) for i in (0, 2))

    def _layout(self, projected, call):
        """Where the real tokens stand, if that matters: a window counts them."""
        if call.mask is None or self.window is None:
            return None
        return call.layout(*projected.shape[:2], projected.device)

    def _maps(self, weights, call):
        """Attention rows (B, H, T, T) and focus weights (B, H, T), each None unless it was asked for."""
        rows = shown = None
        if call.output_attentions:
            rows = attention_rows(
                weights,
                self.window,
                log_weights=self.exponential,
                mask=call.mask,
                segment_ids=call.segment_ids,
                decay=self.decay(),
            )
        if call.output_focus_weights:
            shown = shown_weights(weights, self.exponential, call.mask, call.output_focus_weights)
        return rows, shown

    def _advance(self, decay, before, key_value, weights, mask, segment_ids, inputs):
        """The state after more inputs alone: how a cache undoes tokens (it runs the ones that stay again)."""
        state = windowed_mean(
            key_value.to(weights.dtype),
            weights,
            self.window,
            log_weights=self.exponential,
            mask=mask,
            segment_ids=segment_ids,
            initial_state=before if before is None or inputs is None else before[:-1],
            return_state=True,
            decay=decay,
        )[1]
        return state if inputs is None else (*state, self._taps(inputs, Call(mask, None, segment_ids), before))
