"""When the mechanism runs by its kernels, and what stands around them: padding and states of windowed layers."""

import torch

from ...kernels.conditions import at_most, kernel_dtype
from ...kernels.tracing import records_gradients
from ...shared.token_order import take_tokens, token_layout
from ...shared.windowed_mean import windowed_mean
from ..formula import averaged, focus_weights, gated_means
from .mechanism import leap_kernel

# The kernels look back one chunk of 64 tokens, and hold a whole head.
LARGEST_KERNEL_WINDOW = 65
LARGEST_KERNEL_HEAD = 128


def is_long(projected, *args, **kwargs) -> bool:
    """More than one token a row."""
    return projected.shape[1] > 1


def kernel_covers(
    projected, window=None, *, rotated=None, exponential=False, dropout=0.0, mask=None, segment_ids=None, initial_state=None,
    return_state=False, layout=None, decay=None,
) -> str | None:  # fmt: skip
    """Why the kernels cannot do this call, or None; arguments as for `leap_mechanism`."""
    if exponential:
        return "it has no exp focus"
    if decay is not None:
        return "it has no weights that fade"
    if window is not None and mask is not None and initial_state is not None:
        return "it does not take padding and an earlier state together in a windowed layer"
    if records_gradients() and (return_state or initial_state is not None):
        return "it gives no gradient to states"
    reason = None if window is None else at_most("window", window, LARGEST_KERNEL_WINDOW)
    return reason or at_most("head size", projected.shape[-1], LARGEST_KERNEL_HEAD) or kernel_dtype(projected)


def kernel_mechanism(
    projected, window=None, *, rotated=None, exponential=False, dropout=0.0, mask=None, segment_ids=None, initial_state=None,
    return_state=False, layout=None, decay=None,
):  # fmt: skip
    """`leap_mechanism` by the kernels."""
    if window is None:
        out, state = leap_kernel(projected, rotated, None, dropout, mask, segment_ids, initial_state)
        return out, state if return_state else None
    # First phase: a window counts real tokens, which move together.
    documents, counts, real = segment_ids, None, mask
    if mask is not None:
        mask = mask.bool()
        layout = token_layout(*mask.shape, mask.device, mask, segment_ids) if layout is None else layout
        documents, counts = layout.segment_ids, layout.lengths
        if layout.order is not None:
            projected = take_tokens(projected, layout.order)
            rotated = None if rotated is None else tuple(take_tokens(x, layout.order) for x in rotated)
            real = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    # Second phase: the kernel, and only the first W - 1 tokens still see what came before this call.
    out, _ = leap_kernel(projected, rotated, window, dropout, real, documents, None)
    if initial_state is not None and window > 1:
        near = slice(0, window - 1)
        start, _ = gated_means(
            projected[:, near],
            None if rotated is None else tuple(x[:, near] for x in rotated),
            window,
            segment_ids=None if documents is None else documents[:, near],
            initial_state=initial_state,
        )
        out = torch.cat([start, out[:, window - 1 :]], dim=1)
    # Third phase: the state, and the outputs back to where their tokens stand.
    state = None
    if return_state:
        last_document = None if segment_ids is None else segment_ids[:, -1:]
        state = _window_state(projected, rotated, window, counts, documents, last_document, initial_state)
    if mask is not None:
        out = out if layout.slots is None else take_tokens(out, layout.slots)
        out = out.masked_fill(~mask[..., None, None], 0.0)
    return out, state


def _window_state(projected, rotated, window, counts, documents, last_document, initial_state):
    """The last W - 1 real tokens of the open document, from the row and, where it is shorter, the state before it."""
    (batch, length), kept = projected.shape[:2], window - 1
    end = torch.full((batch,), length, device=projected.device) if counts is None else counts
    place = end[:, None] - kept + torch.arange(kept, device=projected.device)
    here, place = place >= 0, place.clamp(min=0)
    if documents is not None:
        here = here & (take_tokens(documents, place) == last_document)
        if initial_state is not None:
            still_open = (last_document == 0)[..., None]
            initial_state = initial_state[0], initial_state[1] * still_open
    projected = take_tokens(projected, place)
    rotated = None if rotated is None else tuple(take_tokens(x, place) for x in rotated)
    weights = focus_weights(projected[:, :, 1], projected[:, :, 2])
    key_value = averaged(projected, rotated).to(weights.dtype)
    return windowed_mean(key_value, weights, window, mask=here, initial_state=initial_state, return_state=True)[1]
