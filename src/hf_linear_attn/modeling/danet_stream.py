"""The blocks of a DANet on a GPU: the norms between two blocks in one pass over memory, forward and backward.

Between the products of two blocks stand a norm, a residual sum and a norm: h <- h + Norm_post(y), x = s Norm_pre(h). Apart, they
read and write (B, T, d) five times, and their gradients nine times. Here they take three and six: the stream is carried as x and
one number a row, h = x (size / s), which rounds h no more often than storing h would. With padding, where s is 0, h is stored as
well: four.
"""

from itertools import pairwise

import torch

from .backend import runs_triton
from .compat import is_transformed
from .danet_block import DanetBlock
from .danet_norms import VectorNorm, kernel_obstacle
from .plain_layers import has_hooks


def _plain_max_norm(norm) -> bool:
    return type(norm) is VectorNorm and norm.scale is None and not norm.mean and not has_hooks(norm)


def can_stream(layers, hidden_states: torch.Tensor) -> bool:
    """Whether `stream_blocks` can run these layers on (B, T, d): MaxNorm blocks, and nobody who watches a block."""
    if torch.compiler.is_compiling() or is_transformed(hidden_states) or hidden_states.shape[1] == 0 or not len(layers):
        return False
    if torch.is_autocast_enabled(hidden_states.device.type):
        return False  # the stream is wider than what a block adds
    for layer in layers:
        if type(layer) is not DanetBlock or has_hooks(layer):
            return False
        if not _plain_max_norm(layer.pre_norm) or not _plain_max_norm(layer.post_norm):
            return False
        # A layer compiled by itself fuses within the block, and neither it nor one that runs again in backward is called here.
        if layer._compiled_call_impl is not None or (layer.training and layer.gradient_checkpointing):
            return False
    return runs_triton(hidden_states, kernel_obstacle(hidden_states, None))


def stream_blocks(layers, norm, hidden_states: torch.Tensor, context, cache=None) -> torch.Tensor:
    """Norm(h_L) (B, T, d) after all blocks, equal to calling them and the `norm` (or None) one by one."""
    from .danet_norms_triton import between_blocks, leave_stream, row_numbers

    first, lazy = layers[0], context.keep is None
    keep = row_numbers(context.keep, hidden_states)
    scales = {pattern: row_numbers(scale, hidden_states) for pattern, scale in context.input_scales.items()}
    context.counters = []
    normed, stream, factor = first.pre_norm(hidden_states, scales[first.pattern]), hidden_states, None
    for block, following in pairwise(layers):
        added, _ = block.mix(normed, context, cache)
        eps = block.post_norm.eps, following.pre_norm.eps
        normed, stream, factor = between_blocks(added, stream, factor, keep, scales[following.pattern], *eps, lazy)
    last = layers[-1]
    added, _ = last.mix(normed, context, cache)
    if context.counters:
        torch._foreach_add_(context.counters, 1)
    if norm is not None and _plain_max_norm(norm):
        return between_blocks(added, stream, factor, keep, None, last.post_norm.eps, norm.eps, factor is not None)[0]
    hidden_states = last.post_norm(added, keep, residual=leave_stream(stream, factor))
    return hidden_states if norm is None else norm(hidden_states)
