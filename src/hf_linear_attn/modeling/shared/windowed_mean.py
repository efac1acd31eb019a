"""Causal weighted means over a window: the mechanism that LEAP and Fastformer share (LEAP specification, sections 1, 4, 5).

Every token j carries a weight a_j > 0 per head. Token i sees the mean of what lies in its window W_i, the last `window`
tokens including itself, or all tokens so far (`window=None`, "global"):

    mean_i = sum_{j in W_i} a_j x_j / (sum_{j in W_i} a_j + eps)

    window 3:   i=0 #          window None:  i=0 #
                i=1 # #                      i=1 # #
                i=2 # # #                    i=2 # # #
                i=3 . # # #                  i=3 # # # #

With a `decay` r_h > 0 the weights of a global mean fade: a_j counts exp(-r_h (n_i - n_j)) a_j at token i, where n counts real
tokens, so that with r = ln 2 / t half of it is left after t tokens. The sums are those of `layers.decayed_sum`.

Two of them: `windowed_mean_reference` is the formula with its T x T matrix; `windowed_mean` is linear in T in time and memory,
whatever the window, and takes and leaves a state. Notation: B batch, T time, H heads, D features a head, C chunk, W window.
"""

import torch
import torch.nn.functional as F

from ..kernels.tracing import as_written, float32_products_are_rounded, is_traced
from .layers.decayed_sum import LOG_WEIGHT_FLOOR, decayed_sum, steps_taken
from .precision import accumulation_dtype
from .token_order import TokenLayout, take_tokens, token_layout

# Tokens are summed in chunks of this many by one product with a 0/1 matrix: large enough for the matrix units, small
# enough that the C-fold arithmetic stays far below that of the projections around it.
CHUNK = 64
EPS = 1e-5


def state_shapes(features: tuple[int, ...], window: int | None, log_weights: bool) -> list[tuple[int, ...]]:
    """Shapes, behind the batch, of the state that `windowed_mean` returns for values (B, T, *features), features (..., H, D)."""
    heads = features[-2:-1]
    if window is not None:
        return [(window - 1, *features), (window - 1, *heads)]
    return [features, heads, heads] if log_weights else [features, heads]


