"""The feed-forward layer down(GELU(up(x))) in training, without keeping what GELU gives."""

import torch
from torch import nn

from .backend import runs_triton
from .compat import is_transformed
from .plain_layers import is_plain


def gelu_feed_forward(
    up: nn.Module, down: nn.Module, x: torch.Tensor, inner: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`down(gelu(up(x)))` with the exact GELU, or None where the kernels cannot do it or have nothing to gain.

    `inner` is the first product without its bias, where it has been formed already (x then gives no more than its kind).

    The activation is four times as wide as the model: it is formed again in backward, in the pass that reads its input for the
    derivative anyway, and the gradient of the first bias is summed there, too.
    """
    if not torch.is_grad_enabled() or not runs_triton(x, gelu_linear_obstacle(up, down, x)):
        return None
    from .gelu_linear_triton import gelu_linear

    inner = nn.functional.linear(x, up.weight) if inner is None else inner
    return gelu_linear(inner, up.bias, down.weight, down.bias)


def gelu_linear_obstacle(up, down, x) -> str | None:
    """Why the kernels cannot do this layer, or None."""
    if not is_plain(up) or not is_plain(down) or up.bias is None:
        return "a layer is more than its weight and bias"
    if torch.is_autocast_enabled(x.device.type) or is_transformed(x):
        return "they neither convert nor know function transforms"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or {up.weight.dtype, down.weight.dtype} != {
        x.dtype
    }:
        return f"they take float32, bfloat16 or float16 throughout, not {x.dtype}"
    return None
