"""What an estimated attention and a student's attention miss of a teacher's: losses and fidelity, by blocks of query rows.

The targets are T x T, so they are made and compared a block of rows at a time; while gradients are recorded a block is computed
again in the backward pass instead of being kept. Memory O(H T rows), time O(H T^2 D), or O(H T rows D) where rows are sampled.
Source: specification, section 2.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..kernels.tracing import records_gradients
from ..shared.precision import accumulation_dtype
from .cells import key_to_cell
from .sparse_attention import grow_cells, repeat_key_heads

BLOCK_ELEMENTS = 1 << 24  # elements of one (B, H, rows, T) block


@dataclass
class TeacherTargets:
    """What a teacher's attention layer did: its context and either its scores or the projections that give them.

    Attributes:
        context: (B, T, H D), heads concatenated, before the output projection; None leaves the context out of the loss.
        scores: (B, H, T, T) before the softmax; their masked entries do not matter.
        q, k: (B, H, T, D) and (B, G, T, D) after position encoding, G dividing H: `scores = scaling q k^T` by blocks.
        scaling: factor of the scores made from q and k.
    """

    context: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    scaling: float = 1.0

    def check(self, batch: int, heads: int, time: int, width: int) -> None:
        """Raise a ValueError where the targets do not have the student's shape."""
        if self.scores is None and (self.q is None or self.k is None):
            raise ValueError("the teacher's targets need either `scores` (B, H, T, T) or both `q` and `k` (B, H, T, D)")
        expected = {"scores": (batch, heads, time, time), "context": (batch, time, width), "q": (batch, heads, time)}
        if self.k is not None and self.q is not None and self.k.dim() == 4:
            groups = self.k.shape[1]
            expected["k"] = (batch, groups if groups and heads % groups == 0 else heads, time, self.q.shape[-1])
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape[: len(shape)]) != shape:
                raise ValueError(
                    f"the teacher's `{name}` has shape {tuple(value.shape)}, expected {shape} as the student's: distil from "
                    "a teacher with the same layers, heads and sequence length"
                )

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Scores of the rows `index` (R,): (B, H, R, T), no gradient."""
        if self.scores is not None:
            return self.scores.detach().index_select(2, index)
        keys = repeat_key_heads(self.k.detach(), self.q.shape[1])
        return self.q.detach().index_select(2, index) @ keys.transpose(-1, -2) * self.scaling


def attention_losses(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    cell_logits: torch.Tensor,
    visible: torch.Tensor,
    keep: torch.Tensor,
    teacher: TeacherTargets,
    causal: bool,
    official: bool,
    rows: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """KL and MSE of the estimate and of the student's dense attention against the teacher's: four scalars.

    Reduction: the KL is a mean over real rows and heads, the MSE over pairs of real rows and real keys. With `official` the KL is
    the published one (the bidirectional form is not divided by the heads, the causal one counts padded rows) and the MSE runs
    over all T x T entries.

    Args:
        q, k: (B, H, T, D). All tensors are compacted (padding right).
        scale: factor of the student's scores.
        cell_logits: (B, H, T, M), the estimate.
        visible: (B, T) keys of each row.
        keep: (B, T) real rows.
        rows: (R,), the rows that count; all if not given.

    Returns:
        `dict`: `estimate_kl`, `estimate_mse`, `student_kl`, `student_mse`.
    """
    time = q.shape[2]
    rows = torch.arange(time, device=q.device) if rows is None else rows
    totals = None
    for block in _blocks(rows, q.shape[0] * q.shape[1] * time):
        arguments = (q, k, scale, cell_logits, visible, keep, teacher, block, official)
        if records_gradients() and len(block) < time:
            sums = checkpoint(_block_sums, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = _block_sums(*arguments)
        totals = sums if totals is None else totals + sums
    batch, heads = q.shape[:2]
    real_rows = keep[:, rows].sum(dim=-1)  # (B,)
    kl_count = real_rows.sum() * heads
    mse_count = (real_rows * keep.sum(dim=-1)).sum() * heads
    if official:
        kl_count = real_rows.sum() if not causal else torch.full_like(kl_count, batch * heads * len(rows))
        mse_count = torch.full_like(mse_count, batch * heads * len(rows) * time)
    kl_count, mse_count = kl_count.clamp_min(1), mse_count.clamp_min(1)
    return {
        "estimate_kl": totals[0] / kl_count,
        "estimate_mse": totals[1] / mse_count,
        "student_kl": totals[2] / kl_count,
        "student_mse": totals[3] / mse_count,
    }


def _blocks(rows: torch.Tensor, elements_per_row: int) -> Iterator[torch.Tensor]:
    yield from rows.split(max(1, BLOCK_ELEMENTS // elements_per_row))


def _visible_keys(visible: torch.Tensor, rows: torch.Tensor, time: int) -> torch.Tensor:
    """(B, 1, R, T) bool: key of rank j is visible to row i."""
    return (torch.arange(time, device=rows.device) < visible[:, rows, None])[:, None]


def _grown_log_probs(cell_logits: torch.Tensor, visible: torch.Tensor, rows: torch.Tensor, time: int) -> torch.Tensor:
    """Cell logits of some rows repeated for the keys of each cell, log softmax over the visible keys: (B, H, R, T)."""
    dtype = accumulation_dtype(cell_logits.dtype)
    cell = key_to_cell(torch.arange(time, device=rows.device), visible[:, rows, None], cell_logits.shape[-1])
    grown = (
        cell_logits.index_select(2, rows).to(dtype).gather(-1, cell[:, None].expand(-1, cell_logits.shape[1], -1, -1))
    )
    return _masked_log_softmax(grown, _visible_keys(visible, rows, time))


def _masked_log_softmax(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min / 2), dim=-1)


def _block_sums(q, k, scale, cell_logits, visible, keep, teacher, rows, official) -> torch.Tensor:
    """Sums over one block of rows: KL and squared error of the estimate, then of the student's dense attention."""
    dtype = accumulation_dtype(q.dtype)
    time = q.shape[2]
    seen = _visible_keys(visible, rows, time)
    counted = seen & keep[:, None, rows, None]
    target = _masked_log_softmax(teacher.rows(rows).to(dtype), seen).exp()
    estimate = _grown_log_probs(cell_logits, visible, rows, time)
    scores = (q.index_select(2, rows).to(dtype) @ k.to(dtype).transpose(-1, -2)).to(
        dtype
    )  # mixed precision multiplies in half
    student = _masked_log_softmax(scores * scale, seen)
    compared = seen if official else counted
    sums = []
    for log_probs in (estimate, student):
        divergence = target * ((target + 1e-12).log() - log_probs)
        sums.append(divergence.masked_fill(~counted, 0.0).sum())
        sums.append((log_probs.exp() - target).square().masked_fill(~compared, 0.0).sum())
    return torch.stack(sums)


