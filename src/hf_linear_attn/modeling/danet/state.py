"""The fixed-size state of causal DenseAttention: what it holds, how tokens read it, how a step and a prompt leave it behind.

DANet specification, section 1.5. Pattern g keeps M = sum_j k_j^T v_j, with a decay the faded mean of `fading`, l and sl the same
sum over the current window, sw a ring buffer of the last w keys and values. Reading needs no order: without
a softmax a sum over the ring is the same from any slot.

Shapes: (B, T, H, D) tokens with the real ones first (`lengths` (B,) of them), (B, T) document ids per slot.
"""

from typing import NamedTuple

import torch

from ..kernels.tracing import as_written
from ..shared.precision import accumulation_dtype
from ..shared.token_order import slot_ranks, take_tokens


class DenseAttentionState(NamedTuple):
    """State of one layer; its size does not depend on the number of tokens seen.

    memory: (B, H, D, D) in float32 or wider for g, l and sl; for sw the ring of keys and values, (B, 2, w, H, D) in the dtype of
        the inputs, where the token of rank p stands in slot p mod w and a slot never written holds zeros.
    count: (B,) int64, tokens seen in the current document.
    """

    memory: torch.Tensor
    count: torch.Tensor


def window_shift(pattern: str, window: int | None) -> int:
    """Empty positions before the first token: w/2 for shifted windows, otherwise 0."""
    return window // 2 if pattern == "sl" else 0


def memory_shape(pattern: str, window: int | None, heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of `DenseAttentionState.memory` behind the batch."""
    return (2, window, heads, head_dim) if pattern == "sw" else (heads, head_dim, head_dim)


def decode_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: str,
    window: int | None,
    lengths: torch.Tensor | None,
    state: DenseAttentionState,
    decay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, DenseAttentionState]:
    """One token `(B, 1, H, D)`: write it, then read, so that it attends to itself. O(H D^2), or O(w H D) for sw.

    A padded token (length 0, zero rows) leaves the state as it is.
    """
    memory, count = state
    real = torch.ones_like(count) if lengths is None else lengths
    if pattern == "sw":
        slot = torch.arange(window, device=count.device) == (count % window)[:, None]  # (B, w)
        write = (slot & (real > 0)[:, None])[:, None, :, None, None]
        new = torch.stack((key, value), dim=1).to(memory.dtype)  # (B, 2, 1, H, D)
        memory = torch.where(write, new, memory)
        keys, values = memory.to(query.dtype).transpose(2, 3).unbind(1)  # (B, H, w, D)
        out = (query.transpose(1, 2) @ keys.transpose(-1, -2)) @ values
        return out.transpose(1, 2), DenseAttentionState(memory, count + real)
    wide = memory.dtype
    if pattern != "g":
        begins = ((count + window_shift(pattern, window)) % window == 0) & (real > 0)
        memory = torch.where(begins[:, None, None, None], 0.0, memory)
    written = key.to(wide).transpose(1, 2).transpose(-1, -2) * value.to(wide).transpose(1, 2)  # (B, H, D, D)
    if decay is not None:
        aged = (real[:, None] * decay.to(wide))[..., None, None]  # (B, H, 1, 1), 0 for a padded token
        memory, written = memory * torch.exp(-aged), written * -torch.expm1(-aged)
    memory = memory + written
    out = query.to(wide).transpose(1, 2) @ memory
    return out.transpose(1, 2).to(query.dtype), DenseAttentionState(memory, count + real)


def live_window(pattern: str, window: int, count: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Which tokens of rank `(B, T)` share the window whose sum a state of `count` tokens holds."""
    shift = window_shift(pattern, window)
    position = (count + shift)[:, None]
    return (position % window != 0) & ((ranks + shift) // window == position // window)


def read_memory(query, pattern, window, segment_ids, state: DenseAttentionState) -> torch.Tensor:
    """What the tokens of a continued window (l, sl) take from the state: Q M, and 0 for every other token."""
    ranks, current = _ranks(query, segment_ids, state)
    reads = live_window(pattern, window, state.count, ranks) & current
    memory = state.memory.to(query.dtype)
    return torch.where(reads[..., None, None], (query.transpose(1, 2) @ memory).transpose(1, 2), 0.0)


def read_ring(query, pattern, window, segment_ids, state: DenseAttentionState) -> torch.Tensor:
    """What tokens take from the ring of a sliding window: keys of rank p with i - w < p. Only the first w - 1 tokens can."""
    length = query.shape[1]
    near = min(length, window - 1) if isinstance(length, int) else length
    ranks, current = _ranks(query, segment_ids, state)
    ring = _ring_ranks(state.count, window)  # (B, w)
    reads = (ring[:, None, :] > ranks[:, :near, None] - window) & current[:, :near, None]  # (B, near, w)
    keys, values = state.memory.to(query.dtype).transpose(2, 3).unbind(1)  # (B, H, w, D)
    scores = torch.where(reads[:, None], query[:, :near].transpose(1, 2) @ keys.transpose(-1, -2), 0.0)
    out = (scores @ values).transpose(1, 2)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, length - near))


