"""When a LEAP block decodes one token through its fused kernels."""

import torch
from torch import nn

from .backend import runs_triton
from .compat import GELUActivation
from .plain_layers import has_hooks, is_plain
from .recurrent_cache import RecurrentStateLayer
from .step_linear import KERNEL_DTYPES, LARGEST_STEP_BATCH

LARGEST_STEP_WIDTH = 8192
LARGEST_STEP_WINDOW = 257


def leap_block_step(block, hidden_states, attention_mask, cache, return_state, kwargs) -> torch.Tensor | None:
    """The output (B, 1, d) of a block for one more token, the cache taken along; None where the plain spelling must run.

    `block` is a `LeapBlock`; the other arguments are those of its `forward`.
    """
    if hidden_states.shape[1] != 1 or cache is None or attention_mask is not None or return_state:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if any(kwargs.get(name) not in (None, False) for name in ("output_attentions", "output_focus_weights")) or any(
        kwargs.get(name) is not None for name in ("state", "segment_ids")
    ):
        return None
    layer = cache.layers[block.attention.layer_idx]
    if not runs_triton(hidden_states, _obstacle(block, hidden_states, layer, kwargs)):
        return None
    from .leap_step_triton import step_kernels

    state, counts, length = layer.take_step()
    return step_kernels(block, hidden_states[:, 0], kwargs.get("position_ids"), state, counts, length)[:, None]


def _obstacle(block, hidden_states, layer, kwargs) -> str | None:
    """Why the kernels cannot do this step, or None."""
    attention, mlp = block.attention, block.mlp
    batch, _, width = hidden_states.shape
    if type(layer) is not RecurrentStateLayer or layer.record_past or layer.get_state() is None:
        return "the cache has no state that may change in place"
    if attention.exponential or type(mlp.activation) is not GELUActivation:
        return "they know the focus weight elu + 1 and the exact GELU"
    if attention.rope_theta is not None and kwargs.get("position_ids") is None:
        return "rotary positions are not given"
    if batch > LARGEST_STEP_BATCH or width > LARGEST_STEP_WIDTH or (attention.window or 0) > LARGEST_STEP_WINDOW:
        return f"batch, width or window exceed {LARGEST_STEP_BATCH}, {LARGEST_STEP_WIDTH}, {LARGEST_STEP_WINDOW}"
    if block.training or torch.is_autocast_enabled(hidden_states.device.type):
        return "they neither drop nor convert anything"
    norms, linears = (block.attention_norm, block.mlp_norm), (attention.qfkv_proj, mlp.up_proj, mlp.down_proj)
    plain = all(is_plain(x, nn.LayerNorm) and x.bias is not None for x in norms) and all(is_plain(x) for x in linears)
    if not plain or any(has_hooks(x) for x in (attention, mlp, mlp.activation)):
        return "a layer of the block is more than its weights"
    dtypes = {hidden_states.dtype, *(x.weight.dtype for x in (*norms, *linears))}
    if len(dtypes) > 1 or hidden_states.dtype not in KERNEL_DTYPES:
        return f"they take float32, bfloat16 or float16 throughout, not {dtypes}"
    if any(x.dtype != torch.float32 or not x.is_contiguous() or x.shape[0] != batch for x in layer.get_state()):
        return "the state is not float32 or of another batch"
    return None
