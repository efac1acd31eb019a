"""Where the real tokens of a padded batch are: SEA works on ranks among real tokens, whatever side the padding stands
on.

Before a layer works, the real tokens of each row move to the front (``compact``); afterwards they go back
(``restore``). So inside a layer padding is always on the right, the rank of a token is its index, and a causal row
never meets a padded key.

    attention_mask    0 1 0 1 1      order   1 3 4 0 2      lengths 3
    tokens            . a . b c      compact a b c . .
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenLayout:
    """Ranks and slots of one forward call, shared by all layers.

    Attributes:
        lengths: (B,) int64, real tokens among the T new ones.
        past: (B,) int64, real tokens seen before (0 without a cache).
        query_length: T.
        past_slots: slots of the key cache that were filled before this call, padded ones included.
        order: (B, T) int64 or None: index of the token with rank r, real tokens first. None: nothing is padded.
        inverse: (B, T) int64 or None: place of token t after ``compact``.
        key_slots: (B, past_slots + T) int64 or None: slot in the key cache of the real key with rank r, padded slots
            last.
    """

    lengths: torch.Tensor
    past: torch.Tensor
    query_length: int
    past_slots: int = 0
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    key_slots: torch.Tensor | None = None

    @classmethod
    def from_mask(
        cls,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        query_length: int,
        device: torch.device,
        past_slots: int = 0,
    ) -> "TokenLayout":
        """Read a mask (B, past_slots + T), 1 or True = keep; None means that nothing is padded.

        Raises:
            ValueError: the mask has another shape.
        """
        if attention_mask is None:
            lengths = torch.full((batch_size,), query_length, dtype=torch.long, device=device)
            past = torch.full((batch_size,), past_slots, dtype=torch.long, device=device)
            return cls(lengths, past, query_length, past_slots)
        expected = (batch_size, past_slots + query_length)
        if attention_mask.dim() != 2 or tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"attention_mask must have the shape (batch, past + new tokens) = {expected}, 1 = keep; "
                f"got {tuple(attention_mask.shape)}. Masks of other forms (4-D, additive) are not defined for SEA."
            )
        keep = attention_mask.to(device=device, dtype=torch.bool)
        new = keep[:, past_slots:]
        order = torch.argsort((~new).to(torch.uint8), dim=-1, stable=True)
        key_slots = order if past_slots == 0 else torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
        return cls(
            new.sum(dim=-1),
            keep[:, :past_slots].sum(dim=-1),
            query_length,
            past_slots,
            order,
            order.argsort(dim=-1),
            key_slots,
        )

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
        if self.order is None:
            return x
        return x.masked_fill(~self.keep.reshape(-1, 1, self.query_length, *[1] * (x.dim() - 3)), 0.0)

    def compact(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Move real tokens to the front of axis ``dim``; axis 0 is the batch."""
        return x if self.order is None else _take(x, self.order, dim)

    def restore(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Undo ``compact``."""
        return x if self.inverse is None else _take(x, self.inverse, dim)

    def compact_keys(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """Real keys of a key cache first, in order of rank; a longer (static) cache is cut to the slots in use."""
        x = x.narrow(dim, 0, self.key_length)
        return x if self.key_slots is None else _take(x, self.key_slots, dim)

    def restore_keys(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Columns in order of rank back to the slots of the key cache."""
        return x if self.key_slots is None else _take(x, self.key_slots.argsort(dim=-1), dim)


def _take(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Gather along ``dim`` with one index row per sample, (B, X)."""
    dim = dim % x.dim()
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(target))
