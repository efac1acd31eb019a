"""What all layers of one forward share: the token layout, the scales of their inputs and the tables of their positions."""

from dataclasses import dataclass, field

import torch

from ..shared.positions import PositionFactors, position_factors
from ..shared.precision import accumulation_dtype
from ..shared.token_order import TokenLayout, take_tokens, token_layout
from .configuration_danet import RELATIVE_POSITIONS, DanetConfig
from .state import window_shift


@dataclass(frozen=True)
class DanetContext:
    """Computed once per forward by `build_context`, read by every layer, changed by none.

    layout: where the real tokens stand.
    keep: (B, T, 1), 1 for real tokens and 0 for padding, or None without padding. It multiplies what a block adds.
    input_scales: by pattern, (B or 1, T or 1, 1): n^(-1/3) or w^(-1/3), and 0 for padding. They multiply a layer's input.
    factors: by pattern, the position multipliers in the order that the pattern's layers work in; None without positions.
    softmax_masks: by pattern, the masks of softmax layers.
    softmax_positions: the rotary positions of softmax layers, or None without such layers.
    """

    layout: TokenLayout
    keep: torch.Tensor | None
    input_scales: dict[str, torch.Tensor]
    factors: dict[str, PositionFactors | None]
    softmax_masks: dict[str, torch.Tensor | None] = field(default_factory=dict)
    softmax_positions: PositionFactors | None = None


def works_in_slots(pattern: str, layout: TokenLayout) -> bool:
    """Whether layers of this pattern move the real tokens to the front. A global sum over a row needs no order."""
    return layout.order is not None and (pattern != "g" or layout.segment_ids is not None)


def build_context(
    config: DanetConfig,
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    seen_tokens: torch.Tensor | None = None,
    patterns: set[str] | None = None,
) -> DanetContext:
    """Prepare the layers of a forward over `(B, T, d)`.

    Args:
        config: of the model.
        hidden_states: (B, T, d), for shape, dtype and device.
        mask: (B, T) bool, 1 keeps, or None.
        position_ids: (B or 1, T), or None for the ranks.
        segment_ids: (B or 1, T) documents, or None.
        seen_tokens: (B,) tokens of the first document held by a cache.
        patterns: codes of the layers that will ask; all of `config` by default.
    """
    batch, length = hidden_states.shape[:2]
    layout = token_layout(batch, length, hidden_states.device, mask, segment_ids, seen_tokens)
    wide = accumulation_dtype(hidden_states.dtype)
    keep = None if layout.mask is None else layout.mask[..., None].to(wide)
    if patterns is None:
        patterns = set(config.layer_codes)
    patterns = {code for code in patterns if "@" not in code and code != "softmax"}
    scales = {code: _input_scale(config, code, layout, keep, length, wide, hidden_states.device) for code in patterns}
    positions = layout.ranks if position_ids is None else position_ids
    factors = _position_factors(config, patterns, layout, positions, hidden_states)
    return DanetContext(layout, keep, scales, factors)


def _input_scale(config, pattern, layout, keep, length, dtype, device) -> torch.Tensor:
    """n^(-1/3) with n the real tokens of the document, the fixed `scale_length`, or the window. Specification 1.6."""
    if pattern != "g":
        scale = torch.full((1, 1, 1), config.window_size ** (-1 / 3), dtype=dtype, device=device)
    elif config.scale_mode == "fixed":
        scale = torch.full((1, 1, 1), config.scale_length ** (-1 / 3), dtype=dtype, device=device)
    else:
        if layout.document_sizes is not None:
            number = layout.document_sizes[..., None]
        elif layout.lengths is not None:
            number = layout.lengths[:, None, None]
        else:
            number = torch.full((1, 1, 1), length, device=device)
        scale = number.clamp(min=1).to(dtype) ** (-1 / 3)
    return scale if keep is None else scale * keep


def _position_factors(config, patterns, layout, position_ids, hidden_states) -> dict[str, PositionFactors | None]:
    """By pattern; patterns whose tokens stand at the same positions share them."""
    if config.position_embedding_type not in RELATIVE_POSITIONS:
        return dict.fromkeys(patterns)
    head_dim = config.hidden_size // config.num_attention_heads
    made, by_pattern = {}, {}
    for code in patterns:
        local, shift = config.local_relpe and code in ("l", "sl"), window_shift(code, config.window_size)
        in_slots = works_in_slots(code, layout)
        key = local, shift, in_slots
        if key not in made:
            positions = layout.ranks if local else position_ids
            if shift:
                positions = positions + shift
            if local:
                positions = positions % config.window_size
            if in_slots:
                positions = take_tokens(positions.expand(layout.order.shape[0], -1), layout.order)
            kind, theta, dtype = config.position_embedding_type, config.rope_theta, hidden_states.dtype
            made[key] = position_factors(kind, positions, head_dim, theta, dtype)
        by_pattern[code] = made[key]
    return by_pattern
