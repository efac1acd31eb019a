"""Hedgehog attention: exact softmax over the last tokens, learned features for all older ones, under one normaliser.

Query head h reads key head g(h); n and j are ranks among the real tokens of one document; w is the window. The weight of token j
for query n is

    a_nj = exp(gain_h + l_nj - c_n)                                n - w < j <= n     l_nj = scale q_n . k_j,  c_n = max_j l_nj
    a_nj = phi_q(q_n) . phi_k(k_j)  exp(r_{j+w+1} + ... + r_n)     j <= n - w
    out_n = sum_j a_nj v_j / sum_j a_nj

    phi(x) = [softmax(x W), softmax(-x W)]                         2 F features a head, positive, at most 1

with c_n the largest logit of the window of n, and r <= 0 the logarithm of what a token leaves of what is older than the window (0
without forgetting). Both parts share the scale of c_n: the window's largest weight is exp(gain), a pair of features gives at most
2, and the normaliser is at least exp(gain). So nothing overflows, whatever the logits, and a text inside the window is attended
to as by softmax alone, whatever the features. w = 3, token 5 of 6:

    token         0 1 2 3 4 5
    seen through  f f f s s s       f features, s softmax

Sources: the features are those of Hedgehog (arXiv 2402.04347, section 4), the window under one normaliser that of LoLCATs (arXiv
2410.10254, section 3.3), where `gain` is the logarithm of its mixing term.

State of one layer: the last w keys and values in a ring, sum_j phi(k_j) v_j^T and sum_j phi(k_j) of all that have left it, and
the count of tokens. `hedgehog_attention_reference` is the definition with its T x T weights; `hedgehog_attention` is linear in T.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..kernels.tracing import as_written, is_traced
from ..shared.precision import accumulation_dtype
from ..shared.token_order import TokenLayout, take_tokens, token_layout

GROUP = 64  # chunks whose sums are formed by one product
NOTHING = -1  # the "document" of slots of a ring that were never written


class HedgehogState(NamedTuple):
    """State of one layer; its size does not depend on the number of tokens seen.

    ring: (B, 2, w, G, D) keys and values in the dtype of the inputs; the token of rank p stands in slot p mod w, a slot never
        written holds zeros.
    matrix, vector: (B, G, 2 F, D) and (B, G, 2 F), sums over the tokens that have left the ring, in float32 at least.
    tokens: (B,) int64, tokens seen in the current document.
    """

    ring: torch.Tensor
    matrix: torch.Tensor
    vector: torch.Tensor
    tokens: torch.Tensor


def state_shapes(window: int, key_heads: int, head_dim: int, feature_size: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a `HedgehogState` behind the batch."""
    features = 2 * feature_size
    return (2, window, key_heads, head_dim), (key_heads, features, head_dim), (key_heads, features), ()


