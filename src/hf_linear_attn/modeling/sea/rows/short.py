"""Which queries of a call attend to all keys that they see, and which to those that an estimate has chosen.

Below a length N (`SeaConfig.min_sparse_length`) dense attention is exact and faster. The rule looks at what a query sees, real
tokens only: fewer than N keys, and it is dense. So a causal token's result does not depend on how a text is cut into calls:

    N = 4     token    a b c d e f       a, b and c see 1, 2 and 3 keys: dense. For d, e and f the layer goes on as after a
              keys     1 2 3 4 5 6       cache of three tokens, whose state holds the sums of their keys and values.

A bidirectional row is dense or sparse as a whole. Inside, as in a layer, real tokens stand first (`KeyLayout.compact`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...kernels.tracing import can_read_values
from ...shared.precision import accumulation_dtype
from ...shared.token_order import TokenLayout
from ..attention import SeaAttentionCore, SeaCoreOutput, SeaState
from ..cells import KeyLayout
from ..sparse_attention import repeat_key_heads


@dataclass(frozen=True)
class Part:
    """Some of the real tokens of a call: of each of its N rows those from column `start` on, L columns in all.

    rows: (N,) of the batch; None for all. start: one number, or (B,).
    layout: ranks of them, and of all keys that they see, in order of rank.
    """

    rows: torch.Tensor | None
    start: int | torch.Tensor
    layout: KeyLayout

    def columns(self) -> torch.Tensor:
        """(N or 1, L) columns of the tokens."""
        step = torch.arange(self.layout.query_length, device=self.layout.lengths.device)[None]
        return step + (self.start[:, None] if isinstance(self.start, torch.Tensor) else self.start)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(B, heads, T, D) -> (N, heads, L, D)."""
        x = x if self.rows is None else x[self.rows]
        if not isinstance(self.start, torch.Tensor):
            return x[:, :, self.start : self.start + self.layout.query_length]
        index = self.columns().clamp_max(x.shape[2] - 1)
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def places(self, batch: int, time: int) -> torch.Tensor:
        """(N L,) place of each token among the B T of the call; one behind them where there is none."""
        rows = torch.arange(batch, device=self.layout.lengths.device) if self.rows is None else self.rows
        return torch.where(self.layout.keep, rows[:, None] * time + self.columns(), batch * time).flatten()


def split(layout: KeyLayout, causal: bool, shortest: int) -> tuple[Part | None, Part | None]:
    """The tokens that see fewer than `shortest` keys, and the others; None where there are none."""
    padded, length, lengths = layout.keys.mask is not None, layout.query_length, layout.lengths
    device = lengths.device
    if layout.key_length < shortest:
        return _part(layout, None, 0, lengths, length, causal), None
    if not padded:  # what is dense is known without looking at a tensor
        first = min(max(shortest - 1 - layout.past_slots, 0), length) if causal else 0
        return tuple(  # type: ignore[return-value]
            _part(layout, None, start, torch.full_like(lengths, width), width, causal) if width else None
            for start, width in ((0, first), (first, length - first))
        )
    if causal:
        dense = (shortest - 1 - layout.past).clamp_min(0).minimum(lengths)
        widths = [min(length, shortest - 1), min(length, layout.key_length - shortest + 1)]
        if can_read_values(lengths):
            widths = torch.stack([dense.max(), (lengths - dense).max()]).tolist()
        short, long = ((0, dense), (dense, lengths - dense))
        return tuple(  # type: ignore[return-value]
            _part(layout, None, start, count, width, causal) if width else None
            for (start, count), width in zip((short, long), widths, strict=True)
        )
    is_short = lengths < shortest
    if not can_read_values(lengths):
        found = ((is_short, shortest - 1), (~is_short, length))
        return tuple(_part(layout, None, 0, lengths * chosen, width, False) for chosen, width in found)  # type: ignore[return-value]
    parts = []
    for chosen in (is_short, ~is_short):
        rows = chosen.nonzero()[:, 0]
        width = int(lengths[rows].max()) if len(rows) else 0
        # A row without a token has nothing to attend to, and the padding of long rows is cut off.
        parts.append(_part(layout, rows.to(device), 0, lengths[rows], width, False) if width else None)
    return parts[0], parts[1]


def _part(layout: KeyLayout, rows, start, lengths, width: int, causal: bool) -> Part:
    """The first `lengths` (N,) tokens from `start` on."""
    device = lengths.device
    mask = None if layout.keys.mask is None else torch.arange(width, device=device) < lengths[:, None]
    tokens = TokenLayout(mask, None, None, lengths, torch.arange(width, device=device)[None])
    keys, past = tokens, layout.past if rows is None else layout.past[rows]
    if causal:  # all of them, in order of rank
        keys = layout.keys._replace(order=None, slots=None)
    hidden = layout.key_length - width if causal else 0
    return Part(rows, start, KeyLayout(tokens, keys, lengths, past + start, width, hidden))


