"""The LEAP mechanism from projections to output (LEAP specification, section 2), and the choice of its spelling."""

import torch

from .backend import runs_triton
from .leap_mechanism_torch import averaged, focus_weights, leap_torch
from .windowed_mean import take_rows, windowed_mean

# The kernels look back one chunk of 64 tokens, and hold a whole head.
LARGEST_KERNEL_WINDOW = 65
LARGEST_KERNEL_HEAD = 128


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
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Focus-weighted means of keys and values, gated by the alignment of each query. O(T) time and memory.

    Args:
        projected (`torch.Tensor` of shape `(B, T, 4, H, E)`): queries, focus, keys and values.
        window (`int`, *optional*): tokens averaged, the token itself included; `None` for all so far.
        rotated (`tuple` of two `torch.Tensor` of shape `(B, T, H, E)`, *optional*): queries and keys after rotation, which
            take the place of the projected ones everywhere but in the focus logits.
        exponential (`bool`): weights exp(l) instead of elu(l) + 1.
        dropout (`float`): probability of dropping entries of queries, focus, values and the focus logits.
        mask, segment_ids, initial_state, return_state: as in `windowed_mean`, whose state this is, too.

    Returns:
        `tuple`: the output (B, T, H, E) in the inputs' dtype, and the state or None.
    """
    obstacle = kernel_obstacle(projected, window, exponential, mask, initial_state, return_state)
    arguments = {"mask": mask, "segment_ids": segment_ids, "initial_state": initial_state, "return_state": return_state}
    if projected.shape[1] > 1 and runs_triton(projected, obstacle):
        return _with_kernel(projected, rotated, window, dropout, **arguments)
    return leap_torch(projected, rotated, window, dropout, exponential, **arguments)


def _with_kernel(projected, rotated, window, dropout, mask, segment_ids, initial_state, return_state):
    from .leap_mechanism_triton import leap_kernel

    if window is None:
        out, state = leap_kernel(projected, rotated, None, dropout, mask, segment_ids, initial_state)
        return out, state if return_state else None
    documents = segment_ids
    rank = counts = real = None
    if mask is not None:
        # A window counts real tokens: they move together first, and their outputs move back afterwards.
        mask = mask.bool()
        counts, rank = mask.sum(1), mask.long().cumsum(1) - 1
        order = torch.argsort(~mask, dim=1, stable=True)
        projected, documents = take_rows(projected, order), None if documents is None else take_rows(documents, order)
        rotated = None if rotated is None else tuple(take_rows(x, order) for x in rotated)
        real = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    out, _ = leap_kernel(projected, rotated, window, dropout, real, documents, None)
    if initial_state is not None and window > 1:
        # Only the first W - 1 tokens still see what came before this call.
        near = slice(0, window - 1)
        start, _ = leap_torch(
            projected[:, near],
            None if rotated is None else tuple(x[:, near] for x in rotated),
            window,
            0.0,
            segment_ids=None if documents is None else documents[:, near],
            initial_state=initial_state,
        )
        out = torch.cat([start, out[:, window - 1 :]], dim=1)
    state = None
    if return_state:
        last_document = None if segment_ids is None else segment_ids[:, -1:]
        state = _window_state(projected, rotated, window, counts, documents, last_document, initial_state)
    if rank is not None:
        out = take_rows(out, rank.clamp(min=0)).masked_fill(~mask[..., None, None], 0.0)
    return out, state


def _window_state(projected, rotated, window, counts, documents, last_document, initial_state):
    """The last W - 1 real tokens of the open document, from the row and, where it is shorter, the state before it."""
    batch, length, kept = *projected.shape[:2], window - 1
    end = torch.full((batch,), length, device=projected.device) if counts is None else counts
    place = end[:, None] - kept + torch.arange(kept, device=projected.device)
    here, place = place >= 0, place.clamp(min=0)
    if documents is not None:
        here = here & (take_rows(documents, place) == last_document)
        if initial_state is not None:
            still_open = (last_document == 0)[..., None]
            initial_state = initial_state[0], initial_state[1] * still_open
    projected = take_rows(projected, place)
    rotated = None if rotated is None else tuple(take_rows(x, place) for x in rotated)
    weights = focus_weights(projected[:, :, 1], projected[:, :, 2])
    key_value = averaged(projected, rotated).to(weights.dtype)
    return windowed_mean(key_value, weights, window, mask=here, initial_state=initial_state, return_state=True)[1]


def kernel_obstacle(projected, window, exponential, mask, initial_state, return_state) -> str | None:
    """Why the Triton kernel cannot do this call, or None."""
    if exponential:
        return "it has no exp focus"
    if window is not None and window > LARGEST_KERNEL_WINDOW:
        return f"its windows end at {LARGEST_KERNEL_WINDOW} tokens (or are global), this one has {window}"
    if window is not None and mask is not None and initial_state is not None:
        return "it does not take padding and an earlier state together in a windowed layer"
    if projected.shape[-1] > LARGEST_KERNEL_HEAD:
        return f"its heads end at {LARGEST_KERNEL_HEAD} features, these have {projected.shape[-1]}"
    if projected.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {projected.dtype}"
    if torch.is_grad_enabled() and (return_state or initial_state is not None):
        return "it gives no gradient to states"
    return None