def feature_map(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """phi: (B, T, H, D) with maps (H, D, F) -> (B, T, H, 2 F), in float32 at least."""
    wide = accumulation_dtype(states.dtype)
    projected = torch.einsum("bthd,hdf->bthf", states.to(wide), weight.to(wide))
    return torch.cat((projected.softmax(-1), (-projected).softmax(-1)), dim=-1)


def hedgehog_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_map: torch.Tensor,
    key_map: torch.Tensor,
    gain: torch.Tensor,
    *,
    window: int,
    scale: float | None = None,
    softcap: float | None = None,
    log_decay: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: HedgehogState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    layout: TokenLayout | None = None,
) -> tuple[torch.Tensor, HedgehogState | None]:
    """Hedgehog attention of (B, T, H, D) queries over (B, T, G, D) keys and values; H is a multiple of G.

    Args:
        query, key, value: of the new tokens. Products and sums run in float32, or float64 for such inputs.
        query_map, key_map: (H, D, F) and (G, D, F), the features' weights. gain: (H,), logarithm of the window's weight.
        window: w, tokens seen by softmax, the query's own included.
        scale: of the logits, D^(-1/2) if not given. softcap: bound b of the logits, b tanh(l / b), if the host has one.
        log_decay: (B, T, G), at most 0: what each token leaves of all that is older than its window, in logarithm.
        mask: (B, T) bool, True for real tokens. A padded token writes nothing, moves no window and gets output 0, wherever it
        stands.
        segment_ids: (B, T) documents, non-decreasing; 0 continues `initial_state`, others start from nothing.
        initial_state, return_state: the state left by the tokens before, and whether to return the next one.
        chunk_size: tokens that are handled together; equal results.
        layout: where the real tokens stand, if that is known already.

    Returns:
        (B, T, H, D) in the dtype of `query`, and the state or None. O(T (w + F D)) time and memory.
    """
    if layout is None and (mask is not None or segment_ids is not None):
        layout = token_layout(query.shape[0], query.shape[1], query.device, mask, segment_ids)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lengths = documents = None
    with as_written(query):
        # First phase: padded tokens become zero rows behind the real ones.
        if layout is not None:
            lengths, documents = layout.lengths, layout.segment_ids
            query, key, value = (_real_tokens_first(x, layout) for x in (query, key, value))
            log_decay = None if log_decay is None else _real_tokens_first(log_decay, layout)
        # Second phase: the mechanism.
        inputs = (query, key, value, log_decay, query_map, key_map, gain)
        if initial_state is not None and query.shape[1] == 1 and documents is None:
            out, state = _step(*inputs, window, scale, softcap, lengths, initial_state)
        else:
            out, state = _chunked(
                *inputs, window, scale, softcap, lengths, documents, initial_state, return_state, chunk_size
            )
        # Third phase: every token back to its place.
        if layout is not None and layout.slots is not None:
            out = take_tokens(out, layout.slots)
        if layout is not None and layout.mask is not None:
            out = out.masked_fill(~layout.mask[..., None, None], 0.0)
    return out.to(query.dtype), state if return_state else None


