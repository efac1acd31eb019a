"""One layer of SEA: estimate the attention with linear cost, keep its largest cells, attend on the keys behind them.

    q, k, v -> kernel attention of [position, v] -> encoder -> row decoder -> convolutions -> softmax over M cells
            -> largest cells -> softmax attention on their keys -> gates and a global average -> context

B batch, H heads, T time, D head size, M compressed width. Tensors are head-major, (B, H, T, D), as in the attention functions of
Transformers. The pretrained projections stay in the host; a core holds only what SEA adds. Source: specification, section 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..kernels.running_sum import running_sum
from ..kernels.tracing import as_written, is_traced, records_gradients
from ..shared.compat import init
from ..shared.precision import accumulation_dtype
from ..shared.sequence import padding_mask
from .cells import KeyLayout, select_cells
from .configuration_sea import SeaOptions
from .estimator import (
    BIDIRECTIONAL_CHANNELS,
    BIDIRECTIONAL_REDUCTION,
    CAUSAL_CHANNELS,
    CAUSAL_REDUCTION,
    BidirectionalCellNetwork,
    CausalCellNetwork,
    SeaEncoder,
    interpolated_identity,
)
from .kernel_attention import (
    bidirectional_kernel_attention,
    causal_kernel_attention,
    orthogonal_gaussian_features,
    relu_features,
    softmax_key_features,
    softmax_query_features,
)
from .losses import TeacherTargets, attention_fidelity, attention_losses
from .sparse_attention import (
    chunked_sparse_attention,
    dense_sparse_attention,
    grow_cells,
    grown_average,
    is_fused,
    repeat_key_heads,
)

# "auto" takes the dense form up to so many keys, where it is faster: of one query, and of many (measured on two cores).
DENSE_KEYS_OF_ONE, DENSE_KEYS, DENSE_KEYS_PER_K = 1024, 128, 6
CLEAN_GATE_BIAS = 4.0  # sigmoid(4) = 0.98: a converted layer starts close to sparse attention alone
LOSS_WEIGHTS = {"estimate_kl": 0.1, "estimate_mse": 1.0, "student_kl": 0.1, "student_mse": 1.0, "context_mse": 1.0}


class SeaState(NamedTuple):
    """What a causal layer keeps besides keys and values; its size does not depend on the length (specification, section 3.4).

    kernel (B, H, F, 2D + 1), value_sum (B, H, D), conv1_rows and conv2_rows (B, 2H, 4, M / 4); shapes in `SeaOptions`.
    """

    kernel: torch.Tensor
    value_sum: torch.Tensor
    conv1_rows: torch.Tensor
    conv2_rows: torch.Tensor


@dataclass
class SeaCoreOutput:
    """Result of a layer, in the order of the input tokens.

    Attributes:
        context: (B, T, H D), heads concatenated, 0 at padded tokens (the official form leaves numbers there).
        loss: scalar against the teacher, None without one.
        losses: the terms of the loss.
        estimated_probs: (B, H, T, M), softmax over the cells, 0 at padded rows and at dense ones (nothing is estimated there).
        cells: (B, H, T, M) bool, the selected ones.
        kept: (B, H, T, S) bool over key slots, if asked for or if the options say "dense", which makes it anyway.
        attention_probs: (B, H, T, S), sparse attention times its gate (a row sums to the gate), likewise.
        state: `SeaState` after the last token of a causal layer.
        fidelity: what `attention_fidelity` measures, only if asked for.
    """

    context: torch.Tensor
    loss: torch.Tensor | None
    losses: dict
    estimated_probs: torch.Tensor | None
    cells: torch.Tensor | None
    kept: torch.Tensor | None
    attention_probs: torch.Tensor | None
    state: SeaState | None
    fidelity: dict | None = None


class SeaAttentionCore(nn.Module):
    """SEA between a host's projections. `options` may be changed between calls (another k, another form of the attention)."""

    def __init__(self, options: SeaOptions):
        super().__init__()
        self.options = options
        dim, cells = options.head_dim, options.predictor_length
        self.register_buffer("random_features", torch.empty(options.feature_count, dim))
        self.encoder = SeaEncoder(dim)
        if options.causal:
            self.position_table = nn.Parameter(torch.empty(options.max_positions, dim))
            self.row_decoder = nn.Linear(2 * dim, CAUSAL_CHANNELS * cells // CAUSAL_REDUCTION)
            self.cnn = CausalCellNetwork(options.num_heads, cells)
        else:
            self.row_decoder = nn.Linear(2 * dim, BIDIRECTIONAL_CHANNELS * cells // BIDIRECTIONAL_REDUCTION)
            self.cnn = BidirectionalCellNetwork(options.num_heads, cells)
        self.scaler = nn.Linear(2 * dim, 2)  # gates of the sparse attention and of the mix with the average
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Initialise what is not a plain layer: features, position table N(0, 1), and the clean form's start."""
        self.redraw_features()
        if self.options.causal:
            self.position_table.normal_()
        self.start_near_host()

    @torch.no_grad()
    def start_near_host(self) -> None:
        """The clean form's start: gates open, a causal estimate that prefers the first and the near keys."""
        if self.options.official:
            return
        init.zeros_(self.scaler.weight)
        init.constant_(self.scaler.bias, CLEAN_GATE_BIAS)
        if self.options.causal:
            self.cnn.start_from_prior()

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw a new projection for the kernel attention."""
        if self.random_features.device.type != "meta":
            self.random_features.copy_(orthogonal_gaussian_features(*self.random_features.shape, generator=generator))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        teacher: TeacherTargets | tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        scaling: float | None = None,
        layout: KeyLayout | None = None,
        state: SeaState | None = None,
        key_cache: tuple[torch.Tensor, torch.Tensor] | None = None,
        output_attentions: bool = False,
        loss_rows: torch.Tensor | None = None,
        measure: bool = False,
        only_state: bool = False,
    ) -> SeaCoreOutput | SeaState:
        """Attend.

        Args:
            q: (B, H, T, D) queries.
            k, v: (B, G, T, D) keys and values of the same tokens, G dividing H (grouped queries).
            attention_mask: (B, T), 1 = keep. A padded token takes no part in anything. Excludes `layout`.
            teacher: targets, or a pair of scores (B, H, T, T) and context (B, T, H D). Not with a cache.
            scaling: factor of the scores. Default: D^-0.5 bidirectional; 1 causal, where q comes scaled already, because the
                estimator of the causal model sees scaled queries.
            layout: ranks and slots, made once for all layers (needed with a cache).
            state: `SeaState` of the tokens before these.
            key_cache: keys and values (B, G, S, D) of all tokens including these, by slot.
            output_attentions: also return `kept` and `attention_probs`, which are T x S (the dense form makes them anyway).
            loss_rows: (R,) ranks of the query rows that the attention losses look at; None is all.
            measure: also measure how well the estimate finds the teacher's attention (`fidelity`).
            only_state: return the `SeaState` after these tokens, without attending (causal only; `q` as for `scaling`).

        Raises:
            ValueError: shapes that do not fit, more tokens than the position table has rows.
        """
        if only_state:
            return self._advance(q, k, v, layout, scaling, state)
        self._check(q, k, v, teacher, key_cache)
        options = self.options
        if layout is None:
            attention_mask = padding_mask(attention_mask, q.shape[0], q.shape[2])
            layout = KeyLayout.from_mask(attention_mask, q.shape[0], q.shape[2], q.device)
        scale = scaling if scaling is not None else (1.0 if options.causal else options.head_dim**-0.5)
        if options.causal:  # scores and estimator see scaled queries
            q, scale = q * scale, 1.0
        q, k, v = (layout.compact(x) for x in (q, k, v))
        keep, visible = layout.keep, layout.visible(options.causal)
        k_heads, v_heads = (repeat_key_heads(x, options.num_heads) for x in (k, v))

        # First phase: the estimate, a distribution of each row over the cells.
        hidden, kernel_state = self._encode(q, k_heads, v_heads, layout, state)
        logits, rows_state = self._cell_logits(hidden, layout, state)
        probs = logits.softmax(dim=-1, dtype=accumulation_dtype(logits.dtype))  # (B, H, T, M)

        # Second phase: softmax attention on the keys of the largest cells. It reads a cache by slot; without one, keys are those
        # of this call, compacted.
        real = keep if layout.is_padded else None
        cells = select_cells(probs, visible, options.k, options.topk_group, real, options.official)
        keys, values, slots = (k, v, None) if key_cache is None else (*key_cache, layout.keys.order)
        sparse, kept, sparse_probs = self._attend(
            q, keys, values, cells, visible, scale, slots, layout, output_attentions
        )

        # Third phase: mix it with the rest of the average.
        gate, mix = self.scaler(hidden).to(probs.dtype).sigmoid().split(1, dim=-1)  # (B, H, T, 1) each
        average, value_sum = self._average(probs, v_heads, layout, state)
        context = torch.lerp(average.to(gate.dtype), gate * sparse, mix)
        if not options.official:
            context = layout.blank(context)
        context = context.transpose(1, 2).flatten(2).to(v.dtype)  # (B, T, H D)

        losses, fidelity = {}, None
        if teacher is not None:
            teacher = self._targets(teacher, context, layout)
            losses = self._losses(q, k_heads, scale, logits, visible, keep, context, teacher, loss_rows)
        if teacher is not None and measure:
            limit = options.cell_limit
            fidelity = attention_fidelity(cells, logits, visible, keep, teacher, options.k, limit, loss_rows)
        # Last phase: everything back into the order of the input.
        if kept is not None:
            kept, sparse_probs = (layout.restore(layout.restore_keys(x)) for x in (kept, gate * sparse_probs))
        return SeaCoreOutput(
            context=layout.restore(context, dim=1),
            loss=sum(losses.values()) if losses else None,
            losses=losses,
            estimated_probs=layout.restore(layout.blank(probs)),
            cells=layout.restore(cells),
            kept=kept,
            attention_probs=sparse_probs,
            state=SeaState(kernel_state, value_sum, *rows_state) if options.causal else None,
            fidelity=fidelity,
        )

    def _advance(self, q, k, v, layout: KeyLayout, scaling: float | None, state: SeaState | None) -> SeaState:
        q = q if scaling is None else q * scaling
        q, k, v = (layout.compact(repeat_key_heads(x, self.options.num_heads)) for x in (q, k, v))
        hidden, kernel_state = self._encode(q, k, v, layout, state)
        _, rows_state = self._cell_logits(hidden, layout, state)
        _, value_sum = self._average(None, v, layout, state)
        return SeaState(kernel_state, value_sum, *rows_state)

    def state_after(self, k: torch.Tensor, v: torch.Tensor, layout: KeyLayout, state: SeaState | None) -> SeaState:
        """The `SeaState` after tokens that attended to all keys, from their keys and values (B, G, T, D) alone.

        They count in the sums. The convolutions begin with the first query that is sparse: what they saw stays.
        """
        options, dtype = self.options, accumulation_dtype(v.dtype)
        k, v = (repeat_key_heads(layout.compact(x), options.num_heads) for x in (k, v))
        v = layout.blank(v).to(dtype)
        with as_written(v):
            keep = layout.keep if layout.is_padded else None
            features = relu_features(k, self.random_features, keep).transpose(-1, -2)  # (B, H, F, T)
            positions = self._position_rows(layout).to(dtype)[:, None].expand_as(v)
            parts = (features @ positions, features @ v, features.sum(dim=-1, keepdim=True))
        kernel, value_sum = torch.cat(parts, dim=-1), v.sum(dim=2)
        if state is not None:
            return state._replace(kernel=kernel + state.kernel, value_sum=value_sum + state.value_sum)
        rows = [v.new_zeros(v.shape[0], *shape) for shape in options.state_shapes[2:]]
        return SeaState(kernel, value_sum, *rows)

    def _check(self, q, k, v, teacher, key_cache) -> None:
        heads, dim = self.options.num_heads, self.options.head_dim
        if q.dim() != 4 or q.shape[1] != heads or q.shape[3] != dim or q.shape[2] == 0:
            raise ValueError(f"`q` has shape {tuple(q.shape)}, expected (batch, {heads}, tokens, {dim})")
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4 or x.shape[0] != q.shape[0] or x.shape[2:] != q.shape[2:] or heads % x.shape[1]:
                raise ValueError(
                    f"`{name}` has shape {tuple(x.shape)}, expected (batch, key heads, tokens, {dim}), key heads dividing "
                    f"{heads}, batch and tokens as in `q` {tuple(q.shape)}"
                )
        if teacher is not None and key_cache is not None:
            raise ValueError("`teacher` has targets of whole sequences: call without a cache (`use_cache=False`)")

    def _encode(self, q, k, v, layout, state) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kernel attention of the augmented values and the encoder: (B, H, T, 2D), and the kernel state of a causal layer."""
        dtype = accumulation_dtype(v.dtype)
        v, keep = layout.blank(v), layout.keep
        with as_written(q):  # the kernel is unstable in half precision
            if self.options.causal:
                positions = (
                    self._position_rows(layout).to(dtype)[:, None].expand_as(v)
                )  # (B, H, T, D), before the values
                query_features = relu_features(q, self.random_features)
                key_features = relu_features(k, self.random_features, keep if layout.is_padded else None)
                past = None if state is None else state.kernel
                estimate, kernel_state = causal_kernel_attention(query_features, key_features, (positions, v), past)
            else:
                estimate, kernel_state = self._estimate_bidirectional(q, k, v, layout), None
        return self.encoder(torch.cat([estimate.to(v.dtype), v], dim=-1)), kernel_state

    def _estimate_bidirectional(self, q, k, v, layout) -> torch.Tensor:
        """Kernel attention, (B, H, T, 2D). On a CPU head by head: the features of one, T x F, fit its cache."""
        dtype, padded = accumulation_dtype(v.dtype), layout.is_padded and not self.options.official
        positions = interpolated_identity(layout.lengths, v.shape[2], v.shape[3], dtype)
        positions = positions.masked_fill(~layout.keep[..., None], 0.0)[:, None]  # (B, 1, T, D)

        def estimate(q, k, v) -> torch.Tensor:
            query_features = softmax_query_features(q, self.random_features)
            key_features = softmax_key_features(k, self.random_features, layout.keep if padded else None)
            values = torch.cat([positions.expand_as(v), v.to(dtype)], dim=-1)
            return bidirectional_kernel_attention(query_features, key_features, values)

        if q.is_cuda or records_gradients() or is_traced():
            return estimate(q, k, v)
        heads = zip(*(x.split(1, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([estimate(*head) for head in heads], dim=1)

    def _position_rows(self, layout: KeyLayout) -> torch.Tensor:
        """Rows of the learned table for the ranks of this call, (B, T, D)."""
        ranks, limit = layout.ranks(), self.position_table.shape[0]
        if layout.key_length > limit and not is_traced():
            longest = int((layout.past + layout.lengths).max())
            if longest > limit:
                raise ValueError(
                    f"sequences of {longest} tokens exceed the position table of SEA, max_positions = {limit}: shorten "
                    "them, or convert with a larger max_positions and train the new rows"
                )
        return self.position_table[ranks.clamp_max(limit - 1)]

    def _cell_logits(self, hidden, layout, state) -> tuple[torch.Tensor, tuple]:
        """Row decoder and convolutions: (B, H, T, 2D) -> (B, H, T, M), and the rows that the next call needs."""
        rows = self.row_decoder(hidden)
        if self.options.causal:
            history = None if state is None else (state.conv1_rows, state.conv2_rows)
            return self.cnn(rows, layout.lengths, history)
        if self.options.official:  # the published network sees padded rows, and each row where it stands
            every = torch.full_like(layout.lengths, rows.shape[2])
            return layout.compact(self.cnn(layout.restore(rows), every, False)), ()
        return self.cnn(rows, layout.lengths, layout.is_padded), ()

    def _attend(self, q, keys, values, cells, visible, scale, slots, layout, output_attentions):
        """Sparse attention in the form that the options say; the mask and the probabilities by rank, if asked for."""
        limit, form = self.options.cell_limit, self.options.backend
        output_attentions = output_attentions or form == "dense"
        num_keys = layout.key_length if self.options.causal else q.shape[2]
        if form == "auto":
            few = (
                DENSE_KEYS_OF_ONE
                if q.shape[2] == 1
                else min(DENSE_KEYS + DENSE_KEYS_PER_K * self.options.k, DENSE_KEYS_OF_ONE)
            )
            form = "dense" if num_keys <= few and not is_fused(q) else "chunked"
        kept = probs = context = None
        if form == "chunked":
            context = chunked_sparse_attention(q, keys, values, cells, visible, scale, limit, slots)
        if form == "dense" or output_attentions:
            if slots is not None:
                keys, values = layout.compact_keys(keys), layout.compact_keys(values)
            keys, values = keys[:, :, :num_keys], values[:, :, :num_keys]
            kept = grow_cells(cells, visible, num_keys, limit)
            dense, probs = dense_sparse_attention(q, keys, values, kept, scale)
            context = dense if context is None else context
        return context, (kept if output_attentions else None), (probs if output_attentions else None)

    def _average(self, probs, v, layout, state) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The global average that is mixed in: running mean of the values, or their mean under the estimated weights."""
        dtype = accumulation_dtype(v.dtype)
        v = layout.blank(v).to(dtype)
        if self.options.causal:
            start = 0 if state is None else state.value_sum[:, :, None].to(dtype)
            sums = running_sum(v, 2) + start
            return sums / layout.visible(True)[:, None, :, None], sums[:, :, -1]
        rows = layout.blank(probs).sum(dim=2)  # (B, H, M)
        weights = rows / probs.shape[2]  # the clean form divides by the sum of the grown weights instead
        return grown_average(weights, v, layout.lengths, normalize=not self.options.official), None

    def _targets(self, teacher, context, layout: KeyLayout) -> TeacherTargets:
        """A teacher's targets, checked and compacted."""
        if not isinstance(teacher, TeacherTargets):
            scores, teacher_context = teacher
            teacher = TeacherTargets(context=teacher_context, scores=scores)
        teacher.check(context.shape[0], self.options.num_heads, context.shape[1], context.shape[2])
        return TeacherTargets(
            context=None if teacher.context is None else layout.compact(teacher.context, dim=1),
            scores=None if teacher.scores is None else layout.compact(layout.compact(teacher.scores), dim=3),
            q=None if teacher.q is None else layout.compact(teacher.q),
            k=None if teacher.k is None else layout.compact(teacher.k),
            scaling=teacher.scaling,
        )

    def _losses(self, q, k, scale, logits, visible, keep, context, teacher: TeacherTargets, loss_rows) -> dict:
        """Weighted terms of the layer's loss (specification, section 2.2)."""
        options = self.options
        terms = attention_losses(
            q, k, scale, logits, visible, keep, teacher, options.causal, options.official, loss_rows
        )
        if teacher.context is not None:
            error = (context - teacher.context).to(accumulation_dtype(context.dtype)).square()
            if options.official:
                terms["context_mse"] = error.mean()
            else:
                real = keep.sum().clamp_min(1) * context.shape[-1]
                terms["context_mse"] = error.masked_fill(~keep[..., None], 0.0).sum() / real
        return {name: LOSS_WEIGHTS[name] * term for name, term in terms.items()}
