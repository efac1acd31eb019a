"""DenseAttention: softmax-free attention o_i = sum_j A_ij (q_i . k_j) v_j, in linear time. DANet specification, section 1.

A is a 0/1 pattern. There is no softmax, no 1/sqrt(D) and no normaliser, so products may be taken in either order.
Patterns, by the rank of a token in its document (w is the window; causal patterns also ask j <= i):

    g   global           every j
    l   local            floor(j / w) = floor(i / w)
    sl  shifted local    floor((j + w/2) / w) = floor((i + w/2) / w)
    sw  sliding window   i - w < j <= i, causal only

    w = 4, 8 tokens     l: 00001111     sl: 00111122     sw, token 6: ...3456.

With `decay`, the terms of a causal global sum fade (see `fading`).

Implementations: `dense_attention_reference` is the formula with its mask, O(T^2); `dense_attention` is linear in T for every
pattern, takes a state and returns one, and serves a single step of generation as the case T = 1.
"""

import torch
import torch.nn.functional as F

from ..shared.precision import accumulation_dtype
from ..shared.sequence import padding_mask
from ..shared.token_order import slot_ranks, take_tokens, token_layout
from .fading import fading_attention
from .layouts import chunk_padding, crop_tokens, more_than, regroup
from .product_orders import (
    banded_attention,
    bidirectional_attention,
    causal_attention,
    document_attention,
    sliding_attention,
)
from .state import DenseAttentionState, decode_step, final_state, read_memory, read_ring, window_shift

PATTERNS = ("g", "l", "sl", "sw")
MODES = ("auto", "linear", "quadratic")


def check_dense_arguments(
    pattern: str, is_causal: bool, window_size: int | None, mode: str = "auto", name: str = "window_size"
) -> None:
    """Raise ValueError for a pattern, window (called `name`) or mode that has no meaning and would quietly become another one."""
    if pattern not in PATTERNS:
        raise ValueError(f"`pattern` is {pattern!r}; the patterns are {PATTERNS}")
    if mode not in MODES:
        raise ValueError(f"`mode` is {mode!r}; the modes are {MODES}")
    if pattern == "sw" and not is_causal:
        raise ValueError(
            "pattern 'sw' (sliding window) is defined for causal attention only; use 'l' and 'sl', or is_causal=True"
        )
    if pattern == "g":
        return
    if window_size is None or window_size <= 0 or window_size % 2:
        raise ValueError(f"`{name}` is {window_size!r}; pattern {pattern!r} needs a positive even number of tokens")


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pattern: str = "g",
    is_causal: bool = False,
    window_size: int | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: DenseAttentionState | None = None,
    output_final_state: bool = False,
    decay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, DenseAttentionState | None]:
    """DenseAttention over `(B, T, H, D)` tensors, linear in T.

    Args:
        query, key, value: (B, T, H, D). `value` may be `key` itself, which saves copies.
        pattern, is_causal, window_size: see the module's docstring.
        mode: order of the products of a bidirectional pattern; "auto" is linear when D <= T (or <= w in a window), and
            where torch.export keeps T symbolic. Equal results.
        chunk_size: tokens handled by the quadratic form inside a causal or packed row; None picks one near D.
        attention_mask: (B, T), 1 keeps. A padded token writes nothing, shifts no window and gets output 0, wherever it stands.
        segment_ids: (B or 1, T) of packed documents, non-decreasing; 0 continues `initial_state`, others start from nothing.
        initial_state: the state left by the tokens before (causal only).
        output_final_state: also return the state after the last real token.
        decay: (H,) rates r >= 0 at which the terms of pattern "g" fade, in float32 at least (causal only; see `fading`).

    Returns:
        (B, T, H, D) in the dtype of `query`, and the state, or None. Sums that are kept are float32 at least.

    Raises:
        ValueError: a pattern, window or mode that has no meaning, a state without causality, or a decay of other patterns.
    """
    check_dense_arguments(pattern, is_causal, window_size, mode)
    if decay is not None and (pattern != "g" or not is_causal):
        raise ValueError(f"`decay` is of causal global attention, got pattern {pattern!r} and is_causal={is_causal}")
    lengths = layout = None
    batch, length = query.shape[:2]
    attention_mask = padding_mask(attention_mask, batch, length)
    # First phase: padded tokens become zero rows behind the real ones.
    if attention_mask is not None:
        layout = token_layout(batch, length, query.device, attention_mask, segment_ids)
        lengths, segment_ids = layout.lengths, layout.segment_ids
        shared = value is key
        query, key = _real_tokens_first(query, layout), _real_tokens_first(key, layout)
        value = key if shared else _real_tokens_first(value, layout)
    elif segment_ids is not None:
        segment_ids = segment_ids.expand(batch, -1)
    # Second phase: the mechanism.
    out, state = front_packed_dense_attention(
        query,
        key,
        value,
        pattern=pattern,
        is_causal=is_causal,
        window_size=window_size,
        mode=mode,
        chunk_size=chunk_size,
        lengths=lengths,
        segment_ids=segment_ids,
        initial_state=initial_state,
        output_final_state=output_final_state,
        decay=decay,
    )
    # Third phase: every token back to its place.
    if layout is not None and layout.slots is not None:
        out = take_tokens(out, layout.slots)
    return out, state


