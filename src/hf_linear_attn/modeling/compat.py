"""Every name of Transformers and PyTorch outside their documented surface that this package touches, in one place.

Checked on transformers 5.17 and 5.23, PyTorch 2.11 and 2.13. When a release moves one of them, this is the only file to change.
"""

import torch
from torch._subclasses.fake_tensor import is_fake
from transformers import initialization as init
from transformers.activations import GELUActivation
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, LinearAttentionLayer
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import and_masks, create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# Private attributes of Transformers' classes that ours set, override or read, and what for.
PRIVATE_HOOKS = {
    "_attn_implementation": "which attention function the softmax layers of a hybrid, or a distilled teacher, use",
    "_can_compile_fullgraph": "generate() may compile the decoding step",
    "_can_record_outputs": "hidden states and attention maps are collected by hooks",
    "_compiled_call_impl": "a block that was compiled by itself is called, not taken apart (PyTorch's)",
    "_forward": "the model's part of a pipeline",
    "_fsdp_plan": "modules that FSDP2 shards each for itself, gathered from the parts of a model",
    "_hf_peft_config_loaded": "a model with adapters of its own saves these alone, and no code",
    "_init_weights": "first values of a module's parameters",
    "_is_stateful": "whether generate() must leave out what undoes tokens",
    "_layer_type": "enters a cache layer into the table for dynamic caches",
    "_no_split_modules": "blocks that device_map, FSDP and DeepSpeed keep whole",
    "_prepare_cache_for_generation": "generate() makes caches that can be saved and forked",
    "_prepare_inputs": "Trainer puts a batch on the device",
    "_sanitize_parameters": "arguments of a pipeline, sorted by its three steps",
    "_skip_keys_device_placement": "caches stay where their layers are",
    "_supports_attention_backend": "softmax layers of a hybrid choose their attention function",
    "_supports_flex_attn": "likewise",
    "_supports_sdpa": "likewise",
    "_tied_weights_keys": "the output layer shares the embedding's weights",
    "_valid_auto_compile_criteria": "generate() compiles by itself for static caches only",
}


def keep_logits(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of `hidden_states` (B, T, d) that logits are wanted for: the last n (0: all), or those of an index tensor."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))


def can_read_values(tensor: torch.Tensor) -> bool:
    """Whether the tensor holds values now that Python may look at.

    Not while the code is traced, transformed by `torch.func` or recorded in a CUDA graph, nor in a `FakeTensorMode`, where a
    model runs for its shapes and memory alone.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_fake(tensor):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a function transform (`torch.func.grad`, `vmap`, ...) looks at this tensor: custom backwards cannot follow it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "PRIVATE_HOOKS",
    "STATIC_LAYER_TYPE_MAPPING",
    "CacheLayerMixin",
    "ForCausalLMLoss",
    "GELUActivation",
    "GenerationMode",
    "GradientCheckpointingLayer",
    "LinearAttentionLayer",
    "OutputRecorder",
    "and_masks",
    "can_read_values",
    "can_return_tuple",
    "capture_outputs",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "custom_object_save",
    "init",
    "is_transformed",
    "keep_logits",
    "merge_with_config_defaults",
    "modeling_auto",
]
