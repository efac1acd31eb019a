"""What generate() needs to know of models whose cache is a state of fixed size."""

import functools
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.utils import logging

from ..compat import (
    CACHE_NAME,
    GenerationMode,
    answer_to_both_names,
    rename_cache,
)
from ..kernels.decoding_graph import DecodingGraph
from ..sequence import GENERATION_KEYWORDS
from .cache import RecurrentCache
from .state_layer import LAYER_TYPE_PREFIX, RecurrentStateLayer

logger = logging.get_logger(__name__)


def _check_prompt_is_longer(input_ids=None, next_sequence_length=None, *args, inputs_embeds=None, **kwargs) -> None:
    """Refuse a prompt in generate() of which a cache leaves nothing to read."""
    cache = kwargs.get(CACHE_NAME)
    tokens = inputs_embeds if inputs_embeds is not None and kwargs.get("is_first_iteration") else input_ids
    if cache is None or tokens is None:
        return
    left = tokens.shape[1] if next_sequence_length is None else min(next_sequence_length, tokens.shape[1])
    if left <= 0:
        raise ValueError(
            f"`{CACHE_NAME}` holds {int(cache.get_seq_length())} columns, and the prompt has no more: generate() takes the "
            "whole text, the part in the cache included, and goes on behind it. Give the whole text, or leave the cache of "
            "another text out"
        )


def _leave_to_the_state(inputs: dict, step: bool) -> None:
    """Take out of a model's inputs in generate() what the state in its cache knows better.

    In a step that is all of it: where the new tokens stand, in which document, and that they are no padding.
    """
    cache, mask, numbers = inputs.get(CACHE_NAME), inputs.get("attention_mask"), inputs.get("seq_idx")
    layer = next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, RecurrentStateLayer)), None)
    if layer is not None and not layer.is_initialized:
        layer = None
    if layer is not None and step:
        for name in ("position_ids", "seq_idx", "cu_seq_lens_q", "attention_mask"):
            inputs.pop(name, None)
        return
    tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    columns = 0 if cache is None or layer is None else int(cache.get_seq_length())
    length = tokens.shape[1]
    if numbers is not None and numbers.shape[1] > length:  # a prompt read in chunks, or that a cache has read in part
        inputs["seq_idx"] = numbers[:, columns : columns + length]
    # A mask of ones over the cache is what Transformers makes where it is told none: it says nothing of earlier padding.
    whole = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] == columns + length
    if (
        mask is not None
        and whole
        and layer is not None
        and layer.past.padding is not None
        and bool(mask[:, :columns].all())
    ):
        inputs["attention_mask"] = mask[:, columns:]


