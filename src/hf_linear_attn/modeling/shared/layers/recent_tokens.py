"""The last real tokens of each row's open document: the state of layers that look back a fixed number of tokens."""

import torch

from ..token_order import TokenLayout, take_tokens


def behind_the_past(x: torch.Tensor, past: torch.Tensor | None, kept: int) -> torch.Tensor:
    """Tokens (B, T, ...) with the `kept` ones before them in front, zeros where there are none: (B, kept + T, ...)."""
    if past is None:
        past = x.new_zeros(x.shape[0], kept, *x.shape[2:])
    return torch.cat([past.to(x.dtype), x], dim=1)


def documents_behind_the_past(layout: TokenLayout, kept: int) -> torch.Tensor | None:
    """Document numbers (B, kept + T) of `behind_the_past`: what came before this call belongs to document 0."""
    if layout.segment_ids is None:
        return None
    return torch.nn.functional.pad(layout.segment_ids, [kept, 0])


def last_tokens(x: torch.Tensor, kept: int, layout: TokenLayout, documents: torch.Tensor | None) -> torch.Tensor:
    """The last `kept` real tokens (B, kept, ...) of `behind_the_past`, oldest first; 0 for those of a document that has ended."""
    if documents is not None:
        is_open = documents == documents[:, -1:]
        x = x * is_open.reshape(*is_open.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    if layout.lengths is None:
        return x[:, x.shape[1] - kept :]
    return take_tokens(x, layout.lengths[:, None] + torch.arange(kept, device=x.device))
