"""States of fixed size for `generate()`: a cache layer for recurrent mechanisms, and a cache that can be saved.

A layer holds the tensors its mechanism leaves behind (each `(B, ...)`, at least float32), and how many real tokens each row
has seen. Nothing in it grows with the text. It takes part in beam search, static caches and chunked prefill like
Transformers' own layers, and in assisted decoding by exact rollback: while past recording is on, it keeps the state before
and the inputs since the last `crop`, and undoes tokens by running the mechanism again over the inputs that stay.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.utils import logging

from .compat import (
    CACHE_NAME,
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    GenerationMode,
    LinearAttentionLayer,
    answer_to_both_names,
    rename_cache,
)
from .decoding_graph import DecodingGraph
from .past_columns import PastColumns, count_tokens, making_buffers
from .sequence_inputs import GENERATION_KEYWORDS
from .state_file import read_state, write_state

logger = logging.get_logger(__name__)

LAYER_TYPE_PREFIX = "hf_linear_attn"  # of the layer types that are ours
LAYER_TYPE = "hf_linear_attn_state"


def hold_in(layer, dtype: torch.dtype) -> None:
    """Turn the keys and values of a cache layer into the dtype that a model computes in, if they came from another's."""
    if layer.keys is not None and layer.keys.dtype != dtype:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)


def detach_copies(held, memo: dict) -> None:
    """Let a `copy.deepcopy` with this memo take each tensor in `held` without what made it, which cannot be copied."""
    if isinstance(held, torch.Tensor):
        memo[id(held)] = held.detach().clone()
    elif isinstance(held, (dict, list, tuple)):
        for value in held.values() if isinstance(held, dict) else held:
            detach_copies(value, memo)


