"""The dtype of sums and states, and that of angles."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what sums, statistics and states are held in."""
    return (
        torch.float64 if dtype == torch.float64 else torch.float32
    )  # `promote_types` would be one more operation a call


def angle_dtype(device: torch.device) -> torch.dtype:
    """The dtype of angles: in float32 the angle of position 10^6 would be off by 0.06. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
