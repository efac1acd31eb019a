"""What all layers of one forward share: the call, and what of it DANet's layers use in a form of their own."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import torch

from ..shared.call import Call
from ..shared.positions import PositionFactors, position_factors
from ..shared.precision import accumulation_dtype
from ..shared.token_order import TokenLayout, take_tokens
from .configuration_danet import RELATIVE_POSITIONS, SOFTMAX_PATTERNS, DanetConfig
from .state import window_shift

SHARED = tuple(x.name for x in fields(Call))


@dataclass(frozen=True)
class DanetCall(Call):
    """A `Call` with, made at the beginning of a forward by `danet_call`:

    tokens: where the real tokens stand.
    keep: (B, T, 1), 1 for real tokens and 0 for padding, or None without padding. It multiplies what a block adds.
    input_scales: by code, (B or 1, T or 1, 1): n^(-1/3) or w^(-1/3), and 0 for padding. They multiply a layer's input.
    factors: by code, the position multipliers in the order that such layers work in; None without positions.
    softmax_masks: by code, the masks of `DanetSoftmaxAttention` layers.
    softmax_factors: their rotary positions, or None without such layers or without positions.
    """

    tokens: TokenLayout | None = None
    keep: torch.Tensor | None = None
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, PositionFactors | None] = field(default_factory=dict)
    softmax_masks: dict[str, torch.Tensor | None] = field(default_factory=dict)
    softmax_factors: PositionFactors | None = None


def works_in_slots(code: str, tokens: TokenLayout) -> bool:
    """Whether layers of this code move the real tokens to the front. A global sum over a row needs no order."""
    return tokens.order is not None and (code != "g" or tokens.segment_ids is not None)


def danet_call(call: Call, config: DanetConfig, hidden_states: torch.Tensor, layers: Iterable[int]) -> DanetCall:
    """Prepare the layers with these indices for a call about `hidden_states` (B, T, d), which tells shape, dtype and device."""
    batch, length = hidden_states.shape[:2]
    codes, kinds = config.layer_codes, config.layer_kinds
    dense = [i for i in layers if kinds[i].name not in SOFTMAX_PATTERNS]
    by_code = {codes[i]: kinds[i] for i in dense}
    state = call.state_of(dense[0]) if dense else None  # it counts the tokens that came before
    tokens = call.layout(batch, length, hidden_states.device, None if state is None else state[1])
    wide = accumulation_dtype(hidden_states.dtype)
    keep = None if tokens.mask is None else tokens.mask[..., None].to(wide)
    device = hidden_states.device
    scales = {code: _input_scale(config, kind, tokens, keep, length, wide, device) for code, kind in by_code.items()}
    factors = _position_factors(config, by_code, call.position_ids, tokens, hidden_states)
    own = {name: getattr(call, name) for name in SHARED}
    own["segment_ids"] = _documents_of_tokens(tokens)  # padding belongs to the document before it
    return DanetCall(**own, tokens=tokens, keep=keep, input_scales=scales, factors=factors)


def _documents_of_tokens(tokens: TokenLayout) -> torch.Tensor | None:
    """The document (B, T) of each token, from a layout that has those of slots."""
    if tokens.segment_ids is None or tokens.slots is None:
        return tokens.segment_ids
    return tokens.segment_ids.gather(1, tokens.slots)


def _input_scale(config, kind, tokens, keep, length, dtype, device) -> torch.Tensor:
    """n^(-1/3) with n the real tokens of the document, the fixed `scale_length`, or the window. Specification 1.6.

    1 where terms fade, whose factors are the share of each in a mean already.
    """
    if kind.name != "g":
        size = 1 if kind.window is None else kind.window
        scale = torch.full((1, 1, 1), size ** (-1 / 3), dtype=dtype, device=device)
    elif config.scale_mode == "fixed":
        scale = torch.full((1, 1, 1), config.scale_length ** (-1 / 3), dtype=dtype, device=device)
    else:
        if tokens.document_sizes is not None:
            number = tokens.document_sizes[..., None]
        elif tokens.lengths is not None:
            number = tokens.lengths[:, None, None]
        else:
            number = torch.full((1, 1, 1), length, device=device)
        scale = number.clamp(min=1).to(dtype) ** (-1 / 3)
    return scale if keep is None else scale * keep


def _position_factors(config, kinds, position_ids, tokens, hidden_states) -> dict[str, PositionFactors | None]:
    """By code; codes whose tokens stand at the same positions share them."""
    kind = config.position_embedding_type
    if kind not in RELATIVE_POSITIONS:
        return dict.fromkeys(kinds)
    if position_ids is None:
        position_ids = tokens.ranks
    head_dim = config.hidden_size // config.num_attention_heads
    made, by_code = {}, {}
    for code, (name, window) in kinds.items():
        local, shift = config.local_relpe and name in ("l", "sl"), window_shift(name, window)
        in_slots = works_in_slots(code, tokens)
        key = local and window, shift, in_slots
        if key not in made:
            positions = tokens.ranks if local else position_ids
            if shift:
                positions = positions + shift
            if local:
                positions = positions % window
            if in_slots:
                positions = take_tokens(positions.expand(tokens.order.shape[0], -1), tokens.order)
            made[key] = position_factors(kind, positions, head_dim, config.rope_theta, hidden_states.dtype)
        by_code[code] = made[key]
    return by_code