class RecurrentGenerationMixin:
    """Placed before `GenerationMixin`: generate() then works on a `RecurrentCache`, which the caller can save.

    On a CUDA device its steps run as a CUDA graph (`DecodingGraph`) unless `compile_config` or `disable_compile` say otherwise.
    """

    config: Any
    device: Any
    base_model: Any
    exits_early = True  # whether the body runs `config.num_hidden_layers` of its layers, fewer while a draft is written

    def generate(self, *args, **kwargs):
        """Transformers' `generate()`; a cache to go on from may be called `cache` or `past_key_values`."""
        _check_mask_of_prompt(kwargs.get("attention_mask"), kwargs, *args[:1])
        config = self.base_model.config
        layers = config.num_hidden_layers
        try:
            return answer_to_both_names(super().generate(*args, **rename_cache(kwargs, CACHE_NAME)))
        finally:  # an error while `assistant_early_exit` drafts would leave the model with the layers of the draft
            if config.num_hidden_layers != layers:
                config.num_hidden_layers = layers

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() reads its signature
    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Transformers' own, less what generate() hands on for itself alone."""
        kwargs = rename_cache(kwargs, CACHE_NAME)
        kwargs = {name: value for name, value in kwargs.items() if name not in GENERATION_KEYWORDS}
        _check_prompt_is_longer(*args, **kwargs)
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # Every release tells how many of the last tokens a step is about; one that reads a prompt in chunks may not say "first".
        step = not kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None
        _leave_to_the_state(inputs, step)
        # PEFT puts its own method in this one's place, calls this one, and (0.21) looks for the older name in what it returns:
        # it would put its virtual tokens before every step.
        wrapped = "prepare_inputs_for_generation" in vars(self)
        return rename_cache(inputs, "past_key_values") if wrapped else inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """None: the model counts, from where its state stands. Transformers would number columns, padding included."""
        return None

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        given = model_kwargs.get(CACHE_NAME)
        if generation_mode == GenerationMode.ASSISTED_GENERATION and given is not None and given.get_seq_length():
            raise ValueError(
                f"`{CACHE_NAME}` holds {int(given.get_seq_length())} tokens already, but assisted decoding and prompt lookup "
                f"of Transformers begin with the whole prompt and would read it twice: leave `{CACHE_NAME}` or the "
                "assistant out"
            )
        if generation_config.assistant_early_exit is not None:
            self._check_early_exit(generation_config.assistant_early_exit)
        if generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is not None:
            logger.warning_once("`prefill_chunk_size` splits token ids; `inputs_embeds` are read in one call")
            generation_config.prefill_chunk_size = None  # this configuration is generate()'s own copy
        wanted = generation_config.cache_implementation in (None, "dynamic")
        if wanted and generation_config.use_cache and given is None:
            cache = RecurrentCache(config=self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE_NAME] = cache
            # Transformers refuses a cache together with the name of one.
            generation_config.cache_implementation = None
        # Prompt lookup of Transformers proposes past the end of the text, too: a static cache holds that until it is undone.
        max_cache_length += generation_config.prompt_lookup_num_tokens or 0
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _check_early_exit(self, layers: int) -> None:
        """Refuse a draft of no layers, of more than there are, or of softmax layers alone, which keep no count of tokens."""
        if not self.exits_early:
            raise ValueError(
                f"`assistant_early_exit` needs a model that can stop after some of its layers, which {type(self).__name__} over "
                f"this host cannot: leave it out, or give a small `assistant_model`"
            )
        kinds, total = self.config.layer_types, self.config.num_hidden_layers
        least = 1 + next((i for i, kind in enumerate(kinds) if kind.startswith(LAYER_TYPE_PREFIX)), 0)
        if not least <= layers <= total:
            reason = " (the first of which hold no state)" if least > 1 else ""
            raise ValueError(
                f"`assistant_early_exit` is {layers}, expected {least} to {total}: how many of the model's {total} layers{reason}"
                " write the draft"
            )

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        """Whether generate() takes its steps through `get_compiled_call`: with its own cache for a CUDA graph only."""
        own = isinstance(model_kwargs.get(CACHE_NAME), RecurrentCache)
        if own and (generation_config.compile_config is not None or not self._is_on_one_gpu()):
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config):
        """What generate() calls for a step: a CUDA graph, or torch.compile where a `compile_config` asks for it."""
        if compile_config is None and self._is_on_one_gpu():
            return DecodingGraph(self)
        return super().get_compiled_call(compile_config)

    def _is_on_one_gpu(self) -> bool:
        devices = getattr(self, "hf_device_map", {}).values()
        return self.device.type == "cuda" and len(set(map(str, devices))) <= 1


def _check_mask_of_prompt(mask, kwargs: dict, inputs=None) -> None:
    """Refuse a mask that does not cover the prompt: generate() makes positions of it, which would be blamed instead."""
    given = [kwargs.get(name) for name in ("inputs_embeds", "inputs", "input_ids")]
    prompt = next((each for each in (*given, inputs) if isinstance(each, torch.Tensor) and each.dim() > 1), None)
    if mask is None or prompt is None:
        return
    batch, length = prompt.shape[:2]
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"`attention_mask` is a {type(mask).__name__}, expected a tensor of shape ({batch}, {length})")
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}, expected ({batch}, {length}) for this prompt, or more where "
            "a cache holds the text before it: one 1 (keep) or 0 (padding) a token"
        )