def windowed_mean(
    values: torch.Tensor,
    weights: torch.Tensor,
    window: int | None = None,
    *,
    log_weights: bool = False,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, ...] | None = None,
    return_state: bool = False,
    layout: TokenLayout | None = None,
    decay: torch.Tensor | None = None,
    eps: float = EPS,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Weighted mean of `values` over each token's window, in O(T) time and memory (LEAP specification, section 1).

    Args:
        values (`torch.Tensor` of shape `(B, T, ..., H, D)`): what is averaged; dimensions between T and H share the weights.
        weights (`torch.Tensor` of shape `(B, T, H)`): the weights a_j > 0, or their logarithms with `log_weights=True`.
        window (`int`, *optional*): tokens in the window, the token itself included; `None` sees all tokens so far.
        log_weights (`bool`): `weights` holds log a_j. Sums are then kept relative to a running maximum, so that no size of
            the logarithm overflows.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 or True keeps. A masked token has no weight and takes no place
            in any window, wherever it stands; the mean at its own position is 0.
        segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): non-decreasing document numbers; sums restart with each.
        initial_state (`tuple`, *optional*): what an earlier call returned for the tokens before these; with `segment_ids`
            document 0 goes on from it, every other begins anew.
        return_state (`bool`): also return the state after the last token.
        layout (`TokenLayout`, *optional*): where the real tokens stand, if it is known already (`token_layout` of `mask` and
            `segment_ids`); only a window over padded tokens asks for it.
        decay (`torch.Tensor` of shape `(H,)`, *optional*): rates r >= 0 at which weights fade, exp(-r) a real token; without a
            window only.
        eps (`float`): added to the sum of weights.

    Returns:
        `tuple`: the means, shape and dtype of `values`, and the state or None. The state, at least float32, of a global
        mean is `(sum of a x: (B, ..., H, D), sum of a: (B, H))`, with log weights both divided by exp of a third entry
        `(B, H)`; that of a windowed mean is the last W-1 tokens, oldest first:
        `(values (B, W-1, ..., H, D), weights (B, W-1, H))`.
        A window nothing has been written to gives 0.
    """
    dtype = accumulation_dtype(values.dtype)
    out_dtype = values.dtype
    values, weights = values.to(dtype), weights.to(dtype)
    neutral = -torch.inf if log_weights else 0.0
    order = slots = counts = ends = None
    if segment_ids is not None:
        # A state goes on with document 0, and leaves the one open at the last place of the call.
        ends = torch.zeros_like(segment_ids[:, :1]), segment_ids[:, -1:]
    if mask is not None:
        mask = mask.bool()
        weights = weights.masked_fill(~mask[..., None], neutral)
        if window is not None:
            # A windowed sum counts tokens, so the real ones move together first and their means move back afterwards.
            batch, length = mask.shape
            layout = token_layout(batch, length, mask.device, mask, segment_ids) if layout is None else layout
            order, slots, counts, segment_ids = layout.order, layout.slots, layout.lengths, layout.segment_ids
    if order is not None:
        values, weights = take_tokens(values, order), take_tokens(weights, order)
    with as_written(values):  # autocast would sum in half precision
        if window is None:
            mean, state = _global_mean(values, weights, log_weights, segment_ids, initial_state, mask, decay, eps)
        else:
            mean, state = _local_mean(
                values, weights, window, log_weights, segment_ids, ends, counts, initial_state, return_state, eps
            )
    if slots is not None:
        mean = take_tokens(mean, slots)
    if mask is not None:
        mean = mean.masked_fill(~mask.reshape(*mask.shape, *[1] * (mean.dim() - 2)), 0.0)
    return mean.to(out_dtype), (state if return_state else None)


def _global_mean(values, weights, log_weights, segment_ids, initial_state, mask, decay, eps):
    # First phase: sums over each document of this call alone.
    if decay is None:
        (sums, norm), reference = _weighted_sums(values, weights, None, log_weights, segment_ids)
    else:
        decay = decay.to(values.dtype)
        (sums, norm), reference = _fading_sums(values, weights, decay, log_weights, segment_ids, mask)
    # Second phase: what came before belongs to document 0 only, and has faded since.
    if initial_state is not None:
        past_sum, past_norm = initial_state[0][:, None], initial_state[1][:, None]
        faded = (
            None if decay is None else -decay * steps_taken(values.shape[1], values, mask)[..., None]
        )  # (B or 1, T, H)
        if faded is not None and not log_weights:
            past_norm, past_sum = past_norm * faded.exp(), past_sum * _over_heads(faded.exp(), sums)
        if segment_ids is not None:
            first = (segment_ids == 0)[..., None]
            past_norm = torch.where(first, past_norm, 0.0)
            past_sum = torch.where(_over_heads(first, past_sum), past_sum, 0.0)
        if log_weights:
            past_reference = initial_state[2][:, None].to(reference.dtype)
            past_reference = past_reference if faded is None else past_reference + faded
            if segment_ids is not None:
                past_reference = torch.where(first, past_reference, LOG_WEIGHT_FLOOR)
            joint = torch.maximum(reference, past_reference)
            now, before = torch.exp(reference - joint), torch.exp(past_reference - joint)
            sums, norm, reference = sums * _over_heads(now, sums), norm * now, joint
            past_sum, past_norm = past_sum * _over_heads(before, sums), past_norm * before
        sums, norm = sums + past_sum, norm + past_norm
    state = (sums[:, -1], norm[:, -1]) + ((reference[:, -1],) if log_weights else ())
    return _divide(sums, norm, reference, eps), state


def _local_mean(values, weights, window, log_weights, segment_ids, ends, counts, initial_state, return_state, eps):
    neutral = -torch.inf if log_weights else 0.0
    length, kept = values.shape[1], window - 1
    if initial_state is not None and kept:
        values = torch.cat([initial_state[0].to(values.dtype), values], dim=1)
        weights = torch.cat([initial_state[1].to(weights.dtype), weights], dim=1)
        if segment_ids is not None:
            segment_ids = torch.cat([ends[0].expand(-1, kept), segment_ids], dim=1)
    if length == 1 and initial_state is not None and kept and segment_ids is None:
        # One step of decoding: the window is exactly what lies here.
        (sums, norm), reference = _sum_all(values, weights, log_weights)
    else:
        (sums, norm), reference = _weighted_sums(values, weights, window, log_weights, segment_ids)
        if initial_state is not None and kept:
            sums, norm = sums[:, kept:], norm[:, kept:]
            reference = None if reference is None else reference[:, kept:]
    state = None
    if return_state:
        if segment_ids is not None:
            weights = weights.masked_fill((segment_ids != ends[1])[..., None], neutral)
        if initial_state is None or not kept:
            values = F.pad(values, [0, 0] * (values.dim() - 2) + [kept, 0])
            weights = F.pad(weights, [0, 0, kept, 0], value=neutral)
        if counts is None:
            state = (values[:, length:], weights[:, length:])
        else:
            last_tokens = counts[:, None] + torch.arange(kept, device=values.device)
            state = (take_tokens(values, last_tokens), take_tokens(weights, last_tokens))
    return _divide(sums, norm, reference, eps), state


def _divide(sums, norm, reference, eps):
    floor = eps if reference is None else eps * torch.exp(-reference)
    return sums / _over_heads(norm + floor, sums)


def _over_heads(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View (B, T, H) so that it broadcasts against (B, T, ..., H, D)."""
    return x.reshape(*x.shape[:2], *[1] * (like.dim() - 4), x.shape[2], 1)


