"""Cells and keys: the integer maps of SEA, the number of cells to keep, and their selection.

A row with ``L`` visible keys is divided into ``M`` cells. Key of rank ``r`` (0-based, among the visible keys) lies in
cell ``m(r)``; cell ``m`` covers the ranks ``b(m) .. b(m + 1) - 1``. Both maps are exact in integers and invert each
other:

    L = 5, M = 4:  m(0..4) = 0 1 1 2 3      b = 0 1 3 4 5
    L = 3, M = 4:  m(0..2) = 0 1 3          b = 0 1 2 2 3     (cell 2 is empty)

Sources: specification, sections 1.6 (selection), 1.7 (maps) and 3.2 (at most so many keys of a cell).
"""

import torch

from .backend import runs_triton

TOPK_GROUPS = ("causal_batch", "query", "head", "batch")
CAUSAL_TOPK_GROUPS = ("causal_batch",)
SELECTION_ROWS = 4096  # rows that are sorted together: bounds the memory of the sort's 64-bit indices
LARGEST_KERNEL_GROUP = 8192  # cells that compete with each other in the Triton kernel


def key_to_cell(rank: torch.Tensor, length: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Cell ``m(r) = ((2 r + 1) M - 1) div (2 L)`` of the key of rank ``rank`` among ``length`` keys (int64, broadcast).

    The result is clamped to 0 .. M - 1, so that ranks beyond the length give a legal (and meaningless) cell.
    """
    length = length.clamp_min(1)
    cell = ((2 * rank + 1) * num_cells - 1).div(2 * length, rounding_mode="floor")
    return cell.clamp(0, num_cells - 1)


def cell_start(cell: torch.Tensor, length: torch.Tensor, num_cells: int) -> torch.Tensor:
    """First rank ``b(m) = (2 m L + M) div (2 M)`` of cell ``cell``; ``b(M) = L`` (int64, broadcast)."""
    return (2 * cell * length + num_cells).div(2 * num_cells, rounding_mode="floor")


def cell_widths(length: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Number of keys in each cell, (...,) -> (..., M); sums to ``length`` over the cells."""
    cells = torch.arange(num_cells + 1, device=length.device)
    return cell_start(cells, length[..., None], num_cells).diff(dim=-1)


def within_cell_limit(
    rank: torch.Tensor, cell: torch.Tensor, length: torch.Tensor, num_cells: int, limit: int
) -> torch.Tensor:
    """True where a key is one of the at most ``limit`` keys that its cell hands out, evenly spaced and counted from
    the newest.

    Key ``i`` of a cell of width ``w`` that hands out ``c = min(w, limit)`` keys is ``b(m + 1) - 1 - floor(i w / c)``.
    """
    end = cell_start(cell + 1, length, num_cells)
    width = (end - cell_start(cell, length, num_cells)).clamp_min(1)
    count = width.clamp_max(limit)
    offset = end - 1 - rank
    index = (offset * count + width - 1).div(width, rounding_mode="floor")  # the first i with floor(i w / c) >= offset
    return (index * width).div(count, rounding_mode="floor") == offset


def keys_per_cell(length: torch.Tensor, num_cells: int, limit: int | None) -> torch.Tensor:
    """Number of keys that each cell hands out, (...,) -> (..., M)."""
    widths = cell_widths(length, num_cells)
    return widths if limit is None else widths.clamp_max(limit)


def rounded_ratio(numerator: int, denominator: torch.Tensor) -> torch.Tensor:
    """``numerator / denominator`` rounded half to even, exactly, in int64."""
    denominator = denominator.clamp_min(1)
    quotient = torch.div(numerator, denominator, rounding_mode="floor")
    twice_rest = 2 * (numerator - quotient * denominator)
    up = (twice_rest > denominator) | ((twice_rest == denominator) & (quotient % 2 == 1))
    return quotient + up.long()


def cell_budget(length: torch.Tensor, k: int, num_heads: int, num_cells: int, group: str) -> torch.Tensor:
    """Number of cells to keep per group, before the upper clamp at the group's size; at least 1 (specification,
    section 1.6).

    ``length`` holds visible keys: one per row (B, T) for the groups of rows, any shape for ``head`` and ``batch``,
    whose budget does not depend on it. ``k`` is a mean over the heads of a row (``causal_batch``) or over all rows
    and heads (``batch``).
    """
    if group == "batch":
        return torch.full_like(length, num_heads * k * num_cells)
    if group == "head":
        return torch.full_like(length, k * num_cells)
    if group == "query":
        return rounded_ratio(k * num_cells, length).clamp_min(1)
    if group == "causal_batch":
        return rounded_ratio(num_heads * k * num_cells, length).clamp_min(1)
    raise ValueError(f"topk_group must be one of {TOPK_GROUPS}, got {group!r}")


@torch.no_grad()
def select_cells(
    probs: torch.Tensor,
    length: torch.Tensor,
    k: int,
    group: str,
    keep: torch.Tensor | None = None,
    official: bool = False,
) -> torch.Tensor:
    """Keep the largest cells of each group: probabilities (B, H, T, M) -> bool (B, H, T, M). No gradient flows.

    ``length`` (B, T) is the number of visible keys of each row, ``keep`` (B, T) is False at padded rows, which select
    nothing and never compete with real ones. Ties go to the smaller (head, row, cell) index, so that every device
    selects the same cells. ``official`` is the published choice: ties are left to ``torch.sort``, and in the groups
    ``batch`` and ``head`` a padded row competes with probability 0, so that it selects cells where the budget exceeds
    those of the real rows. O(H T M log) time; linear memory in T.
    """
    batch, heads, time, cells = probs.shape
    if runs_triton(probs, _kernel_obstacle(probs, group, official)):
        from .sparse_attention_triton import select_largest

        budget = cell_budget(length, k, heads, cells, group)  # (B, T)
        if group == "query":  # each head by itself
            probs = probs.flatten(0, 1)[:, None]
            budget, keep = (None if x is None else x.repeat_interleave(heads, dim=0) for x in (budget, keep))
        return select_largest(probs, budget, keep).view(batch, heads, time, cells)
    if keep is not None:
        probs = probs.masked_fill(~keep[:, None, :, None], 0.0 if official else -1.0)
    if group in ("batch", "head"):
        flat = probs.reshape(batch, 1, -1) if group == "batch" else probs.reshape(batch, heads, -1)
        budget = cell_budget(length[:, :1, None], k, heads, cells, group).expand(*flat.shape[:2], 1)
        largest = min(flat.shape[-1], (heads if group == "batch" else 1) * k * cells)
        selected = _largest_of_group(flat, budget, largest, official).view(batch, heads, time, cells)
    elif group == "query":
        budget = cell_budget(length, k, heads, cells, group)[:, None, :, None]  # (B, 1, T, 1)
        selected = _largest_of_group(probs, budget.expand(batch, heads, time, 1), cells, official)
    else:
        budget = cell_budget(length, k, heads, cells, group)  # (B, T)
        blocks = []
        for start in range(0, time, SELECTION_ROWS):
            rows = slice(start, start + SELECTION_ROWS)
            flat = probs[:, :, rows].transpose(1, 2).flatten(2)  # (B, R, H M)
            kept = _largest_of_group(flat, budget[:, rows, None], heads * cells, official)
            blocks.append(kept.unflatten(-1, (heads, cells)).transpose(1, 2))
        selected = torch.cat(blocks, dim=2)
    if keep is None or (official and group in ("batch", "head")):
        return selected
    return selected & keep[:, None, :, None]


def _kernel_obstacle(probs: torch.Tensor, group: str, published_ties: bool) -> str | None:
    """Why the Triton kernel cannot make this choice, or None."""
    if group not in ("causal_batch", "query"):
        return f"it chooses among the cells of one query, not of the group {group!r}"
    if published_ties:
        return "it leaves no ties to torch.sort"
    if probs.dtype != torch.float32:
        return f"it takes float32 probabilities, not {probs.dtype}"
    size = probs.shape[-1] * (probs.shape[1] if group == "causal_batch" else 1)
    return (
        None if size <= LARGEST_KERNEL_GROUP else f"its groups end at {LARGEST_KERNEL_GROUP} cells, these have {size}"
    )


def _largest_of_group(values: torch.Tensor, budget: torch.Tensor, largest: int, published_ties: bool) -> torch.Tensor:
    """True at the ``min(budget, size)`` largest entries of the last axis; ``largest`` bounds the budget and is known
    to the caller.

    The value of the last kept entry is the threshold; entries equal to it are taken in the order of their index.
    """
    budget = budget.clamp(1, values.shape[-1])
    if published_ties:
        order = values.sort(dim=-1, descending=True).indices
        rank = torch.arange(values.shape[-1], device=values.device)
        return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, rank < budget)
    if largest < values.shape[-1]:
        ordered = values.topk(largest, dim=-1).values
    else:
        ordered = values.sort(dim=-1, descending=True).values
    threshold = ordered.gather(-1, budget - 1)
    above = values > threshold
    tied = values == threshold
    room = budget - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))
