"""What the bodies of all families share: their output, embedded tokens, and the opening of a call and its cache."""

import functools
from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.plain_layers import table_rows
from ..kernels.tracing import records_gradients
from .call import Call
from .compat import CACHE_NAME, EitherCacheName, refuse_cache_under_checkpointing
from .sequence import SequenceInputs, blank_padding, check_token_ids, prepare_sequence
from .states.cache import RecurrentCache


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
    if layers is None or len(layers) != config.num_hidden_layers or not all(hasattr(x, "update_state") for x in layers):
        kinds = (
            "no list of layers"
            if layers is None
            else f"{len(layers)} layers of {sorted({type(x).__name__ for x in layers})}"
        )
        raise ValueError(
            f"`{CACHE_NAME}` ({type(cache).__name__} with {kinds}) does not belong to this model, which has "
            f"{config.num_hidden_layers} recurrent layers: build it with `RecurrentCache(config=model.config)`, "
            "`DynamicCache(config=model.config)` or `StaticCache(config=model.config, max_cache_len=...)`. "
            "Keys and values per token, which prefix tuning writes, have no place in a state of fixed size: use prompt tuning "
            "or LoRA"
        )


def begin(
    model, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_focus_weights=False, **kwargs
) -> Call:
    """Check a causal body's inputs and make its cache: what its layers share."""
    if kwargs.get("is_causal") is False:
        raise ValueError(
            "`is_causal=False` cannot be honoured: this model sums from the left, each token sees only earlier ones"
        )
    if use_cache and cache is None:
        cache = RecurrentCache(config=model.config)
    layer = None
    if cache is not None:
        check_cache(cache, model.config)
        refuse_cache_under_checkpointing(model, cache)
        layer = cache.layers[0]
    past_length = 0 if layer is None else cache.get_seq_length()
    bound = position_bound(model)
    sequence = read_call(inputs_embeds, attention_mask, position_ids, layer, past_length, bound, **kwargs)
    return Call(
        sequence.mask,
        sequence.position_ids,
        sequence.segment_ids,
        cache=cache,
        output_attentions=asks_for_attentions(model, kwargs),
        output_focus_weights=output_focus_weights,
    )


def position_bound(model) -> int | None:
    """How many positions a body has learned embeddings for; None where it has no table of them."""
    return None if model.embed_positions is None else model.config.max_position_embeddings


def asks_for_attentions(model, kwargs: dict) -> bool:
    """Whether attention maps are asked for, by the call or by the configuration."""
    return bool(kwargs.get("output_attentions", model.config.output_attentions))


def read_call(
    inputs_embeds, attention_mask, position_ids, layer, past_length, max_positions=None, counts=None, **kwargs
) -> SequenceInputs:
    """`prepare_sequence` after what `layer` of a cache (or None) has seen, which takes note of the call.

    `counts` (B,) are the tokens of the open documents where the layer itself does not count them.
    """
    if layer is None:
        return prepare_sequence(inputs_embeds, attention_mask, position_ids, max_positions=max_positions, **kwargs)
    counts, past = layer.get_token_counts() if counts is None else counts, layer.past
    if counts is not None and counts.shape[0] != inputs_embeds.shape[0]:
        raise ValueError(
            f"`{CACHE_NAME}` holds the state of {counts.shape[0]} rows, but the batch has {inputs_embeds.shape[0]}: "
            "use `cache.batch_repeat_interleave(n)` or `cache.batch_select_indices(rows)`"
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