def attend(
    core: SeaAttentionCore,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: KeyLayout,
    scaling: float | None = None,
    state: SeaState | None = None,
    key_cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    teacher=None,
    output_attentions: bool = False,
    wants_state: bool = True,
    wants_estimate: bool = True,
    **options,
) -> SeaCoreOutput:
    """The layer on a call's tokens, dense where they see few keys; arguments and result as of `SeaAttentionCore`.

    With a `teacher` all of it is sparse. Without `wants_state` the result has none, and without `wants_estimate` neither
    estimate nor cells, where something is dense. The estimate of a dense token is 0, and all of its cells are kept.
    """
    sizes, causal = core.options, core.options.causal
    short, long = (None, None)
    shortest = sizes.dense_below(q.device)
    if teacher is None and shortest:
        short, long = split(layout, causal, shortest)
    shared = {"scaling": scaling, "output_attentions": output_attentions}
    if short is None:
        return core(q, k, v, layout=layout, state=state, key_cache=key_cache, teacher=teacher, **shared, **options)
    # First phase: real tokens first, real keys in order of rank.
    keys, values = (k, v) if key_cache is None else key_cache
    q, k, v = (layout.compact(x) for x in (q, k, v))
    if causal:
        keys, values = (layout.compact_keys(x) for x in (keys, values))
    # Second phase: each part by itself.
    scale = scaling if scaling is not None else (1.0 if causal else sizes.head_dim**-0.5)
    if causal:
        near_keys, near_values = (x[:, :, : shortest - 1] for x in (keys, values))
    else:
        near_keys, near_values = short.take(k), short.take(v)
    outputs = [_attend_densely(sizes, short.layout, short.take(q), near_keys, near_values, scale, output_attentions)]
    if causal and (wants_state or long is not None):
        state = core.state_after(short.take(k), short.take(v), short.layout, state)
    if long is not None:
        cache = (keys, values) if causal else None
        outputs.append(core(*map(long.take, (q, k, v)), layout=long.layout, state=state, key_cache=cache, **shared))
        state = outputs[-1].state
    # Last phase: both into the order of the input.
    joined = _join(
        [part for part in (short, long) if part is not None], outputs, layout, output_attentions, wants_estimate
    )
    joined.state = state if causal and wants_state else None
    return joined


def advance(core: SeaAttentionCore, q, k, v, layout: KeyLayout, scaling, state: SeaState | None) -> SeaState:
    """The state after these tokens, (B, heads, T, D) each, without attending."""
    short, long = split(layout, True, core.options.dense_below(q.device))
    if short is None:
        return core(q, k, v, layout=layout, scaling=scaling, state=state, only_state=True)
    q, k, v = (layout.compact(x) for x in (q, k, v))
    state = core.state_after(short.take(k), short.take(v), short.layout, state)
    if long is None:
        return state
    return core(*map(long.take, (q, k, v)), layout=long.layout, scaling=scaling, state=state, only_state=True)


def _attend_densely(
    options, layout: KeyLayout, q, keys, values, scale: float, output_attentions: bool
) -> SeaCoreOutput:
    """Softmax attention of q (N, H, L, D) to all visible ones of keys and values (N, G, S, D), which stand in order of rank."""
    batch, heads, length, _ = q.shape
    causal, plain = options.causal, not layout.is_padded
    visible = layout.visible(causal)
    seen = keys.shape[2]
    keys, values = (repeat_key_heads(x, heads) for x in (keys, values))
    simple = plain and not output_attentions and (not causal or length == 1 or seen == length)
    mask = None
    if not simple:
        mask = (torch.arange(seen, device=q.device) < visible[:, :, None].clamp_min(1))[:, None]  # (N, 1, L, S)
    probs = kept = None
    if output_attentions:
        kept = mask.expand(batch, heads, length, seen) & layout.keep[:, None, :, None]
        dtype = accumulation_dtype(q.dtype)
        scores = (q @ keys.transpose(-1, -2) * scale).to(dtype).masked_fill(~mask, torch.finfo(dtype).min)
        probs = layout.blank(scores.softmax(dim=-1))
        context = probs.to(q.dtype) @ values
    else:
        is_causal = causal and simple and length > 1
        context = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=is_causal, scale=scale)
    shape = (batch, heads, length, options.predictor_length)
    return SeaCoreOutput(
        context=layout.blank(context).transpose(1, 2).flatten(2),
        loss=None,
        losses={},
        estimated_probs=q.new_zeros((), dtype=accumulation_dtype(q.dtype)).expand(shape),
        cells=layout.keep[:, None, :, None].expand(shape),
        kept=kept,
        attention_probs=probs,
        state=None,
    )


def _join(
    parts: list[Part], outputs: list[SeaCoreOutput], layout: KeyLayout, maps: bool, estimate: bool
) -> SeaCoreOutput:
    """The parts' outputs as one of all tokens."""
    batch, time = layout.lengths.shape[0], layout.query_length
    whole = len(parts) == 1 and parts[0].rows is None and parts[0].layout.query_length == time

    def tokens(name: str, dim: int) -> torch.Tensor:
        """Axis `dim` of the field is that of the tokens."""
        found = [getattr(output, name) for output in outputs]
        if whole:
            return layout.restore(found[0], dim)
        if not layout.is_padded and parts[0].rows is None:
            return torch.cat(found, dim)
        pieces = [x.movedim(dim, 1).flatten(0, 1) for x in found]
        place = torch.cat([part.places(batch, time) for part in parts])
        out = pieces[0].new_zeros(batch * time + 1, *pieces[0].shape[1:]).index_copy(0, place, torch.cat(pieces))
        return layout.restore(out[:-1].unflatten(0, (batch, time)).movedim(1, dim), dim)

    def of_keys(name: str) -> torch.Tensor:
        for output in outputs:  # as many columns in all
            x = getattr(output, name)
            setattr(output, name, F.pad(x, [0, layout.key_length - x.shape[-1]]))
        return layout.restore_keys(tokens(name, 2))

    return SeaCoreOutput(
        context=tokens("context", 1),
        loss=None,
        losses={},
        estimated_probs=tokens("estimated_probs", 2) if estimate else None,
        cells=tokens("cells", 2) if estimate else None,
        kept=of_keys("kept") if maps else None,
        attention_probs=of_keys("attention_probs") if maps else None,
        state=None,
    )
