"""Rotary positions: features j and j + E/2 of a head turn together by position * theta^(-2j/E)."""

import torch


def angle_dtype(device: torch.device) -> torch.dtype:
    """The dtype of angles: in float32 the angle of position 10^6 would be off by 0.06. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def rotate(x: torch.Tensor, position_ids: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Turn each head's features by the token's position.

    Args:
        x (`torch.Tensor` of shape `(B, T, H, E)`, E even): queries or keys.
        position_ids (`torch.Tensor` of shape `(B, T)` or `(1, T)`): positions; there is no largest one.
        theta (`float`): base of the wavelengths.

    Returns:
        `torch.Tensor`: shape and dtype of `x`.
    """
    half = x.shape[-1] // 2
    precise = angle_dtype(x.device)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=precise) / half)
    angle = position_ids.to(precise)[..., None, None] * frequency  # (B, T, 1, E/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
