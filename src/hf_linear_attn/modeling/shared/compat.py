"""The border to Transformers: what differs between releases, and every undocumented name that this package touches.

Checked on transformers 5.17 to 5.24. When a release moves something, this is the only file to change, and
`releases` says that it is supported.

Transformers 5.24 calls `cache` what earlier releases call `past_key_values`: an argument of forward, a field of outputs, a
keyword of mask functions. Here it is `cache` throughout. A caller may use either name on every release (`either_cache_name`),
outputs answer to both, and what Transformers itself is called with carries the release's own name (`cache_keyword`).
"""

import copy
import fnmatch
import functools
import inspect
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import GELUActivation
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, DynamicLayer, LinearAttentionLayer
from transformers.generation import GenerationMode
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer as TransformersLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.bert.modeling_bert import BertEmbeddings, BertPooler
from transformers.utils import ModelOutput, can_return_tuple, find_adapter_config_file
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.hub import create_and_tag_model_card
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .releases import RELEASE

Output = TypeVar("Output", bound=ModelOutput)
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = "cache" if RELEASE >= (5, 24) else "past_key_values"  # what this release of Transformers says


def cache_keyword(cache) -> dict:
    """The keyword argument under which Transformers' functions and outputs of this release take a cache."""
    return {CACHE_NAME: cache}


def cache_of(output):
    """The cache in an output of a model, None if it holds none."""
    return output.get(CACHE_NAME)


def rename_cache(keywords: dict, name: str) -> dict:
    """`keywords` with a cache, under whichever of its two names it came, called `name`.

    Raises:
        ValueError: both names are given, and not the same cache under both.
    """
    other = CACHE_NAMES[1 - CACHE_NAMES.index(name)]
    if other not in keywords:
        return keywords
    renamed = {key: value for key, value in keywords.items() if key != other}
    cache, again = keywords[other], renamed.get(name)
    if cache is not None and again is not None and cache is not again:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them")
    renamed[name] = again if cache is None else cache
    return renamed


def either_cache_name(function):
    """Decorate a function with an argument `cache`: callers may also say `past_key_values`.

    Its signature shows the release's own name, which Transformers' tools look for.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "past_key_values" in kwargs:
            kwargs = rename_cache(kwargs, "cache")
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    named = [p.replace(name=CACHE_NAME) if p.name == "cache" else p for p in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=named)
    return wrapper


class EitherCacheName:
    """Placed before an output class of Transformers that has a cache: it answers to both names, as those of 5.24 do."""

    if CACHE_NAME == "past_key_values":

        @property
        def cache(self):
            """The cache, by the name that Transformers 5.24 gives it."""
            return self.past_key_values

        @cache.setter
        def cache(self, value):
            self.past_key_values = value

        def __contains__(self, key):
            return super().__contains__(CACHE_NAME if key == "cache" else key)

        def __getitem__(self, key):
            return super().__getitem__(CACHE_NAME if key == "cache" else key)

        def __setitem__(self, key, value):
            super().__setitem__(CACHE_NAME if key == "cache" else key, value)

        def get(self, key, default=None):
            """The value of a field, or `default`."""
            return super().get(CACHE_NAME if key == "cache" else key, default)


def answering_to_both_names(output_class: type[Output]) -> type[Output]:
    """The subclass of a Transformers output class that has `EitherCacheName`; the class itself where it answers already."""
    if CACHE_NAME == "cache" or issubclass(output_class, EitherCacheName):
        return output_class
    return _answering(output_class)


@functools.cache
def _answering(output_class):
    names = {"__module__": __name__, "__doc__": output_class.__doc__}
    made = dataclass(type(output_class.__name__, (EitherCacheName, output_class), names))
    return rebuilt_by(made, answering_to_both_names, output_class)


def rebuilt_by(made: type[ModelOutput], make, base: type[ModelOutput]) -> type[ModelOutput]:
    """`made`, an output class that stands in no module, so that its outputs can be pickled: as `make(base)` and their fields."""
    made.__reduce__ = lambda output: (_rebuild, (make, base, dict(output)))  # type: ignore[method-assign]  # a new class
    return made


def _rebuild(make, base, found: dict) -> ModelOutput:
    return make(base)(**found)


def answer_to_both_names(output):
    """An output of Transformers that has a place for a cache as one that answers to either name; anything else as it is."""
    if not isinstance(output, ModelOutput) or not hasattr(output, CACHE_NAME):
        return output
    answering = answering_to_both_names(type(output))
    return output if answering is type(output) else answering(**output)


def refuse_cache_under_checkpointing(module, cache) -> None:
    """Checkpointing runs layers twice, and Transformers takes their cache away: the context would be lost without a word."""
    runs_twice = getattr(module, "gradient_checkpointing", False) and module.training
    if cache is not None and runs_twice and (torch.is_grad_enabled() or RELEASE < (5, 24)):
        raise ValueError(
            f"`{CACHE_NAME}` cannot be updated under checkpointing, which runs layers twice: leave it out, or switch "
            "checkpointing off (`model.eval()` does)"
        )


class GradientCheckpointingLayer(TransformersLayer):
    """Transformers' layer that can be checkpointed; a cache may be given by either name, and is refused under checkpointing."""

    def __call__(self, *args, **kwargs):
        """As a module's."""
        kwargs = rename_cache(kwargs, CACHE_NAME)
        refuse_cache_under_checkpointing(self, kwargs.get(CACHE_NAME))
        return super().__call__(*args, **kwargs)


