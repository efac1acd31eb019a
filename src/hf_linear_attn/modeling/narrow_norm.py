"""LayerNorm of many narrow rows, as SEA's estimator has them, and the choice of its spelling."""

import torch
from torch import nn

from .backend import runs_triton
from .plain_layers import is_plain

WIDEST = 256


def narrow_layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)`. PyTorch's CUDA kernel gives each row a block of threads, which rows of 16 to 128 numbers leave mostly idle."""
    obstacle = None
    if not is_plain(norm, nn.LayerNorm) or norm.bias is None:
        obstacle = "the norm is more than its weight and bias"
    elif len(norm.normalized_shape) != 1 or x.shape[-1] > WIDEST:
        obstacle = f"it takes rows of at most {WIDEST} features"
    elif torch.is_autocast_enabled(x.device.type) or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        obstacle = f"it takes float32, bfloat16 and float16 outside autocast, not {x.dtype}"
    elif norm.weight.dtype != x.dtype:
        obstacle = f"the weights are {norm.weight.dtype}, the rows {x.dtype}"
    if not runs_triton(x, obstacle):
        return norm(x)
    from .narrow_norm_triton import narrow_norm

    return narrow_norm(x, norm.weight, norm.bias, norm.eps)
