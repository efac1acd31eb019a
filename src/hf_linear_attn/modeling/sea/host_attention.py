"""The attention function that SEA enters into Transformers' registry, and what one forward call carries to it.

The host's code stays Transformers': it projects, rotates and caches keys and values, then calls the registered
function with the attention module. The function finds the module's SEA core, and the call's `SeaCall` among the
keywords that hosts pass through. Because no mask is registered under that name, the host builds none.

Transformers looks that function up by the name in a configuration, which a user may change. The layers' own copy of the
configuration keeps the name (`keep_attention`), so that no switch turns a SEA layer into a dense one.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..shared.call import Call
from ..shared.compat import ALL_ATTENTION_FUNCTIONS
from ..shared.precision import accumulation_dtype
from ..shared.sequence import SequenceInputs
from ..shared.states.past_columns import join_masks
from .attention import SeaAttentionCore, SeaCoreOutput, SeaState
from .cells import KeyLayout
from .losses import TeacherTargets
from .rows.documents import PackedRows
from .rows.short import advance, attend
from .sparse_attention import repeat_key_heads

ATTENTION_NAME = "hf_linear_attn_sea"


@dataclass
class Distillation:
    """What a student's layers are compared with.

    Attributes:
        targets: a teacher's `TeacherTargets` by layer, as `record_targets` makes them.
        loss_rows: (R,) ranks of the query rows that the losses look at; None for all (time O(T^2)).
        measure: whether layers also measure how well the estimate finds the teacher's attention.
    """

    targets: dict[int, TeacherTargets]
    loss_rows: torch.Tensor | None = None
    measure: bool = False


class LayerResults:
    """What the layers of a call leave behind, by layer, in `found`.

    Neither a dataclass nor a dict, since FSDP2 copies those, with what they hold, on their way into each layer.
    """

    def __init__(self):
        self.found: dict[int, Any] = {}


@dataclass(frozen=True)
class SeaCall(Call):
    """A `Call` with, made at the beginning of a forward by `sea_call`:

    key_layout: ranks and slots of the tokens and of the keys that they see.
    documents: the documents of packed rows; None where each row is one.
    distillation: a teacher's targets, None outside distillation.
    recorded: where softmax layers leave their own `TeacherTargets` (a teacher's forward), or None.
    results: where SEA layers leave their `SeaCoreOutput` (its state removed), or None.
    """

    key_layout: KeyLayout | None = None
    documents: PackedRows | None = None
    distillation: Distillation | None = None
    recorded: LayerResults | None = None
    results: LayerResults | None = None

    @property
    def key_mask(self) -> torch.Tensor | None:
        """(B, S) bool over all slots of the cache and this call; None if nothing is padded."""
        return self.key_layout.keys.mask


def sea_call(sequence: SequenceInputs, tokens: torch.Tensor, cache: Cache | None = None, **more) -> SeaCall:
    """What the layers share of a call about `tokens` (B, T, ...), read as `sequence`; `more` are other fields of the result."""
    batch, length = tokens.shape[:2]
    past, old_mask = (0, None) if cache is None else (cache.get_seq_length(), cache.layers[0].key_mask)
    mask, position_ids, segment_ids = sequence.mask, sequence.position_ids, sequence.segment_ids
    key_mask = join_masks(old_mask, mask, batch, past, length, tokens.device)
    documents = None
    if mask is not None:
        position_ids = position_ids.masked_fill(~mask, 0)
    if segment_ids is not None:
        documents = PackedRows.find(segment_ids, mask, key_mask, past)
    return SeaCall(
        mask,
        position_ids,
        None if documents is None else segment_ids,
        cache=cache,
        key_layout=KeyLayout.from_mask(key_mask, batch, length, tokens.device, past),
        documents=documents,
        **more,
    )


def register_attention() -> None:
    """Make the registry know the attention function; harmless when repeated."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sea_attention_forward)


def check_attention(asked: str | dict | None) -> None:
    """Refuse an `attn_implementation` that asks for another attention than SEA.

    "eager" asks for none: it is what Transformers calls a model with attention of its own, and what users set to get maps.

    Raises:
        ValueError: any other name.
    """
    for name in asked.values() if isinstance(asked, dict) else (asked,):
        if isinstance(name, dict):
            check_attention(name)
        elif name not in (None, "eager", ATTENTION_NAME):
            raise ValueError(
                f"`attn_implementation` is {name!r}, but the attention of a SEA model is SEA, also in its host: leave it out "
                'or set "eager", which changes nothing (`output_attentions=True` gives maps anyway). For the dense model '
                "take the one that it was made from"
            )


def sea_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sea_call: SeaCall | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one host layer: query (B, H, T, D), key and value (B, G, S, D) -> (B, T, H, D) and probabilities
    or None.

    The host's attention dropout is not applied in SEA layers, as in the published model; a softmax layer applies it.
    """
    if sea_call is None:
        raise ValueError(
            "this layer belongs to a SEA model: call that model, not its host, because ranks and states are prepared there. A "
            'dense model of the same configuration takes a copy of it and `attn_implementation="sdpa"`'
        )
    core, index = getattr(module, "sea", None), int(module.layer_idx)
    time, past = query.shape[2], sea_call.key_layout.past_slots
    layer = sea_call.layer_cache(index)
    if layer is not None:
        layer.append_mask(sea_call.mask, query.shape[0], time, query.device)
    if layer is not None and sea_call.documents is not None:
        layer.key_mask = sea_call.documents.open_slots  # later tokens see the document that is open, and no other
    if core is None:
        output = _softmax_layer(query, key, value, sea_call, bool(module.is_causal), scaling, dropout)
        if sea_call.recorded is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            targets = TeacherTargets(context=output[0].flatten(2), q=query, k=key, scaling=scale)
            sea_call.recorded.found[index] = targets
        return output
    wants_state = False
    if layer is not None:
        known, reaches = layer.get_state() is not None, past + time >= core.options.dense_below(query.device)
        wants_state = known or reaches or layer.record_past
        if wants_state and past and not known:  # until now the text was short
            mask = None if sea_call.key_mask is None else sea_call.key_mask[:, :past]
            before = KeyLayout.from_mask(mask, query.shape[0], past, query.device)
            layer.begin_state(tuple(core.state_after(key[:, :, :past], value[:, :, :past], before, None)), past, mask)
    output = _sea_layer(core, query, key, value, sea_call, index, scaling, wants_state)
    if layer is not None and output.state is not None:
        replay = None
        if layer.record_past:
            replay = _replay(core, sea_call, scaling, query, *(x[:, :, past : past + time] for x in (key, value)))
        layer.update_state(tuple(output.state), time, sea_call.mask, replay, sea_call.segment_ids)
    if sea_call.results is not None:
        output.state = None
        if not sea_call.output_attentions:
            output.kept = output.attention_probs = None  # the dense form's: T x S, and not asked for
        sea_call.results.found[index] = output
    context = output.context.unflatten(-1, (query.shape[1], -1))
    return context, output.attention_probs if sea_call.output_attentions else None


def _sea_layer(
    core: SeaAttentionCore, query, key, value, call: SeaCall, index: int, scaling, wants_state
) -> SeaCoreOutput:
    """What a SEA layer gives for the new tokens, whole rows or document by document."""
    past, time = call.key_layout.past_slots, query.shape[2]
    new_key, new_value = (x[:, :, past : past + time] for x in (key, value))
    state = call.state_of(index)
    distillation = call.distillation
    options = {
        "teacher": None if distillation is None else distillation.targets.get(index),
        "scaling": scaling,
        "state": None if state is None else SeaState(*state),
        "wants_state": wants_state,
        "wants_estimate": call.results is not None,
        "output_attentions": call.output_attentions,
        "loss_rows": None if distillation is None else distillation.loss_rows,
        "measure": distillation is not None and distillation.measure,
    }
    if call.documents is None:
        key_cache = None if call.cache is None else (key, value)
        return attend(core, query, new_key, new_value, layout=call.key_layout, key_cache=key_cache, **options)
    past_keys = (key[:, :, :past], value[:, :, :past])
    return call.documents.attend(core, query, new_key, new_value, past_keys=past_keys, **options)


def _replay(core: SeaAttentionCore, call: SeaCall, scaling, query, key, value):
    """How the cache undoes tokens: run the layer again over the ones that stay. Time is axis 1 of every input."""
    if call.documents is not None:
        raise ValueError("tokens of packed rows cannot be undone: put each document into its own row, padded")
    mask = call.mask
    if mask is None:
        mask = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
    past = call.key_layout.past[:, None].expand_as(mask)

    def again(state, q, k, v, keep, past):
        layout = KeyLayout.from_mask(keep, *keep.shape, keep.device)
        layout = replace(layout, past=past[:, 0], past_slots=call.key_layout.past_slots)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return tuple(advance(core, q, k, v, layout, scaling, SeaState(*state) if state else None))

    return again, (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, past)


def _softmax_layer(query, key, value, call: SeaCall, causal: bool, scaling, dropout):
    """Softmax attention of a layer that keeps it, with its T x S mask only where tokens are padded or cached."""
    past, time = call.key_layout.past_slots, query.shape[2]
    key, value = (repeat_key_heads(x[:, :, : past + time], query.shape[1]) for x in (key, value))
    plain = call.key_mask is None and past == 0 and call.documents is None
    mask = None if plain and not call.output_attentions else _visible(call, past, time, causal, query.device)
    probs = None
    if call.output_attentions:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        dtype = accumulation_dtype(query.dtype)
        scores = (query @ key.transpose(-1, -2) * scale).to(dtype).masked_fill(~mask, torch.finfo(dtype).min)
        probs = scores.softmax(dim=-1).to(query.dtype)
        context = nn.functional.dropout(probs, dropout) @ value
    else:
        context = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal and plain, scale=scaling
        )
    if call.mask is not None:  # a padded row sees nothing: its softmax is 0 / 0
        context = context.masked_fill(~call.mask[:, None, :, None], 0.0)
    return context.transpose(1, 2), probs


def _visible(call: SeaCall, past: int, time: int, causal: bool, device: torch.device) -> torch.Tensor:
    """(1 or B, 1, T, past + T) bool: which slots each new token sees."""
    slots = torch.arange(past + time, device=device)
    mask = slots <= slots[past:, None] if causal else torch.ones(time, past + time, dtype=torch.bool, device=device)
    mask = mask[None, None]
    if call.key_mask is not None:
        mask = mask & call.key_mask[:, None, None]
    if call.segment_ids is not None:  # what a cache holds belongs to document 0
        of_keys = nn.functional.pad(call.segment_ids, [past, 0])
        mask = mask & (of_keys[:, None, None] == call.segment_ids[:, None, :, None])
    return mask
