"""Whether a layer may be replaced by the products with its weight."""

from torch import nn


def is_plain(layer: nn.Module) -> bool:
    """Whether a projection is its weight and nothing more, so that its matrix may be used instead of it.

    An adapter, a quantized or sharded weight, or a hook is more; so is a transposed weight, which kernels would read by rows.
    """
    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.is_contiguous()
    return plain and not has_hooks(layer)


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody waits for the layer to be called: a hook, or a `forward` put in its place (as offloading does)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in vars(layer)
