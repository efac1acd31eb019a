"""Whether a layer may be replaced by what stands in it: the question that every fast path asks first.

Libraries put their work where a layer is called: adapters, quantization, pruning, offloading, hooks. So a layer with weights is
called, unless it is known to be its weights and nothing more.
"""

import torch
from torch import nn

from .tracing import has_global_hooks


def is_plain(layer: nn.Module | None, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer is a `kind` with its weight and bias and nothing more, so that these may be used instead of it.

    An adapter, a subclass, a quantized, sharded, pruned, reparametrized or offloaded weight, or a hook is more; so is a
    transposed weight, which kernels would read by rows.
    """
    if layer is None or type(layer) is not kind or has_hooks(layer):
        return False
    weight, bias = layer.weight, layer.bias
    return type(weight) is nn.Parameter and weight.is_contiguous() and (bias is None or type(bias) is nn.Parameter)


def has_hooks(layer: nn.Module) -> bool:
    """Whether a hook is registered on the layer, or a `forward` was put in the place of its own (as offloading does)."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in vars(layer) or has_global_hooks()


def weight_dtype(layer: nn.Module) -> torch.dtype | None:
    """The dtype that a layer's weight has, None where it shows none or packs its numbers (quantized layers)."""
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None


def table_rows(embedding: nn.Module) -> int | None:
    """How many ids an embedding has rows for; None where only its own forward knows (an adapter's, or a user's own)."""
    if isinstance(embedding, nn.Embedding) and type(embedding).forward is nn.Embedding.forward:
        return embedding.num_embeddings
    return None