class RecurrentStateLayer(LinearAttentionLayer, CacheLayerMixin):
    """State of one recurrent layer: `recurrent_states[0..n-1]` of the mechanism, then the row counts `(B,)` (int64)."""

    _layer_type = LAYER_TYPE  # Transformers enters subclasses that name a type into its table for dynamic caches
    supports_early_init = False
    holds_keys = False

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=0)
        # A static cache counts in a tensor: an int would be a new constant, and a new graph, at each step.
        self.cumulative_length: int | torch.Tensor = 0
        if max_cache_len is not None:
            with making_buffers():
                self.cumulative_length = torch.zeros((), dtype=torch.long)
        self.past = PastColumns()  # that of the model's first recurrent layer is kept up to date
        self._base: tuple[torch.Tensor, ...] | None = None
        self._replay: list[tuple[Callable, tuple]] = []

    def get_state(self) -> tuple[torch.Tensor, ...] | None:
        """The mechanism's tensors, or None before the first token."""
        if self.number_of_states == 0 or not self.has_previous_state[0]:
            return None
        return tuple(self.recurrent_states[i] for i in range(self.number_of_states - 1))

    def get_token_counts(self) -> torch.Tensor | None:
        """Real (unpadded) tokens of the document that is open in each row, `(B,)`; None before the first token."""
        if self.number_of_states == 0 or not self.has_previous_state[0]:
            return None
        return self.recurrent_states[self.number_of_states - 1]

    def update_state(
        self,
        state: tuple[torch.Tensor, ...],
        num_new_tokens: int,
        mask: torch.Tensor | None = None,
        replay: tuple[Callable, tuple[torch.Tensor | None, ...]] | None = None,
        segment_ids: torch.Tensor | None = None,
    ) -> None:
        """Replace the state by the one after `num_new_tokens` more columns.

        Args:
            state (`tuple` of `torch.Tensor`): the mechanism's new tensors, each with the batch first.
            num_new_tokens (`int`): columns of the call, padding included.
            mask (`torch.Tensor` of shape `(B, num_new_tokens)`, *optional*): which of them were real.
            replay (`tuple`, *optional*): `(advance, inputs)` with `advance(state_or_None, *inputs) -> state`; every input
                is `(B, num_new_tokens, ...)` or None. Needed for `crop`.
            segment_ids (`torch.Tensor` of shape `(B, num_new_tokens)`, *optional*): documents; the count starts anew with
                each, as positions do.
        """
        device = state[0].device
        counts = self.get_token_counts()
        new_counts = count_tokens(counts, state[0], num_new_tokens, mask, segment_ids)
        if self.record_past:
            if replay is None:
                raise RuntimeError("this layer was asked to record its past, but its model passes no `replay`")
            if not self._replay:
                self._base = None if counts is None else tuple(s.clone() for s in self._all_states())
            self._replay.append((replay[0], (*replay[1], mask, segment_ids)))
        self._store((*state, new_counts))
        if isinstance(self.cumulative_length, torch.Tensor):
            self._place_length(device)
            self.cumulative_length.add_(num_new_tokens)
        else:
            self.cumulative_length += num_new_tokens

    def take_step(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor | None]:
        """State, counts (B,) and count of columns, which the caller takes one token on in place.

        The count of columns is None where it is no tensor: that one is taken on here.
        """
        counted = isinstance(self.cumulative_length, torch.Tensor)
        if counted:
            self._place_length(self.device)
        else:
            self.cumulative_length += 1
        *state, counts = self._all_states()
        return tuple(state), counts, self.cumulative_length if counted else None

    def step_tensors(self) -> tuple[torch.Tensor, ...] | None:
        """All tensors that a step of one token changes in place; None if it may make new ones."""
        if type(self) is not RecurrentStateLayer or self.get_state() is None or self.record_past:
            return None
        counted = isinstance(self.cumulative_length, torch.Tensor)
        if counted:
            self._place_length(self.device)
        own = (self.cumulative_length,) if counted else ()
        return (*self._all_states(), *own, *(() if self.past.shift is None else (self.past.shift,)))

    def _place_length(self, device) -> None:
        """Move the count of a static cache to the states' device, once: from then on CUDA graphs rely on its address."""
        if self.cumulative_length.device != device:
            with making_buffers():
                self.cumulative_length = self.cumulative_length.to(device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What a saved cache holds of this layer, by name; empty before the first token."""
        if self.get_state() is None:
            return {}
        return {str(i): state for i, state in enumerate(self._all_states())} | self.past.tensors()

    def load_tensors(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """Take over what `saved_tensors` gave after `length` columns."""
        self._store(tuple(tensors[str(i)] for i in range(sum(name.isdigit() for name in tensors))))
        self.past.load(tensors)
        if isinstance(self.cumulative_length, torch.Tensor):
            self._place_length(self.device)
            self.cumulative_length.fill_(length)
        else:
            self.cumulative_length = length

    def _all_states(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.recurrent_states[i] for i in range(self.number_of_states))

    def _store(self, states: tuple[torch.Tensor, ...]) -> None:
        fits = self.number_of_states == len(states) and all(
            self.recurrent_states[i].shape == s.shape and self.recurrent_states[i].dtype == s.dtype
            for i, s in enumerate(states)
        )
        if not fits:
            self.number_of_states = len(states)
            self.dtype, self.device = states[0].dtype, states[0].device
            for i, s in enumerate(states):
                with making_buffers():
                    self.recurrent_states[i] = torch.zeros_like(s)
                self.is_recurrent_states_initialized[i] = True
                self.is_conv_states_initialized[i] = False
                if not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(self.recurrent_states[i])
        for i, s in enumerate(states):
            if torch.is_grad_enabled() and s.requires_grad:
                self.recurrent_states[i] = s  # a copy into the buffer would cut or overwrite what backward needs
            elif self.recurrent_states[i].requires_grad:
                with making_buffers():
                    self.recurrent_states[i] = s.detach().clone()
            else:
                self.recurrent_states[i].copy_(s)  # in place: CUDA graphs rely on the address
            self.has_previous_state[i] = True
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the layer back exactly: yes, once `activate_past_recording` has been called."""
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` columns exactly; 0 forgets the recorded past and changes nothing else."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes minus the number of tokens to remove, got {tokens_to_remove}; a recurrent state has no "
                "absolute length to cut to"
            )
        remove = -int(tokens_to_remove)  # assisted decoding of some releases counts in a tensor
        if remove:
            recorded = sum(inputs[0].shape[1] for _, inputs in self._replay)
            if not self.record_past:
                raise RuntimeError(
                    f"cannot undo {remove} tokens: none are recorded. Call `cache.activate_past_recording()` before the tokens "
                    "that may have to be undone"
                )
            if remove > recorded:
                raise RuntimeError(
                    f"cannot undo {remove} tokens: {recorded} are recorded since recording began or since the last `crop`, which "
                    "keeps what it does not undo for good. Go on from a `fork()` made earlier; assisted decoding asks for more "
                    "where assistant and model have two tokenizers: give it an assistant with the model's own"
                )
            self._rewind(recorded - remove)
            self.past.rewind(remove)
        self._replay, self._base = [], None
        self.past.forget_records()

    def _rewind(self, keep: int) -> None:
        base = self._base
        state, counts = (None, None) if base is None else (base[:-1], base[-1])
        removed = 0
        for advance, inputs in self._replay:
            length = inputs[0].shape[1]
            take = min(length, keep)
            if take:
                *arguments, mask, segment_ids = (None if x is None else x[:, :take] for x in inputs)
                state = advance(state, *arguments)
                counts = count_tokens(counts, state[0], take, mask, segment_ids)
            keep, removed = keep - take, removed + length - take
        if state is None:
            self.has_previous_state = dict.fromkeys(range(self.number_of_states), False)
        else:
            self._store((*state, counts))
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.sub_(removed)
        else:
            self.cumulative_length -= removed

    def get_seq_length(self) -> int | torch.Tensor:
        """Columns seen, padding included, as Transformers counts them."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: a state has no maximum length."""
        return -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to prepare: the tensors come with the first `update_state`."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Refuse keys and values: there is no place for them."""
        raise NotImplementedError(
            "a recurrent layer keeps a state of fixed size and no keys or values: prefix tuning and quantized caches, "
            "which store keys and values per token, cannot work with it"
        )

    def reset(self) -> None:
        """Forget everything, keep the tensors' addresses."""
        for state in self.recurrent_states.values():
            if state is not None:
                state.detach_().zero_()
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), False)
        self._replay, self._base = [], None
        self.past.reset()
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the state of row `beam_idx` (beam search)."""
        self._map_rows(lambda s: s.index_select(0, beam_idx.to(s.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map_rows(lambda s: s.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map_rows(lambda s: s[indices.to(s.device)])

    def __deepcopy__(self, memo: dict) -> "RecurrentStateLayer":
        memo |= {id(advance): advance for advance, _ in self._replay}  # methods of the model, which is not copied along
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with making_buffers():
            detach_copies([self.__dict__, self.past.__dict__], memo)
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with making_buffers():
            for i, state in self.recurrent_states.items():
                if state is not None:
                    self.recurrent_states[i] = function(state)
        self.past.map_rows(function)
        self._base = None if self._base is None else tuple(function(s) for s in self._base)
        self._replay = [
            (advance, tuple(None if x is None else function(x) for x in inputs)) for advance, inputs in self._replay
        ]


STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = RecurrentStateLayer


class RecurrentCache(DynamicCache):
    """A `DynamicCache` whose conversation can be saved, loaded in another process, and forked.

    `generate()` and `forward` make one by themselves; build one with `RecurrentCache(config=model.config)` to hold on to it.
    """

    config: Any = None  # of the model; whoever rebuilds a cache without `__init__` may leave it out

    def __init__(self, ddp_cache_data=None, config=None, **kwargs):
        super().__init__(ddp_cache_data, config, **kwargs)
        self.config = config

    def state_size(self) -> int:
        """Bytes of all tensors in the cache. For recurrent layers the number does not depend on the length of the text."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in _held(layer).values())

    def fork(self) -> "RecurrentCache":
        """An independent copy: two continuations of one conversation. It has no part in a backward through this one."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict) -> "RecurrentCache":
        memo[id(self.config)] = self.config  # the model's
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with making_buffers():
            for layer in self.layers:
                if not isinstance(layer, RecurrentStateLayer):
                    detach_copies(layer.__dict__, memo)
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            if isinstance(
                layer, DynamicLayer
            ):  # Transformers 5.17 would put zeros in the place of keys, and count them
                layer.keys = layer.values = None
                layer.is_initialized = False
        super().reset()

    def save(self, path) -> None:
        """Write the state to a safetensors file, from which `RecurrentCache.load` resumes exactly, in any process.

        The file also says which model it belongs to: family, and the part of the configuration that decides what is computed.

        Raises:
            ValueError: no token has been seen, or the state is not one that the model could go on from (NaN in it; layers
                that have seen different texts).
        """
        if self.config is None:
            raise ValueError(
                "this cache does not know its model, which its file has to name: build it with "
                "`RecurrentCache(config=model.config)`"
            )
        lengths = [int(layer.get_seq_length()) for layer in self.layers]
        if not any(lengths):
            raise ValueError("nothing to save: this cache has not seen a token yet; run the model on a prompt first")
        expected = self.config.state_tensors(max(lengths))
        tensors = {}
        for i, (layer, length) in enumerate(zip(self.layers, lengths)):
            for name, tensor in _held(layer).items() if length else ():
                if not hasattr(layer, "saved_tensors"):
                    # A static layer has empty columns on the right, a recording one more than its window on the left.
                    end = min(length, tensor.shape[2])
                    tensor = tensor[:, :, max(0, end - expected[i][name].shape[1]) : end]
                tensors[f"layers.{i}.{name}"] = tensor
        write_state(path, self.config, lengths, tensors)

    @classmethod
    def load(cls, path, config, device: str | torch.device | int | None = None) -> "RecurrentCache":
        """Read a state written by `save`.

        Args:
            path: the file.
            config (`PreTrainedConfig`): the configuration of the model that will go on with it.
            device (*optional*): where to put the tensors; the CPU by default.

        Raises:
            ValueError: the file is damaged, holds no state, or holds one of another model than `config` describes; the message
                names the field that differs. Files of release 0.1.0 name no model: only shapes and dtypes are compared.
            OSError: the file cannot be opened.
        """
        lengths, layers = read_state(path, config)
        cache = cls(config=config)
        for layer, length, tensors in zip(cache.layers, lengths, layers):
            if device is not None:
                tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            if not length:
                continue
            if isinstance(layer, RecurrentStateLayer):
                layer.load_tensors(tensors, length)
            else:
                layer.update(tensors["keys"], tensors["values"])
                if hasattr(
                    layer, "cumulative_length"
                ):  # of a sliding window, which holds fewer columns than it has seen
                    layer.cumulative_length = length
        return cache


def _held(layer) -> dict[str, torch.Tensor]:
    """The tensors of a layer by name, empty before the first token."""
    if isinstance(layer, RecurrentStateLayer):
        return layer.saved_tensors()
    return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}


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
    started = layer is not None and layer.is_initialized
    if started and step:
        for name in ("position_ids", "seq_idx", "cu_seq_lens_q", "attention_mask"):
            inputs.pop(name, None)
        return
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    columns, length = int(cache.get_seq_length()) if started else 0, tokens.shape[1]
    if numbers is not None and numbers.shape[1] > length:  # a prompt read in chunks, or that a cache has read in part
        inputs["seq_idx"] = numbers[:, columns : columns + length]
    # A mask of ones over the cache is what Transformers makes where it is told none: it says nothing of earlier padding.
    whole = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] == columns + length
    if started and whole and layer.past.padding is not None and bool(mask[:, :columns].all()):
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

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
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
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

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