def _sum_all(values, weights, log_weights):
    reference = None
    if log_weights:
        reference = weights.detach().amax(1, keepdim=True).clamp(min=LOG_WEIGHT_FLOOR)
        weights = torch.exp(weights - reference)
    sums = (_over_heads(weights, values) * values).sum(1, keepdim=True)
    return (sums, weights.sum(1, keepdim=True)), reference


def _weighted_sums(values, weights, window, log_weights, segment_ids):
    """Sums of a x (B, T, ..., H, D) and of a (B, T, H) over each window; with log weights relative to exp(reference)."""
    if not log_weights:
        weighted = (_over_heads(weights, values) * values).flatten(2)[:, :, None]
        sums, _ = _chunked_sum(weighted, window, segment_ids)
        norm, _ = _chunked_sum(weights[:, :, None], window, segment_ids)
        return (sums.view(values.shape), norm[:, :, 0]), None
    # The maximum differs by head, so heads lie beside the batch.
    sums, reference = _chunked_sum(_by_head(values), window, segment_ids, weights)
    return _sums_and_norm(sums, values), reference


def _fading_sums(values, weights, decay, log_weights, segment_ids, mask):
    """`_weighted_sums` over all tokens so far, the weights fading; each head at its own rate."""
    features = _by_head(values)
    if log_weights:
        sums, reference = decayed_sum(features, decay, mask, segment_ids, weights)
    else:
        sums, reference = decayed_sum(features * weights[..., None], decay, mask, segment_ids)
    return _sums_and_norm(sums, values), reference


def _by_head(values):
    """Values (B, T, ..., H, D) as features of their heads, and a feature of ones, which counts the weights: (B, T, H, F + 1)."""
    features = values.reshape(*values.shape[:2], -1, *values.shape[-2:]).transpose(2, 3).flatten(3)
    return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)


def _sums_and_norm(sums, values):
    """Sums of `_by_head` back in the shape of the values, and those of the weights (B, T, H)."""
    norm, sums = sums[..., -1], sums[..., :-1].unflatten(3, (-1, values.shape[-1])).transpose(2, 3)
    return sums.reshape(values.shape), norm


