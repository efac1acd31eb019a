"""Where the real tokens of a padded or packed batch stand: ranks, documents, and the order that puts them first.

A padded token must be the identity of a mechanism: it may not write, age, shift a window or take a position. For sums
over a whole row a zero row does that. For anything with a window the *rank* of a token among the real tokens of its
document decides, and the cheapest exact way is to move the real tokens of each row to the front ("slots"), run the
mechanism, and move the results back.

    token      a . b c . d        mask  1 0 1 1 0 1
    slot       a b c d . .        order 0 2 3 5 1 4 (slot -> token)    slots 0 4 1 2 5 3 (token -> slot)
    rank       0 - 1 2 - 3
"""

from typing import NamedTuple

import torch

from ..kernels.tracing import can_read_values


class TokenLayout(NamedTuple):
    """Positions of the real tokens of a batch, computed once per forward and shared by every layer.

    mask: (B, T) bool, True for real tokens, or None when there is no padding.
    order: (B, T) slot -> token, or None when the real tokens already stand first.
    slots: (B, T) token -> slot, None together with `order`.
    lengths: (B,) number of real tokens, or None without padding.
    ranks: (B or 1, T) rank of each token in its document, in token order, counting the tokens of a cache.
    segment_ids: (B, T) document of each *slot*, non-decreasing, or None when a row is one document.
    document_sizes: (B, T) number of real tokens in the document of each token (token order), or None without documents.
    """

    mask: torch.Tensor | None
    order: torch.Tensor | None
    slots: torch.Tensor | None
    lengths: torch.Tensor | None
    ranks: torch.Tensor
    segment_ids: torch.Tensor | None = None
    document_sizes: torch.Tensor | None = None


def take_tokens(hidden_states: torch.Tensor, index: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Row-wise gather on the time axis, `dim`: `(B, T, ...)` and `(B, S)` give `(B, S, ...)`."""
    if dim != 1:
        shape = list(hidden_states.shape)
        shape[dim] = index.shape[1]
        places = [1] * len(shape)
        places[0], places[dim] = index.shape
        return hidden_states.gather(dim, index.view(places).expand(shape))
    batch, length = hidden_states.shape[:2]
    start = torch.arange(batch, device=index.device)[:, None] * length
    rows = hidden_states.reshape(batch * length, *hidden_states.shape[2:])
    # index_select copies whole rows and its backward is an index_add: far cheaper than an element-wise gather.
    return rows.index_select(0, (index + start).flatten()).reshape(batch, index.shape[1], *hidden_states.shape[2:])


def token_layout(
    batch_size: int,
    length: int,
    device: torch.device,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    seen_tokens: torch.Tensor | int | None = None,
) -> TokenLayout:
    """Build the layout of a batch of `(B, T)` tokens.

    Args:
        batch_size, length, device: of the token batch.
        mask: (B, T), 1 or True = real token. Padding may stand anywhere.
        segment_ids: (B or 1, T), non-decreasing along real tokens: 0 continues the document held by a cache (or is the
            first one), every other id is a new document that starts from nothing.
        seen_tokens: tokens of document 0 already held by a cache, an int or (B,).

    Linear in T. Works under torch.compile and torch.vmap, where it always reorders instead of looking at the values of the mask.
    """
    order = slots = lengths = None
    if mask is not None:
        mask = mask.to(torch.bool)
        lengths = mask.sum(-1)
        if not can_read_values(mask) or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
            real_slot = mask.cumsum(-1) - 1
            slots = torch.where(mask, real_slot, lengths[:, None] + (~mask).cumsum(-1) - 1)
            tokens = torch.arange(length, device=device).expand(batch_size, -1)
            order = torch.zeros_like(slots).scatter(1, slots, tokens)
    if segment_ids is None:
        return TokenLayout(mask, order, slots, lengths, _ranks(length, device, mask, seen_tokens))
    segment_ids = segment_ids.expand(batch_size, -1)
    if order is not None:
        segment_ids = segment_ids.gather(1, order)
    if lengths is not None:
        # Slots behind the last real token belong to its document, so that the last slot tells where the state stands.
        real = torch.arange(length, device=device) < lengths[:, None]
        last = torch.where(real, segment_ids, 0).amax(-1, keepdim=True)
        segment_ids = torch.where(real, segment_ids, last)
    ranks = slot_ranks(segment_ids, seen_tokens)
    sizes = _document_sizes(segment_ids, lengths)
    if slots is not None:
        ranks, sizes = ranks.gather(1, slots), sizes.gather(1, slots)
    return TokenLayout(mask, order, slots, lengths, ranks, segment_ids, sizes)


def _ranks(length, device, mask, seen_tokens) -> torch.Tensor:
    if mask is None:
        ranks = torch.arange(length, device=device)[None]
    else:
        ranks = (mask.cumsum(-1) - 1).clamp(min=0)
    if seen_tokens is None:
        return ranks
    return ranks + (seen_tokens[:, None] if isinstance(seen_tokens, torch.Tensor) else seen_tokens)


def slot_ranks(segment_ids: torch.Tensor, seen_tokens: torch.Tensor | int | None = None) -> torch.Tensor:
    """Rank of each slot in its document: `[0, 0, 0, 1, 1]` gives `[0, 1, 2, 0, 1]`, plus the cached tokens in
    document 0.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    new = torch.zeros_like(segment_ids, dtype=torch.bool)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    ranks = index - torch.where(new, index, 0).cummax(-1).values
    if seen_tokens is None:
        return ranks
    seen = seen_tokens[:, None] if isinstance(seen_tokens, torch.Tensor) else seen_tokens
    return ranks + torch.where(segment_ids == 0, seen, 0)


def _document_sizes(segment_ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(B, T) slots -> number of real tokens in the slot's document."""
    number = torch.zeros_like(segment_ids)
    number[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(-1)  # consecutive ids, at most T of them
    real = torch.ones_like(segment_ids)
    if lengths is not None:
        real = (torch.arange(segment_ids.shape[1], device=segment_ids.device) < lengths[:, None]).to(segment_ids.dtype)
    return torch.zeros_like(segment_ids).scatter_add(1, number, real).gather(1, number)
