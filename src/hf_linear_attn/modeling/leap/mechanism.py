"""The LEAP mechanism from projections to output (LEAP specification, section 2)."""

import torch

from ..kernels.fast_paths import fast_paths
from ..shared.token_order import TokenLayout
from .fast_paths import MECHANISM
from .formula import dropped, gated_means


@fast_paths(*MECHANISM)
def leap_mechanism(
    projected: torch.Tensor,
    window: int | None = None,
    *,
    rotated: tuple[torch.Tensor, torch.Tensor] | None = None,
    exponential: bool = False,
    dropout: float = 0.0,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, ...] | None = None,
    return_state: bool = False,
    layout: TokenLayout | None = None,
    decay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Focus-weighted means of keys and values, gated by the alignment of each query. O(T) time and memory.

    Args:
        projected (`torch.Tensor` of shape `(B, T, 4, H, D)`): queries, focus, keys and values.
        window (`int`, *optional*): tokens averaged, the token itself included; `None` for all so far.
        rotated (`tuple` of two `torch.Tensor` of shape `(B, T, H, D)`, *optional*): queries and keys after rotation, which
            take the place of the projected ones everywhere but in the focus logits.
        exponential (`bool`): weights exp(l) instead of elu(l) + 1.
        dropout (`float`): probability of dropping entries of queries, focus, values and the focus logits.
        mask, segment_ids, initial_state, return_state, layout, decay: as in `windowed_mean`, whose state this is, too.

    Returns:
        `tuple`: the output (B, T, H, D) in the inputs' dtype, and the state or None.
    """
    projected, rotated, kept = dropped(projected, rotated, dropout)
    return gated_means(
        projected, rotated, window, kept, exponential, mask, segment_ids, initial_state, return_state, layout, decay
    )
