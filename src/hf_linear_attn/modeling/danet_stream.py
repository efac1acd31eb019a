"""The blocks of a DANet without gradients on a GPU: the norms between two blocks in one pass over memory.

Between the products of two blocks stand a norm, a residual sum and a norm: h <- h + Norm_post(y), x = s Norm_pre(h). Apart, they
read and write (B, T, d) five times. Here they take three: the stream is carried as x and one number a row, h = x (size / s),
which rounds h no more often than storing h would. With padding, where s is 0, h is stored as well: four.
"""

from itertools import pairwise

import torch

from .backend import runs_triton
from .danet_block import DanetBlock
from .danet_norms import VectorNorm, kernel_obstacle
from .plain_linear import has_hooks

SLICE_TOKENS = 2**30  # tokens that go through all blocks together


def _plain_max_norm(norm) -> bool:
    return isinstance(norm, VectorNorm) and norm.scale is None and not norm.mean and not has_hooks(norm)


def can_stream(layers, hidden_states: torch.Tensor) -> bool:
    """Whether `stream_blocks` can run these layers on (B, T, d): MaxNorm blocks, no gradients, nobody who watches a block."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or hidden_states.shape[1] == 0 or not len(layers):
        return False
    for layer in layers:
        if not isinstance(layer, DanetBlock) or has_hooks(layer):
            return False
        if not _plain_max_norm(layer.pre_norm) or not _plain_max_norm(layer.post_norm):
            return False
    # A layer compiled by itself fuses within the block, and would not be called here.
    if any(layer._compiled_call_impl is not None for layer in layers):
        return False
    return runs_triton(hidden_states, kernel_obstacle(hidden_states, None))


def stream_blocks(layers, hidden_states: torch.Tensor, context, past_key_values=None) -> torch.Tensor:
    """h_L (B, T, d) after all blocks, equal to calling them one by one.

    Rows do not see each other, so a large batch goes through all blocks a few rows at a time: what passes between two products
    then stays in the processor's cache.
    """
    rows = max(1, SLICE_TOKENS // hidden_states.shape[1])
    alone = context.layout.mask is None and context.layout.segment_ids is None and past_key_values is None
    if not alone or hidden_states.shape[0] <= rows or any(x is not None for x in context.factors.values()):
        return _stream(layers, hidden_states, context, past_key_values)
    return torch.cat([_stream(layers, part, context, None) for part in hidden_states.split(rows)])


def _stream(layers, hidden_states, context, past_key_values):
    from .danet_norms_triton import between_blocks

    first, lazy = layers[0], context.keep is None
    normed, stream, factor = first.pre_norm(hidden_states, context.input_scales[first.pattern]), hidden_states, None
    for block, following in pairwise(layers):
        added, _ = block.mix(normed, context, past_key_values)
        scale, eps = context.input_scales[following.pattern], (block.post_norm.eps, following.pre_norm.eps)
        normed, carried = between_blocks(added, stream, factor, context.keep, scale, *eps, lazy)
        stream, factor = (normed, carried) if lazy else (carried, None)
    added, _ = layers[-1].mix(normed, context, past_key_values)
    if factor is not None:
        stream = (stream * factor).to(added.dtype)
    return layers[-1].post_norm(added, context.keep, residual=stream)