def _chunked_sum(x, window=None, segment_ids=None, log_weights=None, depth=0, reverse=False):
    """Sum x (B, T, H, F), weighted by exp(log_weights (B, T, H)) if given, over each window; no subtraction anywhere.

    The row is cut into chunks of C tokens. A window that ends at place r of chunk c, with W - 1 = m C + rest, is made of
    what it covers of chunk c, the whole chunks c-m+1 .. c-1, the end of chunk c-m, and the end of chunk c-m-1 when r < rest:

        chunk        c-m-1      c-m       ...      c-1        c
        window    [ . . . # | # # # # | # # # # | # # # # | # # . . ]

    Parts of chunks are products with 0/1 matrices; the run of whole chunks is this same sum over the chunks' totals.
    `reverse` sums over the tokens whose windows hold this one instead: the same picture read from the right.
    Returns the sums, and with log weights the reference (B, T, H) that they are relative to.
    """
    length = x.shape[1]
    step = -1 if reverse else 1
    # While compiling, the length may be dynamic and must not be asked for: three levels hold any (in the third a chunk
    # stands for 4096 tokens), and chunks in pairs keep their number from being 1, which would be compiled apart.
    tracing = is_traced()
    if depth and isinstance(length, torch.SymInt) and window is None and segment_ids is None and log_weights is None:
        sums = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
        return sums, None  # torch.export would not keep a length dynamic through a second level of tables
    # First phase: cut the row into chunks.
    single = depth == 2 or (depth == 0 and length == 1) or (not tracing and length <= CHUNK)
    chunk = length if single else CHUNK
    pair = 2 if tracing else 1
    count = 1 if single else pair * ((length + pair * chunk - 1) // (pair * chunk))
    padding = count * chunk - length
    values = _cut(x, padding, single).transpose(2, 3)  # (B, n, H, C, F)
    segments = None if segment_ids is None else _cut(segment_ids, padding, single)  # (B, n, C)
    logs = None  # (B, n, H, C)
    if log_weights is not None:
        logs = _cut(log_weights, padding, single, -torch.inf).transpose(2, 3)

    # Second phase: the tables of what a window covers, of the chunk itself and of the two at the window's far end, and (by this
    # same sum, over totals) the run of whole chunks between.
    parts = _tables(chunk, window, single, x.device, reverse)
    parts = [part for part in parts if tracing or part[0] < count]
    between = (
        None if single or window is None else (window - 1) // chunk - 1
    )  # whole chunks; all of them without a window
    before = None
    if not single and (between is None or between > 0):
        before = _chunks_before(values, segments, logs, between, depth, reverse)
    # Third phase: what documents and log weights leave of the tables; log weights become weights relative to the largest seen.
    scores = [_scores(step * distance, table, columns, segments, logs) for distance, table, _, columns in parts]
    continued = None
    if before is not None and segments is not None:
        border = segments[..., :1] if reverse else segments[..., -1:]
        continued = (segments == _shift(border, step, fill=-1))[:, :, None]  # (B, n, 1, C)
        if logs is not None:  # a document that was loud sets no scale for the next one
            before = before[0], torch.where(continued, before[1], LOG_WEIGHT_FLOOR)
    reference = None
    if logs is not None:
        tops = [score.detach().amax(-1) for score in scores] + ([] if before is None else [before[1]])
        reference = torch.stack(torch.broadcast_tensors(*tops)).amax(0).clamp(min=LOG_WEIGHT_FLOOR)
        scores = [torch.exp(score - reference[..., None]) for score in scores]
    # Fourth phase: the products of the tables with the chunks that they see, and what came before.
    total = _seen(parts, scores, values, reverse)
    if before is not None:
        earlier, earlier_reference = before
        if logs is not None:
            earlier = earlier * torch.exp(earlier_reference - reference)[..., None]
        if continued is not None:
            earlier = torch.where(continued[..., None], earlier, 0.0)
        total.add_(earlier)
    return _join(total, single, length), None if reference is None else _join(reference, single, length)


def windowed_sum(
    x: torch.Tensor, window: int | None = None, segment_ids: torch.Tensor | None = None, reverse: bool = False
) -> torch.Tensor:
    """Sum of x (B, T, F) over each token's window within its document; O(T) time and memory.

    With `reverse`, the sum over the tokens whose windows hold this one: the transposed map, which gradients go through.
    """
    return _chunked_sum(x[:, :, None], window, segment_ids, reverse=reverse)[0][:, :, 0]


def _chunks_before(values, segments, logs, window, depth, reverse):
    """Sum over the whole chunks before each chunk: (B, n, H, 1, F), and their reference (B, n, H, 1) with log weights."""
    step = -1 if reverse else 1
    # First phase: the total of each chunk.
    ends = None if segments is None else segments[..., 0 if reverse else -1]
    # A chunk hands on what belongs to the document that is open at its end.
    tail = None if segments is None else (segments == ends[..., None])[:, :, None]
    tops = None
    if logs is not None:
        scores = logs if tail is None else logs.masked_fill(~tail, -torch.inf)
        tops = scores.detach().amax(-1).clamp(min=LOG_WEIGHT_FLOOR)
        totals = (values * torch.exp(scores - tops[..., None])[..., None]).sum(3)
    else:
        totals = (values if tail is None else values * tail[..., None]).sum(3)
    # Second phase: their sums, moved on by a chunk.
    sums, reference = _chunked_sum(totals, window, ends, tops, depth + 1, reverse)
    sums = _shift(sums, step)[:, :, :, None]
    return sums, None if reference is None else _shift(reference, step, fill=LOG_WEIGHT_FLOOR)[..., None]


def _visible(chunk, window, distance, device):
    """(C, C) table: may place r of a chunk see place j of the chunk `distance` before it?"""
    place = torch.arange(chunk, device=device)
    gap = place[:, None] - place[None, :] + distance * chunk
    visible = gap >= 0
    return visible if window is None else visible & (gap < window)


def _tables(chunk, window, single, device, reverse):
    """What windows cover of their own chunk and of the two at their far end.

    A list of: how many chunks away, the table of places that see (rows) and are seen (columns), and which rows and columns of
    the chunk these are.
    """

    def visible(distance):
        table = _visible(chunk, window, distance, device)
        return table.T if reverse else table

    everything = slice(None)
    parts = [(0, visible(0), everything, everything)]
    if single or window is None:
        return parts
    whole, rest = (window - 1) // chunk, (window - 1) % chunk
    if whole:
        parts.append((whole, visible(whole), everything, everything))
    if rest:
        first, last = slice(0, rest), slice(chunk - rest, None)
        rows, columns = (last, first) if reverse else (first, last)
        parts.append((whole + 1, visible(whole + 1)[:, columns], rows, columns))
    return parts


def _seen(parts, scores, values, reverse):
    """Sum of the products of tables, as `_scores` leaves them, with the chunks (B, n, H, C, F) that they see."""
    total = _product(scores[0].to(values.dtype), values)
    for (distance, _, rows, columns), matrix in zip(parts[1:], scores[1:]):
        matrix, seen = matrix[..., rows, :].to(values.dtype), values[..., columns, :]
        if is_traced():
            total[..., rows, :].add_(_product(matrix, _shift(seen, -distance if reverse else distance)))
        else:  # the first chunks, or the last in reverse, see nothing that far away
            places, sources = slice(distance, None), slice(None, -distance)
            places, sources = (sources, places) if reverse else (places, sources)
            matrix = matrix if matrix.dim() == 2 else matrix[:, places]
            total[:, places, ..., rows, :].add_(_product(matrix, seen[:, sources]))
    return total


def _scores(distance, visible, columns, segments, logs):
    """What `visible` leaves, per document and with the log weights: a 0/1 table or the masked log weights."""
    if segments is not None:
        same = segments[..., :, None] == _shift(segments[..., columns], distance, fill=-1)[..., None, :]
        visible = (visible & same)[:, :, None]
    if logs is None:
        return visible
    shifted = _shift(logs[..., columns], distance, fill=-torch.inf)
    return shifted[..., None, :].masked_fill(~visible, -torch.inf)


def _product(matrix, x):
    """Matrix @ x at full float32 precision, also where the user allows TF32 or bf16 inside float32 products."""
    if x.dtype == torch.float32 and float32_products_are_rounded():
        # 0/1 matrices are exact in any of these formats, and three bf16 numbers hold all 24 bits of a float32.
        high = x.detach().bfloat16().to(x.dtype)
        middle = (x.detach() - high).bfloat16().to(x.dtype)
        return matrix @ high + matrix @ middle + matrix @ (x - high - middle)
    return matrix @ x


def _cut(x, padding, single, fill=0):
    """Cut (B, T, ...) into chunks (B, n, C, ...); the last is filled up at its end, which no earlier token sees."""
    if single:
        return x[:, None]
    if isinstance(padding, int) and padding == 0:  # padding by nothing copies
        return x.unflatten(1, (-1, CHUNK))
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, padding], value=fill).unflatten(1, (-1, CHUNK))