def _real_tokens_first(states, layout) -> torch.Tensor:
    """(B, T, H, D) in the order of the layout's slots, padding 0."""
    states = states.masked_fill(~layout.mask[..., None, None], 0.0)
    return states if layout.order is None else take_tokens(states, layout.order)


def front_packed_dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pattern: str,
    is_causal: bool,
    window_size: int | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    lengths: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: DenseAttentionState | None = None,
    output_final_state: bool = False,
    decay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, DenseAttentionState | None]:
    """`dense_attention` for rows whose first `lengths` tokens are real and whose other rows are zero in all three tensors.

    This is what the layers call: they put their *input* in that order once, instead of three projections of it.
    """
    if (initial_state is not None or output_final_state) and not is_causal:
        raise ValueError(
            "a state needs causal attention: pass is_causal=True, or neither `initial_state` nor `output_final_state`"
        )
    if chunk_size is None:
        chunk_size = max(64, min(1024, query.shape[3]))
    if initial_state is not None and query.shape[1] == 1 and segment_ids is None:
        return decode_step(query, key, value, pattern, window_size, lengths, initial_state, decay)

    # First phase: the tokens of this call among themselves, and for causal global rows those of the state.
    memory = initial_state.memory if initial_state is not None and pattern == "g" else None
    if decay is not None:
        out = fading_attention(query, key, value, decay, chunk_size, segment_ids, memory)
    elif pattern == "g" and segment_ids is not None:
        out = document_attention(query, key, value, segment_ids, is_causal, chunk_size, memory)
    elif pattern == "g" and is_causal:
        out, memory = causal_attention(query, key, value, chunk_size, memory, output_final_state)
        return out, _memory_as_state(memory, query, lengths, initial_state) if output_final_state else None
    elif pattern == "g":
        out = bidirectional_attention(query, key, value, mode)
    elif segment_ids is not None or (initial_state is not None and pattern != "sw"):
        out = _windows_by_rank(query, key, value, pattern, is_causal, window_size, segment_ids, initial_state)
    elif pattern == "sw":
        out = sliding_attention(query, key, value, window_size)
    else:
        out = _aligned_windows(query, key, value, pattern, window_size, is_causal, mode, chunk_size)
    # Second phase: what windows that began before this call still hold.
    if initial_state is not None and pattern != "g":
        read = read_ring if pattern == "sw" else read_memory
        out = out + read(query, pattern, window_size, segment_ids, initial_state)
    # Third phase: what is left behind.
    if not output_final_state:
        return out, None
    return out, final_state(key, value, pattern, window_size, lengths, segment_ids, initial_state, decay)


