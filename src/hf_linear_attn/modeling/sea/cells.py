"""Ranks, slots, cells and keys: the integer maps of SEA, the number of cells to keep, and their selection.

A row with `L` visible keys is divided into `M` cells. Key of rank `r` (0-based, among the visible keys) lies in cell
`m(r)`; cell `m` covers the ranks `b(m) .. b(m + 1) - 1`. Both maps are exact in integers and invert each other:

    L = 5, M = 4:  m(0..4) = 0 1 1 2 3      b = 0 1 3 4 5
    L = 3, M = 4:  m(0..2) = 0 1 3          b = 0 1 2 2 3     (cell 2 is empty)

Sources: specification, sections 1.6 (selection), 1.7 (maps) and 3.2 (at most so many keys of a cell).
"""

from dataclasses import dataclass

import torch

from ..kernels.fast_paths import fast_paths
from ..kernels.tracing import can_read_values
from ..shared.token_order import TokenLayout, take_tokens, token_layout
from .fast_paths import SELECTION

TOPK_GROUPS = ("causal_batch", "query", "head", "batch")
CAUSAL_TOPK_GROUPS = ("causal_batch",)
SELECTION_ROWS = 4096  # rows that are sorted together: bounds the memory of the sort's 64-bit indices


@dataclass(frozen=True)
class KeyLayout:
    """Ranks of the tokens of one call and slots of the keys that they see, shared by all layers.

    Before a layer works, the real tokens of each row move to the front (`compact`); afterwards they go back (`restore`).
    So inside a layer padding is always on the right, the rank of a token is its index, and a causal row never meets a
    padded key.

    Attributes:
        tokens: the order of the T new tokens.
        keys: the order of all slots of the key cache in use, the new ones included; without a cache it is `tokens`.
        lengths: (B,) int64, real tokens among the new ones.
        past: (B,) int64, real tokens seen before (0 without a cache).
        query_length: T.
        past_slots: slots of the key cache that were filled before this call, padded ones included.
    """

    tokens: TokenLayout
    keys: TokenLayout
    lengths: torch.Tensor
    past: torch.Tensor
    query_length: int
    past_slots: int = 0

    @classmethod
    def from_mask(
        cls,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        query_length: int,
        device: torch.device,
        past_slots: int = 0,
    ) -> "KeyLayout":
        """Read a mask (B, past_slots + T), 1 or True = keep; None means that nothing is padded.

        Raises:
            ValueError: the mask has another shape.
        """
        if attention_mask is None:
            layout = token_layout(batch_size, query_length, device)
            lengths, past = (torch.full((batch_size,), n, device=device) for n in (query_length, past_slots))
            return cls(layout, layout, lengths, past, query_length, past_slots)
        expected = (batch_size, past_slots + query_length)
        if attention_mask.dim() != 2 or tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, expected (batch, past + new tokens) = {expected}, "
                "1 = keep: masks of other forms (4-D, additive) are not defined for SEA"
            )
        keep = attention_mask.to(device=device, dtype=torch.bool)
        tokens = keys = token_layout(batch_size, query_length, device, keep[:, past_slots:])
        if past_slots:
            keys = token_layout(batch_size, past_slots + query_length, device, keep)
        return cls(tokens, keys, tokens.lengths, keys.lengths - tokens.lengths, query_length, past_slots)

    @property
    def is_padded(self) -> bool:
        """Whether there may be padding among the new tokens."""
        return self.tokens.mask is not None

    @property
    def key_length(self) -> int:
        """Slots that this call can see: past and new tokens, padded ones included."""
        return self.past_slots + self.query_length

    @property
    def keep(self) -> torch.Tensor:
        """(B, T) bool, True where a compacted row holds a real token."""
        return torch.arange(self.query_length, device=self.lengths.device) < self.lengths[:, None]

    def ranks(self) -> torch.Tensor:
        """(B, T) int64: rank of each compacted row among all real tokens, the past included."""
        return self.past[:, None] + torch.arange(self.query_length, device=self.lengths.device)

    def visible(self, causal: bool) -> torch.Tensor:
        """(B, T) int64: number of keys that each compacted row sees."""
        if causal:
            return self.ranks() + 1
        return self.lengths[:, None].expand(-1, self.query_length)

    def blank(self, x: torch.Tensor) -> torch.Tensor:
        """Compacted (B, H, T, ...) with padded rows 0; `x` itself where nothing is padded."""
        if not self.is_padded:
            return x
        return x.masked_fill(~self.keep.reshape(-1, 1, self.query_length, *[1] * (x.dim() - 3)), 0.0)

    def compact(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Move real tokens to the front of axis `dim`; axis 0 is the batch."""
        return x if self.tokens.order is None else take_tokens(x, self.tokens.order, dim)

    def restore(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Undo `compact`."""
        return x if self.tokens.slots is None else take_tokens(x, self.tokens.slots, dim)

    def compact_keys(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Real keys of a key cache first, in order of rank; a longer (static) cache is cut to the slots in use."""
        x = x.narrow(dim, 0, self.key_length)
        return x if self.keys.order is None else take_tokens(x, self.keys.order, dim)

    def restore_keys(self, x: torch.Tensor, dim: int = 3) -> torch.Tensor:
        """Columns in order of rank back to the slots of the key cache."""
        return x if self.keys.slots is None else take_tokens(x, self.keys.slots, dim)


def key_to_cell(rank: torch.Tensor, length: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Cell `m(r) = ((2 r + 1) M - 1) div (2 L)` of the key of rank `rank` among `length` keys (int64, broadcast).

    The result is clamped to 0 .. M - 1, so that ranks beyond the length give a legal (and meaningless) cell.
    """
    length = length.clamp_min(1)
    cell = ((2 * rank + 1) * num_cells - 1).div(2 * length, rounding_mode="floor")
    return cell.clamp(0, num_cells - 1)


def cell_start(cell: torch.Tensor, length: torch.Tensor, num_cells: int) -> torch.Tensor:
    """First rank `b(m) = (2 m L + M) div (2 M)` of cell `cell`; `b(M) = L` (int64, broadcast)."""
    return (2 * cell * length + num_cells).div(2 * num_cells, rounding_mode="floor")


def cell_widths(length: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Number of keys in each cell, (...,) -> (..., M); sums to `length` over the cells."""
    cells = torch.arange(num_cells + 1, device=length.device)
    return cell_start(cells, length[..., None], num_cells).diff(dim=-1)


def within_cell_limit(
    rank: torch.Tensor, cell: torch.Tensor, length: torch.Tensor, num_cells: int, limit: int
) -> torch.Tensor:
    """True where a key is one of the at most `limit` keys that its cell hands out, evenly spaced and counted from the newest.

    Key `i` of a cell of width `w` that hands out `c = min(w, limit)` keys is `b(m + 1) - 1 - floor(i w / c)`.
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
    """`numerator / denominator` rounded half to even, exactly, in int64."""
    denominator = denominator.clamp_min(1)
    quotient = torch.div(numerator, denominator, rounding_mode="floor")
    twice_rest = 2 * (numerator - quotient * denominator)
    up = (twice_rest > denominator) | ((twice_rest == denominator) & (quotient % 2 == 1))
    return quotient + up.long()


def cell_budget(length: torch.Tensor, k: int, num_heads: int, num_cells: int, group: str) -> torch.Tensor:
    """Number of cells to keep per group, before the upper clamp at the group's size; at least 1 (specification, section 1.6).

    Args:
        length: visible keys: one number a row, (B, T), for the groups of rows; any shape for `"head"` and `"batch"`, whose
            budget does not depend on it.
        k: mean number of keys over the heads of a row (`"causal_batch"`) or over all rows and heads (`"batch"`).

    Raises:
        ValueError: an unknown group.
    """
    if group == "batch":
        return torch.full_like(length, num_heads * k * num_cells)
    if group == "head":
        return torch.full_like(length, k * num_cells)
    if group == "query":
        return rounded_ratio(k * num_cells, length).clamp_min(1)
    if group == "causal_batch":
        return rounded_ratio(num_heads * k * num_cells, length).clamp_min(1)
    raise ValueError(f"`topk_group` is {group!r}, expected one of {', '.join(map(repr, TOPK_GROUPS))}")


@fast_paths(*SELECTION)
def select_cells(
    probs: torch.Tensor,
    length: torch.Tensor,
    k: int,
    group: str,
    keep: torch.Tensor | None = None,
    official: bool = False,
) -> torch.Tensor:
    """Keep the largest cells of each group: probabilities (B, H, T, M) -> bool (B, H, T, M). No gradient flows.

    Ties go to the smaller (head, row, cell) index, so that every device selects the same cells. O(H T M log) time; linear
    memory in T.

    Args:
        length: (B, T), number of visible keys of each row.
        keep: (B, T), False at padded rows, which select nothing and never compete with real ones.
        official: the published choice: ties are left to `torch.sort`, and in the groups `"batch"` and `"head"` a padded row
            competes with probability 0, so that it selects cells where the budget exceeds those of the real rows.
    """
    probs = probs.detach()
    if keep is not None:
        probs = probs.masked_fill(~keep[:, None, :, None], 0.0 if official else -1.0)
    if group in ("batch", "head"):
        selected = _select_over_rows(probs, length, k, group, official)
    else:
        selected = _select_in_rows(probs, length, k, group, official)
    if keep is None or (official and group in ("batch", "head")):
        return selected
    return selected & keep[:, None, :, None]


def _select_over_rows(probs, length, k: int, group: str, official: bool) -> torch.Tensor:
    """Cells of all rows compete: those of a head, or of all heads."""
    heads, cells = probs.shape[1], probs.shape[3]
    flat = probs.flatten(1)[:, None] if group == "batch" else probs.flatten(2)
    budget = cell_budget(length[:, :1, None], k, heads, cells, group).expand(*flat.shape[:2], 1)
    largest = min(flat.shape[-1], (heads if group == "batch" else 1) * k * cells)
    return _largest_of_group(flat, budget, largest, official).view(probs.shape)


def _select_in_rows(probs, length, k: int, group: str, official: bool) -> torch.Tensor:
    """Cells of one row compete: those of a head, or of all heads, a block of rows at a time."""
    _, heads, time, cells = probs.shape
    budget = cell_budget(length, k, heads, cells, group)  # (B, T)
    if group == "query":
        budget = budget[:, None, :, None].expand(-1, heads, -1, 1)
        return _largest_of_group(probs, budget, cells, official)
    blocks = []
    for start in range(0, time, SELECTION_ROWS):
        rows = slice(start, start + SELECTION_ROWS)
        flat = probs[:, :, rows].transpose(1, 2).flatten(2)  # (B, R, H M)
        kept = _largest_of_group(flat, budget[:, rows, None], heads * cells, official)
        blocks.append(kept.unflatten(-1, (heads, cells)).transpose(1, 2))
    return torch.cat(blocks, dim=2)


def _largest_of_group(values: torch.Tensor, budget: torch.Tensor, largest: int, published_ties: bool) -> torch.Tensor:
    """True at the `min(budget, size)` largest entries of the last axis; `largest` bounds the budget and is known to the caller.

    The value of the last kept entry is the threshold; entries equal to it are taken in the order of their index.
    """
    budget = budget.clamp(1, values.shape[-1])
    if not values.is_cuda and can_read_values(budget):  # without waiting for a device
        largest = min(largest, int(budget.max()))
    if published_ties:
        order = values.sort(dim=-1, descending=True).indices
        rank = torch.arange(values.shape[-1], device=values.device)
        return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, rank < budget)
    if 2 * largest < values.shape[-1]:  # else a sort is faster
        ordered = values.topk(largest, dim=-1).values
    else:
        ordered = values.sort(dim=-1, descending=True).values
    threshold = ordered.gather(-1, budget - 1)
    if not values.is_cuda and can_read_values(values):
        reached = values >= threshold
        if bool((reached.sum(dim=-1, keepdim=True) == budget).all()):
            return reached
    above = values > threshold
    tied = values == threshold
    room = budget - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))
