"""Positions: multipliers inside attention (rotary, cosine, cos-minus-sin), sinusoids added to embeddings.

Everything is computed from the position ids on the fly, with angles in float64: there is no table and no maximum length.
Sources: LEAP specification, section 2; DANet specification, section 4.
"""

import torch

from .precision import angle_dtype

RELATIVE_KINDS = ("rotary", "cosine", "cos_minus_sin")

PositionFactors = tuple[torch.Tensor, torch.Tensor | None]


def position_factors(
    kind: str, position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> PositionFactors:
    """Multipliers `(B or 1, T, 1, D)` of the positions `(B or 1, T)`, the same for every head.

    * rotary: angle t * theta^(-2j/D), j < D/2, in the half layout; the pair (cos, signed sin).
    * cosine: cos(t * theta^(-i/D)), i < D: every feature has a frequency of its own.
    * cos_minus_sin: cos(angle) - sin(angle) of the same angles.

    The second element is None where the multiplier acts on each feature alone. Raises ValueError for another kind.
    """
    compute = angle_dtype(position_ids.device)
    if kind == "rotary":
        exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=compute) / head_dim
    elif kind in RELATIVE_KINDS:
        exponent = torch.arange(head_dim, device=position_ids.device, dtype=compute) / head_dim
    else:
        raise ValueError(f"`kind` is {kind!r}; relative positions are one of {RELATIVE_KINDS}")
    angles = position_ids.to(compute)[..., None, None] * theta**-exponent  # (B, T, 1, D or D/2)
    if kind == "rotary":
        cos, sin = angles.cos(), angles.sin()
        # The minus sign of rotate_half lives in the table, so that applying it is a roll and two products.
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
    if kind == "cosine":
        return angles.cos().to(dtype), None
    return (angles.cos() - angles.sin()).to(dtype), None


def apply_position_factors(states: torch.Tensor, factors: PositionFactors | None) -> torch.Tensor:
    """Apply `position_factors` to `(B, T, H, D)`. None is the identity."""
    if factors is None:
        return states
    scale, rotation = factors
    if rotation is None:
        return states * scale
    half = states.shape[-1] // 2
    swapped = torch.cat((states[..., half:], states[..., :half]), dim=-1)
    return torch.addcmul(states * scale, swapped, rotation)


def sinusoidal_embeddings(position_ids: torch.Tensor, width: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """Vaswani's sinusoids `(B or 1, T, d)`: sine at even features, cosine at odd ones, angle t * theta^(-2i/d)."""
    compute = angle_dtype(position_ids.device)
    exponent = torch.arange(0, width, 2, device=position_ids.device, dtype=compute) / width
    angles = position_ids.to(compute)[..., None] * theta**-exponent
    pairs = torch.stack((angles.sin(), angles.cos()), dim=-1)
    return pairs.flatten(-2)[..., :width].to(dtype)
