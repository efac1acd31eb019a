"""Why a fast path does not cover a call: the questions that all of them ask, each written once.

Every function returns None where its condition holds, and otherwise the reason why not, for a person to read. A path's `covers`
joins them with `or`: the first reason is the answer.
"""

import torch
from torch import nn

from .dispatch import chosen_backend
from .plain_layers import has_hooks, is_plain
from .tracing import converts, is_transformed, records_gradients

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inference_only() -> str | None:
    """No gradients are recorded."""
    return "gradients are recorded (it has no backward): use torch.no_grad()" if records_gradients() else None


def training_only() -> str | None:
    """Gradients are recorded."""
    return None if records_gradients() else "no gradients are recorded (it saves work in backward)"


def dtypes_as_written(tensor: torch.Tensor) -> str | None:
    """No autocast."""
    return f"autocast is on for {tensor.device.type}, and it converts nothing" if converts(tensor) else None


def untransformed(tensor: torch.Tensor) -> str | None:
    """No function transform."""
    return (
        "a function transform of torch.func (grad, vmap, ...) cannot look into it" if is_transformed(tensor) else None
    )


def plain(*layers: nn.Module | None, kind: type[nn.Module] = nn.Linear, bias: bool = False) -> str | None:
    """Layers that are their weights and nothing more: no adapter, quantization, sharding, pruning, offloading, hook."""
    for layer in layers:
        if layer is None or not is_plain(layer, kind):
            return _what_more(layer, kind)
        if bias and layer.bias is None:
            return f"a {kind.__name__} has no bias"
    return None


def _named(layer) -> str:
    return f"a {type(layer).__name__} of {type(layer).__module__.partition('.')[0]}"


def _what_more(layer: nn.Module | None, kind: type[nn.Module]) -> str:
    if type(layer) is not kind:
        return f"a layer is more than a {kind.__name__} with its weight: {_named(layer)} (adapted, quantized, ...)"
    weight = type(layer.weight).__name__
    return unhooked(layer) or (
        f"a layer is more than a {kind.__name__} with its weight, which is a {weight} or transposed (quantized, sharded, ...)"
    )


def no_bias(*layers: nn.Module) -> str | None:
    """Layers without a bias."""
    return "a layer has a bias" if any(layer.bias is not None for layer in layers) else None


def unhooked(*modules: nn.Module) -> str | None:
    """No hook would miss its call."""
    for module in modules:
        if has_hooks(module):
            return f"a forward or backward hook is registered on {type(module).__name__}, or its forward was replaced"
    return None


def one_dtype(*tensors: torch.Tensor) -> str | None:
    """One dtype throughout, of those that kernels compute in."""
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors})
    if len(dtypes) > 1 or tensors[0].dtype not in KERNEL_DTYPES:
        return f"it takes float32, bfloat16 or float16 throughout, not {' and '.join(dtypes)}"
    return None


def on_cuda(tensor: torch.Tensor) -> str | None:
    """A tensor on a GPU, for paths that are no Triton kernels."""
    return None if tensor.is_cuda else f"it is made for CUDA devices, the input is on {tensor.device}"


def torch_not_asked_for() -> str | None:
    """No `use_backend("torch")`, which means plain PyTorch: of paths that no Triton kernel makes faster."""
    return 'use_backend("torch") is in force' if chosen_backend() == "torch" else None


def kernel_dtype(tensor: torch.Tensor, *_) -> str | None:
    """A dtype that kernels compute in."""
    return one_dtype(tensor)


def at_most(name: str, value: int, most: int) -> str | None:
    """A size up to a bound."""
    return f"its {name} ends at {most:,}, this one is {value:,}" if value > most else None


def without(parts: tuple[str, ...]) -> str | None:
    """A layer without these parts, which it has beside what was published."""
    return f"it has no {' and no '.join(parts)}" if parts else None


class NextPath(str):
    """A reason after which the next path of the table is as good: `use_backend("triton")` makes no error of it."""


def float32(name: str, tensor: torch.Tensor) -> str | None:
    """Single precision alone."""
    return None if tensor.dtype == torch.float32 else f"it takes float32 {name}, not {tensor.dtype}"
