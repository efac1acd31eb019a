"""What the bodies of all families share: their output, embedded tokens, and the opening of a call and its cache."""

import functools
from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.plain_layers import table_rows
from ..kernels.tracing import records_gradients
from .call import Call
from .compat import CACHE_NAME, EitherCacheName, refuse_cache_under_checkpointing
from .sequence import SequenceInputs, blank_padding, check_token_ids, prepare_sequence
from .states.cache import RecurrentCache
from .states.state_layer import LAYER_TYPE_PREFIX


@dataclass
class RecurrentModelOutput(EitherCacheName, BaseModelOutputWithPast):
    """Output of a body: `BaseModelOutputWithPast` with, for families that have them, `focus_weights` (a tuple of (B, H, T))."""

    focus_weights: tuple[torch.FloatTensor, ...] | None = None


def embed_inputs(model, input_ids, inputs_embeds) -> torch.Tensor:
    """The embedded tokens (B, T, d) from exactly one of the two."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of `input_ids` and `inputs_embeds`")
    if inputs_embeds is not None:
        width = model.config.hidden_size
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
            raise ValueError(
                f"`inputs_embeds` has shape {tuple(inputs_embeds.shape)}, expected (batch, length, {width})"
            )
        return inputs_embeds
    embedding = model.get_input_embeddings()
    check_token_ids(input_ids, table_rows(embedding), model.training)
    return embedding(input_ids)


def add_positions(hidden_states: torch.Tensor, embed_positions: torch.nn.Embedding | None, sequence) -> torch.Tensor:
    """What a body begins with: (B, T, d), 0 at padding, with learned positions added if the model has them.

    Padding, whose position means nothing, takes the first.
    """
    hidden_states = blank_padding(hidden_states, sequence.mask)
    if embed_positions is None:
        return hidden_states
    positions = sequence.position_ids
    if sequence.mask is not None:
        positions = positions.masked_fill(~sequence.mask, 0)
    return hidden_states + embed_positions(positions)


def without_cache_in_training(forward):
    """A body's `forward` that leaves no state behind in training unless asked to: a state would hold the whole graph."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        unasked = len(args) <= 3 and kwargs.get("use_cache") is None and kwargs.get("cache") is None
        if unasked and self.training and records_gradients():
            kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return wrapper


def check_cache(cache, config) -> None:
    """Refuse a cache whose layers are not those of this model."""
    layers = getattr(cache, "layers", None)
    kinds = config.layer_types[: config.num_hidden_layers]
    if layers is None or len(layers) != len(kinds) or not all(map(_is_of_kind, layers, kinds)):
        found = (
            "no list of layers"
            if layers is None
            else f"{len(layers)} layers of {sorted({type(x).__name__ for x in layers})}"
        )
        recurrent = sum(map(keeps_a_state, kinds))
        wanted = f"{recurrent} recurrent layers" + f" and {len(kinds) - recurrent} of softmax" * (
            recurrent < len(kinds)
        )
        raise ValueError(
            f"`{CACHE_NAME}` ({type(cache).__name__} with {found}) does not belong to this model, which has {wanted}: build "
            "it with `RecurrentCache(config=model.config)`, `DynamicCache(config=model.config)` or "
            "`StaticCache(config=model.config, max_cache_len=...)`. "
            "Keys and values per token, which prefix tuning writes, have no place in a state of fixed size: use prompt tuning "
            "or LoRA"
        )


def _is_of_kind(layer, kind: str) -> bool:
    """Whether a layer of a cache is of this layer type; those that are not ours are told by what they lack."""
    if keeps_a_state(kind):
        return getattr(layer, "_layer_type", None) == kind
    return not hasattr(layer, "update_state")


def keeps_a_state(layer_type: str) -> bool:
    """Whether layers of this type keep a state of ours, instead of keys and values in a layer of Transformers' own."""
    return layer_type.startswith(LAYER_TYPE_PREFIX)


def open_cache(model, cache, use_cache) -> Cache | None:
    """The cache that a call goes on from and updates: the one given, or a new one if `use_cache` asks for it."""
    if cache is None:
        if not use_cache:
            return None
        cache = RecurrentCache(config=model.config)
    check_cache(cache, model.config)
    refuse_cache_under_checkpointing(model, cache)
    return cache


def check_direction(asked: bool | None, causal: bool) -> None:
    """Refuse an `is_causal` that this model was not built for."""
    if asked is not None and bool(asked) != causal:
        kind = (
            "sums from the left, each token sees only earlier ones"
            if causal
            else "is an encoder, whose tokens see all others"
        )
        raise ValueError(
            f"`is_causal={asked}` cannot be honoured: this model {kind}; its configuration chose the direction"
        )


def begin(
    model, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_focus_weights=False, **kwargs
) -> Call:
    """Check a body's inputs and open its cache: what its layers share."""
    check_direction(kwargs.get("is_causal"), model.is_causal)
    cache = open_cache(model, cache, use_cache)
    sequence = read_call(inputs_embeds, attention_mask, position_ids, cache, position_bound(model), **kwargs)
    kept_mask = None
    if cache is not None and not all(map(keeps_a_state, model.config.layer_types)):
        past = next(layer.past for layer in cache.layers if hasattr(layer, "update_state"))
        kept_mask = past.mask_of_keys(attention_mask, cache.get_seq_length(), inputs_embeds.shape[1])
    return Call(
        sequence.mask,
        sequence.position_ids,
        sequence.segment_ids,
        cache=cache,
        output_attentions=asks_for_attentions(model, kwargs),
        output_focus_weights=output_focus_weights,
        kept_mask=kept_mask,
    )


def position_bound(model) -> int | None:
    """How many positions a body has learned embeddings for; None where it has no table of them."""
    return None if model.embed_positions is None else model.config.max_position_embeddings


def asks_for_attentions(model, kwargs: dict) -> bool:
    """Whether attention maps are asked for, by the call or by the configuration."""
    return bool(kwargs.get("output_attentions", model.config.output_attentions))


def read_call(inputs_embeds, attention_mask, position_ids, cache=None, max_positions=None, **kwargs) -> SequenceInputs:
    """`prepare_sequence` after what a cache has seen, which takes note of the call."""
    if cache is None:
        return prepare_sequence(inputs_embeds, attention_mask, position_ids, max_positions=max_positions, **kwargs)
    with_state = [layer for layer in cache.layers if hasattr(layer, "update_state")]
    layer, past_length = with_state[0], cache.get_seq_length()  # the first of them knows where the rows stand
    counts, past = layer.open_tokens(), layer.past
    past.keeps_mask = len(with_state) < len(cache.layers)
    if counts is not None and counts.shape[0] != inputs_embeds.shape[0]:
        raise ValueError(
            f"`{CACHE_NAME}` holds {counts.shape[0]} rows, but the batch has {inputs_embeds.shape[0]}: use "
            "`cache.batch_repeat_interleave(n)` or `cache.batch_select_indices(rows)`"
        )
    sequence = prepare_sequence(
        inputs_embeds, attention_mask, position_ids, past_length, counts, max_positions, past, **kwargs
    )
    past.take_in(
        past_length,
        counts,
        inputs_embeds,
        sequence.mask,
        sequence.segment_ids,
        position_ids,
        kwargs.get("seq_idx"),
        layer.record_past,
    )
    return sequence