def is_output_recorder(hook) -> bool:
    """Whether a hook is one of those by which `capture_outputs` collects hidden states, once it was asked to."""
    return getattr(hook, "__module__", None) == OutputRecorder.__module__


# Private attributes of Transformers' classes that ours set, override or read, and what for.
PRIVATE_HOOKS = {
    "_attn_implementation": "which attention function the softmax layers of a hybrid, or a distilled teacher, use",
    "_can_compile_fullgraph": "generate() may compile the decoding step",
    "_can_record_outputs": "hidden states and attention maps are collected by hooks",
    "_compiled_call_impl": "a block that was compiled by itself is called, not taken apart (PyTorch's)",
    "_forward": "the model's part of a pipeline",
    "_hf_peft_config_loaded": "a model with adapters of its own saves these alone, and no code",
    "_init_weights": "first values of a module's parameters",
    "_is_stateful": "whether generate() must leave out what undoes tokens",
    "_layer_type": "enters a cache layer into the table for dynamic caches",
    "_no_split_modules": "blocks that device_map, FSDP and DeepSpeed keep whole",
    "_prepare_cache_for_generation": "generate() makes caches that can be saved and forked",
    "_prepare_position_ids_for_generation": "generate() leaves it to the model to count its tokens",
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


def exportable_state() -> type:
    """The base of callbacks whose state goes into Trainer's checkpoints. Imported when it is asked for: Trainer takes seconds."""
    from transformers.trainer_callback import ExportableState

    return ExportableState


def run_server(model: str, **options) -> None:
    """Transformers' HTTP server for one model, until it is stopped; options of `transformers serve`.

    Raises:
        ImportError: packages of the server that are not installed.
    """
    from transformers.cli.serve import Serve

    Serve(force_model=model, **options)


def loss_since_log(trainer) -> tuple[float, int] | None:
    """Sum of the losses since Trainer's last log, which its state leaves out, and the step of that log; None before training."""
    return (trainer._tr_loss.item(), trainer._globalstep_last_logged) if hasattr(trainer, "_tr_loss") else None


def add_loss_since_log(trainer, loss: float, last_logged: int) -> None:
    """Let Trainer's next log count what `loss_since_log` returned in an earlier run, and the loss that train() returns not."""
    trainer._tr_loss += loss
    trainer._total_loss_scalar -= loss
    trainer._globalstep_last_logged = last_logged


def keep_attention(layers: list[torch.nn.Module], config: PreTrainedConfig, name: str) -> None:
    """Give a host's layers a configuration of their own, in which the attention function is the one called `name` for good."""
    own = copy.copy(config)
    own._attn_implementation = name
    for layer in layers:
        layer.config = own


def drop_rules_without_modules(host: torch.nn.Module) -> None:
    """Of a host's FSDP plan: OPT's decoder repeats its body's plan one name too deep."""
    names = [name for name, _ in host.named_modules()]
    plan = getattr(host, "_fsdp_plan", None) or {}
    host._fsdp_plan = {rule: style for rule, style in plan.items() if fnmatch.filter(names, rule)}  # type: ignore[assignment]


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "CACHE_NAME",
    "CACHE_NAMES",
    "PRIVATE_HOOKS",
    "STATIC_LAYER_TYPE_MAPPING",
    "BertEmbeddings",
    "BertPooler",
    "CacheLayerMixin",
    "DynamicLayer",
    "EitherCacheName",
    "ForCausalLMLoss",
    "ForQuestionAnsweringLoss",
    "ForSequenceClassificationLoss",
    "ForTokenClassification",
    "GELUActivation",
    "GenerationMode",
    "GradientCheckpointingLayer",
    "LinearAttentionLayer",
    "OutputRecorder",
    "add_loss_since_log",
    "and_masks",
    "answer_to_both_names",
    "answering_to_both_names",
    "cache_keyword",
    "cache_of",
    "can_return_tuple",
    "capture_outputs",
    "create_and_tag_model_card",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "drop_rules_without_modules",
    "either_cache_name",
    "exportable_state",
    "find_adapter_config_file",
    "init",
    "is_output_recorder",
    "keep_attention",
    "keep_logits",
    "loss_since_log",
    "merge_with_config_defaults",
    "modeling_auto",
    "rebuilt_by",
    "refuse_cache_under_checkpointing",
    "rename_cache",
    "run_server",
    "sdpa_mask",
]
