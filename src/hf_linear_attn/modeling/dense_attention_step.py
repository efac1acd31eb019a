"""When a layer of causal DenseAttention decodes one token through its kernel."""

import torch

from .backend import runs_triton
from .dense_attention_state import window_shift
from .plain_layers import weight_dtype
from .recurrent_cache import RecurrentStateLayer
from .step_linear import KERNEL_DTYPES, step_linear

LARGEST_STEP_RING = 2**14  # window times head size: a program holds the keys and values of a head
LARGEST_STEP_HEAD = 1024


def dense_attention_step(attention, hidden_states, layer_cache, context) -> torch.Tensor | None:
    """The output (B, 1, d) of a `DenseAttention` for one more token, its state taken along in place; None for the plain spelling.

    hidden_states (B, 1, d): normalised and scaled.
    """
    if hidden_states.shape[1] != 1 or layer_cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    factors = context.factors[attention.pattern]
    if not runs_triton(hidden_states, _obstacle(attention, hidden_states, layer_cache, context, factors)):
        return None
    from .dense_attention_step_triton import step_kernel

    query = step_linear(attention.query_proj, hidden_states)
    (memory, count), counts, length = layer_cache.take_step()
    shift = window_shift(attention.pattern, attention.window)
    turned = [name in attention.scheme for name in "qkv"] if factors is not None else [False] * 3
    out = step_kernel(
        query[:, 0], hidden_states[:, 0], factors, turned, memory, count, attention.pattern, attention.window, shift
    )
    counters = [x for x in (count, counts, length) if x is not None]
    if context.counters is None:
        torch._foreach_add_(counters, 1)
    else:
        context.counters += counters
    return out[:, None]


def _obstacle(attention, hidden_states, layer, context, factors) -> str | None:
    """Why the kernel cannot do this step, or None."""
    if type(layer) is not RecurrentStateLayer or layer.record_past or layer.get_state() is None:
        return "the cache has no state that may change in place"
    if context.layout.mask is not None or context.layout.segment_ids is not None:
        return "it knows neither padding nor documents"
    if attention.training or torch.is_autocast_enabled(hidden_states.device.type):
        return "it neither drops nor converts anything"
    if hidden_states.dtype not in KERNEL_DTYPES or weight_dtype(attention.query_proj) != hidden_states.dtype:
        return f"it takes float32, bfloat16 or float16 throughout, not {hidden_states.dtype}"
    if factors is not None and attention.scheme == ["qkv"]:
        return "the queries are made of turned inputs"
    head = hidden_states.shape[2] // attention.num_heads
    if head > LARGEST_STEP_HEAD or (attention.pattern == "sw" and head * attention.window > LARGEST_STEP_RING):
        return f"heads end at {LARGEST_STEP_HEAD} features, rings of a head at {LARGEST_STEP_RING} numbers"
    memory = layer.get_state()[0]
    wide = attention.pattern == "sw" or memory.dtype == torch.float32
    if not wide or not memory.is_contiguous() or memory.shape[0] != hidden_states.shape[0]:
        return "the state is not float32 or of another batch"
    return None