def _memory_as_state(memory, query, lengths, initial) -> DenseAttentionState:
    """The state of a causal global row of one document, whose chunks have summed its memory up already."""
    batch, length = query.shape[:2]
    count = torch.full((batch,), length, dtype=torch.long, device=query.device) if lengths is None else lengths
    return DenseAttentionState(memory, count if initial is None else count + initial.count)


def _aligned_windows(query, key, value, pattern, window, is_causal, mode, chunk_size) -> torch.Tensor:
    """Local windows (l, sl) from rank 0: a reshape. `shift` empty slots stand before the first token."""

    def attend(query, key, value):
        if is_causal:
            return causal_attention(query, key, value, chunk_size, None)[0]
        return bidirectional_attention(query, key, value, mode)

    batch, length, heads, head_dim = query.shape
    shift = window_shift(pattern, window)
    if not more_than(shift + length, window):  # one window holds everything
        return attend(query, key, value)
    number, behind = chunk_padding(shift + length, window)

    def windows(states):  # (B, T, H, D) -> (B n, w, H, D)
        if shift or more_than(behind, 0):
            states = F.pad(states, (0, 0, 0, 0, shift, behind))
        return regroup(states, batch * number, window, heads, head_dim)

    shared = value is key
    query, key = windows(query), windows(key)
    out = attend(query, key, key if shared else windows(value))
    return crop_tokens(regroup(out, batch, number * window, heads, head_dim), shift, length)


def _windows_by_rank(query, key, value, pattern, is_causal, window, segment_ids, state) -> torch.Tensor:
    """Windows that start anywhere (packed documents, or a row continued from a state): a band with an explicit mask."""
    batch, length = query.shape[:2]
    index = torch.arange(length, device=query.device).expand(batch, -1)
    segments = torch.zeros_like(index) if segment_ids is None else segment_ids
    if pattern == "sw":
        return banded_attention(query, key, value, segments, index, window, is_causal, sliding=True)
    ranks = slot_ranks(segments, None if state is None else state.count) + window_shift(pattern, window)
    # Tokens share a window when they share its (possibly negative) first slot and their document.
    return banded_attention(query, key, value, segments, index - ranks % window, window, is_causal, sliding=False)


def pattern_mask(
    pattern: str,
    query_ranks: torch.Tensor,
    key_ranks: torch.Tensor,
    is_causal: bool,
    window_size: int | None = None,
    same_document: torch.Tensor | None = None,
) -> torch.Tensor:
    """The pattern A as a bool tensor `(..., Tq, Tk)` from ranks `(..., Tq)` and `(..., Tk)`. Specification 1.4, table.

    With w = 4, the rows of `l` over 6 tokens are 111100 (four times) and 000011 (twice).
    """
    check_dense_arguments(pattern, is_causal, window_size)
    i, j = query_ranks[..., :, None], key_ranks[..., None, :]
    if pattern == "g":
        allowed = torch.ones_like(i - j, dtype=torch.bool)
    elif pattern == "sw":
        allowed = j > i - window_size
    else:
        shift = window_shift(pattern, window_size)
        allowed = (i + shift) // window_size == (j + shift) // window_size
    if is_causal:
        allowed = allowed & (j <= i)
    return allowed if same_document is None else allowed & same_document


def dense_attention_scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Raw scores A_ij (q_i . k_j), `(B, H, Tq, Tk)`: signed, not normalised. The output is these times the values; O(T^2).

    A is `(Tq, Tk)` or `(B, Tq, Tk)`, or with factors a head (`fading_factors`) `(B or 1, H, Tq, Tk)`.
    """
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    return scores * (mask[:, None] if mask.dim() == 3 else mask)


def dense_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The definition: o_i = sum_j A_ij (q_i . k_j) v_j with A as for the scores. Sums in float32 at least; O(T^2)."""
    wide = accumulation_dtype(query.dtype)
    scores = dense_attention_scores(query.to(wide), key.to(wide), mask)
    return torch.einsum("bhij,bjhd->bihd", scores, value.to(wide)).to(query.dtype)