def _join(x, single, length):
    """Chunks (B, n, H, C, ...) back to (B, T, H, ...)."""
    x = x.transpose(2, 3)
    if single:
        return x[:, 0]
    if isinstance(length, torch.SymInt):
        # torch.export cannot see that `length` places are there, and would give up a dynamic length for a slice.
        return x.flatten(1, 2).index_select(1, torch.arange(length, device=x.device))
    return x.flatten(1, 2)[:, :length]


def _shift(x, distance, fill=0):
    """Move chunks (B, n, ...) `distance` places on (back if negative), which may be further than there are chunks."""
    if distance == 0:
        return x
    if distance < 0:
        return F.pad(x, [0, 0] * (x.dim() - 2) + [0, -distance], value=fill)[:, -distance:]
    return F.pad(x, [0, 0] * (x.dim() - 2) + [distance, 0], value=fill)[:, : x.shape[1]]


def attention_rows(
    weights: torch.Tensor,
    window: int | None = None,
    *,
    log_weights: bool = False,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    decay: torch.Tensor | None = None,
    eps: float = EPS,
) -> torch.Tensor:
    """The matrix alpha_ij = a_j [j in W_i] / (sum over W_i + eps) behind the means, (B, H, T, T) (specification, section 7).

    With a `decay` r, a_j exp(-r (n_i - n_j)) in the place of a_j. Arguments as in `windowed_mean`. O(T^2): for looking at, and
    for the reference.
    """
    weights = weights.to(accumulation_dtype(weights.dtype))
    keep = torch.ones(weights.shape[:2], dtype=torch.bool, device=weights.device) if mask is None else mask.bool()
    rank = keep.long().cumsum(1) - 1
    gap = rank[:, :, None] - rank[:, None, :]
    place = torch.arange(weights.shape[1], device=weights.device)
    visible = keep[:, :, None] & keep[:, None, :] & (place[:, None] >= place)
    if window is not None:
        visible = visible & (gap < window)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = weights.transpose(1, 2)[:, :, None, :]
    if decay is not None:
        faded = -decay.to(weights.dtype)[:, None, None] * gap[:, None].clamp(min=0)  # (B, H, T, T)
        scores = scores + faded if log_weights else scores * faded.exp()
    scores = scores.masked_fill(~visible[:, None], -torch.inf if log_weights else 0.0)
    floor: float | torch.Tensor = eps
    if log_weights:
        top = scores.amax(-1, keepdim=True).clamp(min=LOG_WEIGHT_FLOOR)
        scores, floor = torch.exp(scores - top), eps * torch.exp(-top)
    return scores.masked_fill(~visible[:, None], 0.0) / (scores.sum(-1, keepdim=True) + floor)


def windowed_mean_reference(values, weights, window=None, **kwargs) -> torch.Tensor:
    """The definition, with its T x T matrix; arguments as in `attention_rows`, values as in `windowed_mean`."""
    rows = attention_rows(weights, window, **kwargs)
    return torch.einsum("bhij,bj...he->bi...he", rows, values.to(rows.dtype)).to(values.dtype)
