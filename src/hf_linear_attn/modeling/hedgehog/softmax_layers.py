"""The layers that keep the host's softmax attention: keys and values in an ordinary cache, beside the states of the others."""

import torch
from torch import nn

from ..kernels.tracing import can_read_values, check_when_run
from ..shared.compat import (
    ALL_ATTENTION_FUNCTIONS,
    and_masks,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from ..shared.precision import accumulation_dtype
from ..shared.states.cache import hold_in
from ..shared.states.state_layer import LAYER_TYPE


def softmax_attention(module, query, key, value, call, scaling, dropout, softcap, more: dict):
    """As the host's attention, through Transformers' function of the model's `attn_implementation`: (B, T, H, D) and maps or
    None.

    Maps that are asked for are computed, whatever that function gives.
    """
    index = module.layer_idx
    if call.cache is not None:
        hold_in(call.cache.layers[index], key.dtype)
        key, value = call.cache.update(key, value, index)
    mask, name, window = call.softmax_masks[index], call.softmax_function, more.get("sliding_window")
    if call.output_attentions or name in (None, "eager") or (softcap is not None and name == "sdpa"):
        return eager_attention(module, query, key, value, mask, scaling, dropout, softcap)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
    return attend(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, softcap=softcap, sliding_window=window
    )


def eager_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
    """Softmax attention written out: (B, H, T, D) and (B, G, S, D) give (B, T, H, D) and the weights (B, H, T, S)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        place = torch.arange(scores.shape[-1], device=scores.device)
        attention_mask = place <= place[scores.shape[-1] - scores.shape[-2] :, None]
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=accumulation_dtype(query.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def softmax_masks(config, hidden_states, attention_mask, segment_ids, cache) -> dict[int, torch.Tensor | None]:
    """The mask of each softmax layer of a model, those of one type share it. `attention_mask` covers the tokens of the cache,
    too.

    Raises:
        ValueError: packed documents together with a cache; or padding between real tokens under a sliding window, which counts
            columns.
    """
    kinds = {
        kind: i for i, kind in reversed(list(enumerate(config.layer_types))) if kind != LAYER_TYPE
    }  # first of each
    if not kinds:
        return {}
    if segment_ids is not None and cache is not None:
        _refuse_documents_with_a_cache(segment_ids)
        segment_ids = None
    if "sliding_attention" in kinds:
        _check_padding(attention_mask)
    extra = {}
    if segment_ids is not None:
        documents = segment_ids.expand(hidden_states.shape[0], -1)
        same = and_masks(lambda row, head, query, key: documents[row, query] == documents[row, key])
        extra["and_mask_function"] = same
    masks = {}
    for kind, first in kinds.items():
        create = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
        masks[kind] = create(config, hidden_states, attention_mask, cache, layer_idx=first, **extra)
    return {i: masks[kind] for i, kind in enumerate(config.layer_types) if kind != LAYER_TYPE}


def _refuse_documents_with_a_cache(segment_ids) -> None:
    reason = (
        "packed documents and a cache cannot go together in a model with softmax layers, whose keys and values keep no document "
        "numbers: pass `use_cache=False`, or one document a row"
    )
    if can_read_values(segment_ids):
        raise ValueError(reason)
    check_when_run((segment_ids == 0).all(), reason)  # plain positions show no restart while traced


def _check_padding(attention_mask) -> None:
    if attention_mask is None or not can_read_values(attention_mask):
        return
    real = attention_mask.bool()
    if bool((real[:, 1:] & ~real[:, :-1] & (real.cumsum(-1)[:, :-1] > 0)).any()):
        raise ValueError(
            "`attention_mask` has padding between real tokens, which the sliding windows of softmax layers would count: put the "
            "padding on the left, also of a prompt that generation goes on from"
        )