def attention_fidelity(
    cells: torch.Tensor,
    cell_logits: torch.Tensor,
    visible: torch.Tensor,
    keep: torch.Tensor,
    teacher: TeacherTargets,
    k: int,
    limit: int | None,
    rows: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """How well the estimate finds the teacher's attention, means over real rows and heads; arguments as for `attention_losses`.

    `top_k_recall`: share of the teacher's k strongest keys of a row that are kept. `attention_mass`: the teacher's probability on
    the kept keys. `keys_per_query`: kept keys. `estimate_kl` and `uniform_kl`: KL of the teacher's row to the estimate and, for
    comparison, to equal weights. No gradient flows.
    """
    time, cell_logits = keep.shape[1], cell_logits.detach()
    rows = torch.arange(time, device=cells.device) if rows is None else rows
    names = ("top_k_recall", "attention_mass", "keys_per_query", "estimate_kl", "uniform_kl")
    totals = torch.zeros(len(names), dtype=accumulation_dtype(cell_logits.dtype), device=cells.device)
    for block in _blocks(rows, cells.shape[0] * cells.shape[1] * time):
        seen = _visible_keys(visible, block, time)
        kept = grow_cells(cells[:, :, block], visible[:, block], time, limit)
        log_target = _masked_log_softmax(teacher.rows(block).to(totals.dtype), seen)
        target = log_target.exp().masked_fill(~seen, 0.0)
        strongest = log_target.topk(min(k, time), dim=-1).indices
        counted = seen.expand_as(kept).gather(-1, strongest)  # a row with fewer visible keys has fewer to find
        found = (kept.gather(-1, strongest) & counted).sum(dim=-1) / counted.sum(dim=-1).clamp_min(1)
        entropy = (target * (target + 1e-12).log()).sum(dim=-1)
        estimate = _grown_log_probs(cell_logits, visible, block, time)
        uniform = entropy + visible[:, None, block].clamp_min(1).log()
        values = (
            found,
            (target * kept).sum(dim=-1),
            kept.sum(dim=-1),
            entropy - (target * estimate).masked_fill(~seen, 0.0).sum(dim=-1),
            uniform,
        )
        real = keep[:, None, block]
        totals += torch.stack([value.to(totals.dtype).masked_fill(~real, 0.0).sum() for value in values])
    count = (keep[:, rows].sum() * cells.shape[1]).clamp_min(1)
    return dict(zip(names, totals / count))
