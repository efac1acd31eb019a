"""The LEAP mechanism as a formula in plain PyTorch (LEAP specification, section 2): the definition, in any dtype."""

import torch
import torch.nn.functional as F

from ..shared.precision import accumulation_dtype
from ..shared.token_order import TokenLayout
from ..shared.windowed_mean import windowed_mean

Pair = tuple[torch.Tensor, torch.Tensor]


def focus_weights(
    focus: torch.Tensor, key: torch.Tensor, exponential: bool = False, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Focus weights elu(l) + 1 (B, T, H) of the logits l = <f, k> / sqrt(D); the logits themselves if `exponential`.

    `kept` (B, T, H) are factors of the logits: dropout.
    """
    dtype = accumulation_dtype(focus.dtype)
    logits = (focus.to(dtype) * key.to(dtype)).sum(-1) * focus.shape[-1] ** -0.5
    logits = logits if kept is None else logits * kept
    return logits if exponential else F.elu(logits) + 1


def averaged(projected: torch.Tensor, rotated: Pair | None) -> torch.Tensor:
    """Keys and values as they are averaged, (B, T, 2, H, D); a view unless keys are rotated."""
    return projected[:, :, 2:] if rotated is None else torch.stack([rotated[1], projected[:, :, 3]], dim=2)


def dropped(projected: torch.Tensor, rotated: Pair | None, dropout: float):
    """Projections and rotated pair after dropout, and the factors (B, T, H) of the focus logits (None without dropout).

    Queries, focus, values and logits lose entries; keys do not.
    """
    if not dropout:
        return projected, rotated, None
    kept = F.dropout(torch.ones_like(projected[:, :, 0, :, 0]), dropout)
    query, focus, key, value = projected.unbind(2)
    query = query if rotated is None else rotated[0]
    query, focus, value = (F.dropout(x, dropout) for x in (query, focus, value))
    rotated = None if rotated is None else (query, rotated[1])
    return torch.stack([query, focus, key, value], dim=2), rotated, kept


def gated_means(
    projected: torch.Tensor,
    rotated: Pair | None,
    window: int | None,
    kept: torch.Tensor | None = None,
    exponential: bool = False,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, ...] | None = None,
    return_state: bool = False,
    layout: TokenLayout | None = None,
    decay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """The mechanism from (B, T, 4, H, D) to (B, T, H, D), after dropout; arguments and returns as for `leap_mechanism`."""
    query = projected[:, :, 0] if rotated is None else rotated[0]
    weights = focus_weights(projected[:, :, 1], projected[:, :, 2], exponential, kept)
    means, state = windowed_mean(
        averaged(projected, rotated).to(weights.dtype),
        weights,
        window,
        log_weights=exponential,
        mask=mask,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
        layout=layout,
        decay=decay,
    )
    focused_key, focused_value = means.unbind(2)  # (B, T, H, D) each
    alignment = torch.sigmoid((query.to(means.dtype) * focused_key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5)
    return (alignment * focused_value).to(query.dtype), state