def _real_tokens_first(states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """(B, T, ...) in the order of the layout's slots, padding 0."""
    if layout.mask is not None:
        states = states.masked_fill(~layout.mask.view(*layout.mask.shape, *[1] * (states.dim() - 2)), 0.0)
    return states if layout.order is None else take_tokens(states, layout.order)


def _step(query, key, value, log_decay, query_map, key_map, gain, window, scale, softcap, lengths, state):
    """One token (B, 1, H, D): the oldest of a full ring leaves it for the sums, the new one takes its slot, then all is read."""
    ring, matrix, vector, count = state
    wide = matrix.dtype
    real = torch.ones_like(count, dtype=torch.bool) if lengths is None else lengths > 0
    # First phase: the sums forget, and take in the token that leaves the window.
    slot = (count % window)[:, None]  # (B, 1)
    here = torch.arange(window, device=count.device) == slot  # (B, w)
    leaving = take_tokens(ring.transpose(1, 2), slot)[:, 0]  # (B, 2, G, D)
    leaves = (real & (count >= window))[:, None, None]
    features = feature_map(leaving[:, None, 0].to(wide), key_map)[:, 0]  # (B, G, 2 F)
    features = torch.where(leaves, features, 0.0)
    if log_decay is not None:
        kept = log_decay[:, 0].to(wide).exp()  # (B, G); 1 at padding
        matrix, vector = matrix * kept[..., None, None], vector * kept[..., None]
    matrix = matrix + features[..., None] * leaving[:, 1, :, None].to(wide)
    vector = vector + features
    # Second phase: the new token's key and value.
    write = (here & real[:, None])[:, None, :, None, None]
    ring = torch.where(write, torch.stack((key, value), dim=1).to(ring.dtype), ring)
    # Third phase: the window by softmax, the sums by features.
    heads = (key.shape[2], -1)
    grouped = query[:, 0].unflatten(1, heads).to(wide)  # (B, G, R, D)
    keys, values = ring.to(wide).transpose(2, 3).unbind(1)  # (B, G, w, D)
    logits = _logits(grouped, keys, scale, softcap)  # (B, G, R, w)
    filled = torch.arange(window, device=count.device) <= count[:, None]
    weights = _window_weights(logits, filled[:, None, None], gain.to(wide).view(*heads, 1))
    features = feature_map(query, query_map)[:, 0].unflatten(1, heads).to(wide)  # (B, G, R, 2 F)
    total = weights @ values + features @ matrix
    normaliser = weights.sum(-1) + (features @ vector[..., None])[..., 0]
    out = (total / normaliser[..., None]).flatten(1, 2)[:, None]
    return out, HedgehogState(ring, matrix, vector, count + real.long())


def _logits(query, keys, scale, softcap):
    """Softmax logits of (..., Q, D) queries and (..., K, D) keys."""
    logits = (query * scale) @ keys.transpose(-1, -2)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _window_weights(logits, visible, gain):
    """exp(gain + l - max l) where `visible`, of which every query has at least one."""
    logits = logits.masked_fill(~visible, -torch.inf)
    return (logits - logits.amax(-1, keepdim=True) + gain).exp()


def _chunked(
    query,
    key,
    value,
    log_decay,
    query_map,
    key_map,
    gain,
    window,
    scale,
    softcap,
    lengths,
    documents,
    state,
    keeps,
    chunk,
):
    """Any number of tokens, real ones first, in chunks of C of which each sees the w - 1 tokens before it."""
    batch, length, heads, _ = query.shape
    groups, wide = key.shape[2], accumulation_dtype(query.dtype)
    # First phase: chunks of C slots, behind as many slots for the ring's tokens, oldest first.
    count, chunk, behind, front = _chunks(length, chunk or min(max(window, 64), 256), window)
    chunked, rows = (count, chunk), (heads // groups, chunk)
    keys, values, numbers = _after_ring(key, value, documents, front, window, state)  # (B, f + T, G, D), (B, f + T)
    wide_keys, wide_values = (F.pad(x.to(wide), (0, 0, 0, 0, 0, behind)) for x in (keys, values))
    wide_values = F.pad(wide_values, (0, 1), value=1.0)  # a column whose sum is the normaliser
    slot = torch.arange(front + count * chunk, device=query.device)
    numbers = torch.where(slot < front + length, F.pad(numbers, (0, behind)), numbers[:, -1:])  # (B, f + n C)
    own, leaving = slice(front, None), slice(front - window, front - window + count * chunk)
    # Second phase: the window, own token and the w - 1 before it.
    queries = _queries(query.to(wide), chunked, behind, groups)  # (B, n, G, R C, D)
    near_keys, near_values = (_near(x, chunked, front).transpose(2, 3) for x in (wide_keys, wide_values))
    logits = _logits(queries, near_keys, scale, softcap).unflatten(3, rows)  # (B, n, G, R, C, f + C)
    ago = torch.arange(chunk, device=query.device)[:, None] + front - torch.arange(front + chunk, device=query.device)
    of_query = numbers[:, own].unflatten(1, chunked)  # (B, n, C)
    visible = (ago >= 0) & (ago < window) & (of_query[..., None] == _near(numbers, chunked, front)[:, :, None])
    weights = _window_weights(logits, visible[:, :, None, None], gain.to(wide).view(groups, -1, 1, 1))
    total = weights.flatten(3, 4) @ near_values  # (B, n, G, R C, D + 1)
    # Third phase: what has left the window. With each slot leaves the token w before it, if it is of the same document.
    real = slot[own] - front < (length if lengths is None else lengths[:, None])
    leaves = (numbers[:, leaving] == numbers[:, own]) & real
    features = feature_map(wide_keys[:, leaving], key_map) * leaves[..., None, None]
    features, left_values = (x.unflatten(1, chunked).transpose(2, 3) for x in (features, wide_values[:, leaving]))
    query_features = _queries(feature_map(query, query_map), chunked, behind, groups)  # (B, n, G, R C, 2 F)
    decay = None
    if log_decay is not None:
        decay = F.pad(log_decay.to(wide), (0, 0, 0, behind)).unflatten(1, chunked).transpose(2, 3)  # (B, n, G, C)
    before = None if state is None else torch.cat((state.matrix, state.vector[..., None]), dim=-1).to(wide)
    older, sums = _older(query_features, features, left_values, decay, of_query, before, rows)
    total = total + older
    # Fourth phase: one normaliser, tokens back in a row, and what is left behind.
    out = (total[..., :-1] / total[..., -1:]).unflatten(3, rows).permute(0, 1, 4, 2, 3, 5)  # (B, n, C, G, R, D)
    out = _first_tokens(out.reshape(batch, count * chunk, heads, -1), length)
    if not keeps:
        return out, None
    ring, number = _final_ring(
        keys[:, front - window :], values[:, front - window :], documents, lengths, window, state
    )
    return out, HedgehogState(ring, sums[..., :-1], sums[..., -1], number)


def _chunks(length, chunk: int, window: int):
    """How many chunks hold `length` tokens, of how many slots, how many of these are empty, and how many slots stand in front.

    For a symbolic length (torch.export) the number is even: PyTorch lays out a single chunk differently, and would ask.
    """
    if isinstance(length, int) and length <= chunk:
        return 1, length, 0, window
    group = chunk if isinstance(length, int) else 2 * chunk
    count = (length + group - 1) // group * (group // chunk)
    return count, chunk, count * chunk - length, -(-window // chunk) * chunk


def _first_tokens(states, length):
    """The first `length` of (B, T, ...)."""
    if is_traced():  # whether a slice is contiguous depends on its length, which a program may not ask: it copies
        return states.index_select(1, torch.arange(length, device=states.device))
    return states[:, :length]


def _queries(states, chunked, behind, groups):
    """(B, T, H, X) -> (B, n, G, R C, X): the R queries that share a key head under one another."""
    states = F.pad(states, (0, 0, 0, 0, 0, behind)).unflatten(1, chunked).unflatten(3, (groups, -1))
    return states.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)


def _near(states, chunked, front):
    """(B, f + n C, ...) -> (B, n, f + C, ...): each chunk behind the f slots before it; f a multiple of C unless n is 1."""
    count, chunk = chunked
    if isinstance(count, int) and count == 1:
        return states[:, None]
    starts = range(0, front + 1, chunk)
    return torch.cat([states[:, start : start + count * chunk].unflatten(1, chunked) for start in starts], dim=2)


def _after_ring(key, value, documents, front, window, state):
    """Keys and values (B, f + T, G, D), those of the ring in the slots before the call's, oldest first, and their documents."""
    batch, length = key.shape[:2]
    if documents is None:
        documents = key.new_zeros(batch, length, dtype=torch.long)
    if state is None:
        keys, values = (F.pad(x, (0, 0, 0, 0, front, 0)) for x in (key, value))
        return keys, values, F.pad(documents, (front, 0), value=NOTHING)
    ranks = state.tokens[:, None] - window + torch.arange(window, device=key.device)
    old = take_tokens(state.ring.transpose(1, 2), ranks % window).to(key.dtype)  # (B, w, 2, G, D)
    old, ranks = F.pad(old, [0, 0] * 3 + [front - window, 0]), F.pad(ranks, (front - window, 0), value=-1)
    keys, values = torch.cat((old[:, :, 0], key), dim=1), torch.cat((old[:, :, 1], value), dim=1)
    return keys, values, torch.cat((torch.where(ranks >= 0, 0, NOTHING), documents), dim=1)


def _older(query_features, features, values, decay, numbers, before, rows):
    """What queries take from all that has left their windows: (B, n, G, R C, D + 1), and the sums after the last slot.

    Args:
        query_features: (B, n, G, R C, 2 F). features, values: (B, n, G, C, 2 F) and (B, n, G, C, D + 1) of the tokens that leave
            with each slot. decay: (B, n, G, C), logarithm of what each slot leaves of earlier ones, or None.
        numbers: (B, n, C) document of each slot. before: (B, G, 2 F, D + 1) sums of document 0 before the first slot, or None.
    """
    chunk = rows[1]
    same = numbers[:, :, :, None] == numbers[:, :, None]  # (B, n, C, C)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=numbers.device).tril()
    inside = (same & lower)[:, :, None]  # (B, n, 1, C, C)
    ends = numbers[:, :, -1]
    if decay is not None:
        passed = decay.cumsum(-1)  # (B, n, G, C), from the chunk's first slot on
        inside = (passed[..., :, None] - passed[..., None, :]).masked_fill(~inside, -torch.inf).exp()
    # First phase: tokens that left within the chunk.
    scores = (query_features @ features.transpose(-1, -2)).unflatten(3, rows)  # (B, n, G, R, C, C)
    out = (scores * inside[:, :, :, None]).flatten(3, 4) @ values
    # Second phase: what each chunk adds for its last document, and the sums before each chunk. A state is of document 0.
    goes_on = (numbers == ends[..., None])[:, :, None]  # (B, n, 1, C)
    kept = goes_on if decay is None else goes_on * (passed[..., -1:] - passed).exp()
    added = (features * kept[..., None]).transpose(-1, -2) @ values  # (B, n, G, 2 F, D + 1)
    if before is None:
        before = torch.zeros_like(added[:, 0])
    edges = F.pad(ends, (1, 0))  # (B, 1 + n)
    totals = None if decay is None else F.pad(passed[..., -1], (0, 0, 1, 0))  # (B, 1 + n, G)
    sums = _running_sums(torch.cat((before[:, None], added), dim=1), totals, edges)
    # Third phase: tokens that left in earlier chunks.
    reads = (numbers == edges[:, :-1, None])[:, :, None]  # (B, n, 1, C)
    reads = reads if decay is None else reads * passed.exp()
    earlier = (query_features @ sums[:, :-1]).unflatten(3, rows) * reads[:, :, :, None, :, None]
    return out + earlier.flatten(3, 4), sums[:, -1]


def _running_sums(x: torch.Tensor, log_decay: torch.Tensor | None, edges: torch.Tensor) -> torch.Tensor:
    """s_c = x_c + [edge_c = edge_(c-1)] exp(log_decay_c) s_(c-1) of (B, N, G, X, Y), for all c at once.

    log_decay (B, N, G), at most 0, or None; edges (B, N), non-decreasing. Groups of chunks by one product each, then the groups'
    ends in the same way: linear in N.
    """
    number = x.shape[1]
    several = isinstance(number, int) and number > GROUP  # one product for the symbolic number of torch.export
    size = GROUP if several else number
    if several:
        behind = -number % size
        x, edges = F.pad(x, [0, 0] * 3 + [0, behind]), F.pad(edges, (0, behind))
        log_decay = None if log_decay is None else F.pad(log_decay, (0, 0, 0, behind))
    grouped, edges = x.unflatten(1, (-1, size)), edges.unflatten(1, (-1, size))  # (B, m, S, G, X, Y), (B, m, S)
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    kept = ((edges[:, :, :, None] == edges[:, :, None]) & lower)[:, :, None]  # (B, m, 1, S, S)
    passed = None
    if log_decay is not None:
        passed = log_decay.unflatten(1, (-1, size)).transpose(2, 3).cumsum(-1)  # (B, m, G, S)
        kept = (passed[..., :, None] - passed[..., None, :]).masked_fill(~kept, -torch.inf).exp()
    rows = grouped.transpose(2, 3).flatten(4)  # (B, m, G, S, X Y)
    sums = (kept.to(x.dtype) @ rows).unflatten(-1, x.shape[3:])  # (B, m, G, S, X, Y)
    if several:
        ends = edges[:, :, -1]
        totals = None if passed is None else passed[..., -1]
        before = _running_sums(sums[:, :, :, -1], totals, ends)[:, :-1]  # (B, m - 1, G, X, Y)
        goes_on = (edges[:, 1:] == ends[:, :-1, None])[:, :, None]  # (B, m - 1, 1, S)
        goes_on = goes_on if passed is None else goes_on * passed[:, 1:].exp()
        later = sums[:, 1:] + goes_on[..., None, None] * before[:, :, :, None]
        sums = torch.cat((sums[:, :1], later), dim=1)
    return sums.transpose(2, 3).flatten(1, 2)[:, :number]


def _final_ring(keys, values, documents, lengths, window, state):
    """The ring (B, 2, w, G, D) after the last real token, and the tokens (B,) of the document that is open then.

    keys, values: (B, w + T, G, D) as `_after_ring` has them.
    """
    batch, length, device = keys.shape[0], keys.shape[1] - window, keys.device
    if lengths is None:
        lengths = torch.full((batch,), length, dtype=torch.long, device=device)
    seen = torch.zeros_like(lengths) if state is None else state.tokens
    count = seen + lengths
    if documents is not None:
        slot = torch.arange(length, device=device)
        new = ((documents == documents[:, -1:]) & (slot < lengths[:, None])).sum(-1)
        count = torch.where(documents[:, -1] == 0, seen + new, new)
    newest = count[:, None] - 1
    ranks = newest - (newest - torch.arange(window, device=device)) % window  # (B, w), of the token in each slot
    place = lengths[:, None] + window - 1 - (newest - ranks)
    ring = torch.stack((take_tokens(keys, place), take_tokens(values, place)), dim=1)
    return torch.where((ranks >= 0)[:, None, :, None, None], ring, 0.0), count


def hedgehog_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    query_map: torch.Tensor,
    key_map: torch.Tensor,
    gain: torch.Tensor,
    *,
    window: int,
    scale: float | None = None,
    softcap: float | None = None,
    log_decay: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention of whole texts (B, H, T, T), rows of real tokens summing to 1, padding 0. O(T^2); arguments as above."""
    batch, length, heads, head_dim = query.shape
    wide, device = accumulation_dtype(query.dtype), query.device
    repeats = heads // key.shape[2]
    real = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask.bool()
    documents = torch.zeros_like(real, dtype=torch.long) if segment_ids is None else segment_ids.expand(batch, -1)
    # Who sees whom, and how many real tokens apart: ranks may count all documents of a row, only differences matter.
    rank = real.long().cumsum(-1)
    apart = rank[:, :, None] - rank[:, None]  # (B, T, T)
    seen = (apart >= 0) & (documents[:, :, None] == documents[:, None]) & real[:, None] & real[:, :, None]
    near = (seen & (apart < window))[:, None]
    far = (seen & (apart >= window))[:, None]
    keys = key.to(wide).repeat_interleave(repeats, dim=2)
    with as_written(query):
        scale = head_dim**-0.5 if scale is None else scale
        logits = torch.einsum("bthd,bshd->bhts", query.to(wide) * scale, keys)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        largest = logits.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
        largest = torch.where(largest.isfinite(), largest, 0.0)  # padding sees nothing
        shifted = (logits - largest + gain.to(wide).view(-1, 1, 1)).masked_fill(~near, -torch.inf)
        key_features = feature_map(key, key_map).repeat_interleave(repeats, dim=2)
        weights = torch.einsum("bthf,bshf->bhts", feature_map(query, query_map), key_features)
        if log_decay is not None:
            weights = weights * _decays(log_decay.to(wide), rank, real, far, window).repeat_interleave(repeats, dim=1)
        weights = shifted.exp() + torch.where(far, weights, 0.0)
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total > 0, total, 1.0)


def _decays(log_decay, rank, real, far, window):
    """exp(r_(j+w+1) + ... + r_n) of each pair (B, G, T, T) that is `far`."""
    passed = torch.where(real[..., None], log_decay, 0.0).cumsum(1).transpose(1, 2)  # (B, G, T)
    # Where the token w after j stands: the first column of that rank.
    place = torch.searchsorted(rank, rank + window).clamp(max=rank.shape[1] - 1)
    at_leaving = passed.gather(2, place[:, None].expand_as(passed))
    return (passed[..., :, None] - at_leaving[..., None, :]).masked_fill(~far, -torch.inf).exp()


def hedgehog_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_map, key_map, gain, *, window: int, **options
) -> torch.Tensor:
    """The definition, with its T x T weights: (B, T, H, D). Arguments as for `hedgehog_weights`."""
    weights = hedgehog_weights(query, key, query_map, key_map, gain, window=window, **options)
    values = value.to(weights.dtype).repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    mask = options.get("mask")
    values = values if mask is None else values.masked_fill(~mask.bool()[..., None, None], 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, values).to(query.dtype)


def hedgehog_state_reference(
    key: torch.Tensor, value: torch.Tensor, key_map: torch.Tensor, *, window: int, log_decay: torch.Tensor | None = None
) -> HedgehogState:
    """The state after one text (1, T, G, D) without padding, from the definition."""
    wide, length = accumulation_dtype(key.dtype), key.shape[1]
    ring = key.new_zeros(1, 2, window, *key.shape[2:])
    for rank in range(max(0, length - window), length):
        ring[:, 0, rank % window], ring[:, 1, rank % window] = key[:, rank], value[:, rank]
    left = max(0, length - window)
    features = feature_map(key[:, :left], key_map)  # (1, L, G, 2 F)
    if log_decay is not None:
        later = log_decay.to(wide).flip(1).cumsum(1).flip(1)  # r_t + ... + r_(T-1)
        features = features * F.pad(later, (0, 0, 0, 1))[:, window + 1 : window + 1 + left, :, None].exp()
    matrix = torch.einsum("btgf,btgd->bgfd", features, value[:, :left].to(wide))
    return HedgehogState(ring, matrix, features.sum(1), torch.tensor([length], device=key.device))