def _ranks(query, segment_ids, state) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks `(B, T)` counting the state's tokens, and which tokens go on with the state's document."""
    if segment_ids is not None:
        return slot_ranks(segment_ids, state.count), segment_ids == 0
    ranks = torch.arange(query.shape[1], device=query.device) + state.count[:, None]
    return ranks, torch.ones_like(ranks, dtype=torch.bool)


def _ring_ranks(count: torch.Tensor, window: int) -> torch.Tensor:
    """Rank of the newest token in each slot `(B, w)` after `count` tokens; negative where the slot is still empty."""
    slot = torch.arange(window, device=count.device)
    newest = count[:, None] - 1
    return newest - (newest - slot) % window


def final_state(
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: str,
    window: int | None,
    lengths: torch.Tensor | None,
    segment_ids: torch.Tensor | None,
    initial: DenseAttentionState | None,
    decay: torch.Tensor | None = None,
) -> DenseAttentionState:
    """The state after the last real token: what feeding the tokens one by one would leave. O(min(T, w)), but O(T) for g."""
    # First phase: how many tokens are new to the last document of each row, and whether it is the state's.
    batch, length = key.shape[:2]
    if lengths is None:
        lengths = torch.full((batch,), length, dtype=torch.long, device=key.device)
    seen = torch.zeros_like(lengths) if initial is None else initial.count
    goes_on = torch.ones_like(lengths, dtype=torch.bool)
    new = lengths
    if segment_ids is not None:
        goes_on = segment_ids[:, -1] == 0
        index = torch.arange(length, device=key.device)
        new = ((segment_ids == segment_ids[:, -1:]) & (index < lengths[:, None])).sum(-1)
    count = torch.where(goes_on, seen + new, new)
    if pattern == "sw":
        return DenseAttentionState(_final_ring(key, value, window, lengths, count, new, goes_on, initial), count)

    # Second phase: which of the last slots are in the window that is open now, and whether the state's memory is of that window.
    # A symbolic length (torch.export) is never compared: the last w slots may then begin before the first one.
    short = isinstance(length, int) and window is not None and length <= window
    tail = length if pattern == "g" or window is None or short else window
    last = torch.arange(tail, device=key.device) - tail
    slots = lengths[:, None] + last  # (B, tail), the last real tokens
    mine = slots >= (lengths - new)[:, None]
    keep = goes_on
    if pattern != "g":
        shift = window_shift(pattern, window)
        ranks, current = count[:, None] + last, (count - 1 + shift)[:, None] // window
        mine = mine & ((ranks + shift) // window == current)
        if initial is not None:
            keep = goes_on & ((new == 0) | live_window(pattern, window, seen, count[:, None] - 1)[:, 0])

    # Third phase: what they write, in float32 at least, on top of that memory.
    wide = accumulation_dtype(key.dtype)
    key_tail = take_tokens(key, slots.clamp(min=0)) * mine[..., None, None]
    value_tail = take_tokens(value, slots.clamp(min=0))
    key_tail, kept = key_tail.to(wide), 1.0
    if decay is not None:  # by how many tokens came since; (T, H) and (B, H, 1, 1)
        key_tail = key_tail * (-torch.expm1(-decay) * torch.exp((last + 1)[:, None] * decay))[..., None].to(wide)
        kept = torch.exp(-lengths[:, None] * decay)[..., None, None]
    with as_written(key):
        memory = torch.einsum("bthd,bthe->bhde", key_tail, value_tail.to(wide))
    if initial is not None:
        memory = memory + kept * torch.where(keep[:, None, None, None], initial.memory, 0.0).to(wide)
    return DenseAttentionState(memory, count)


def _final_ring(key, value, window, lengths, count, new, goes_on, initial) -> torch.Tensor:
    """(B, 2, w, H, D): for each slot its newest token of the current document, from this call, else from the old ring."""
    ranks = _ring_ranks(count, window)
    from_here = ranks >= (count - new)[:, None]
    slots = (lengths - count)[:, None] + ranks
    clamped = slots.clamp(0, key.shape[1] - 1)
    ring = torch.stack((take_tokens(key, clamped), take_tokens(value, clamped)), dim=1)
    here = (from_here & (ranks >= 0))[:, None, :, None, None]
    if initial is None:
        return torch.where(here, ring, 0.0)
    old = torch.where((goes_on[:, None] & (ranks >= 0))[:, None, :, None, None], initial.memory.to(ring.dtype), 0.0)
    return torch.where(here, ring, old)
