"""The LEAP mechanism from projections to output (LEAP specification, section 2), and the choice of its spelling."""

import torch
import torch.nn.functional as F

from .backend import runs_triton
from .windowed_mean import compute_dtype, take_rows, windowed_mean

# The kernels look back one chunk of 64 tokens, and hold a whole head.
LARGEST_KERNEL_WINDOW = 65
LARGEST_KERNEL_HEAD = 128


def focus_weights(
    focus: torch.Tensor, key: torch.Tensor, exponential: bool = False, dropout: float = 0.0
) -> torch.Tensor:
    """Focus weights elu(l) + 1 (B, T, H) of the logits l = <f, k> / sqrt(E); the logits themselves if `exponential`."""
    dtype = compute_dtype(focus.dtype)
    logits = (focus.to(dtype) * key.to(dtype)).sum(-1) * focus.shape[-1] ** -0.5
    logits = F.dropout(logits, dropout, dropout > 0)
    return logits if exponential else F.elu(logits) + 1


def leap_mechanism(
    query: torch.Tensor,
    focus: torch.Tensor,
    key_value: torch.Tensor,
    window: int | None = None,
    *,
    unrotated_key: torch.Tensor | None = None,
    exponential: bool = False,
    dropout: float = 0.0,
    mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, ...] | None = None,
    return_state: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Focus-weighted means of keys and values, gated by the alignment of each query. O(T) time and memory.

    Args:
        query, focus (`torch.Tensor` of shape `(B, T, H, E)`).
        key_value (`torch.Tensor` of shape `(B, T, 2, H, E)`): keys and values, what is averaged.
        window (`int`, *optional*): tokens averaged, the token itself included; `None` for all so far.
        unrotated_key (`torch.Tensor` of shape `(B, T, H, E)`, *optional*): the keys that make the focus logits, where
            `query` and the averaged keys are rotated.
        exponential (`bool`): weights exp(l) instead of elu(l) + 1.
        dropout (`float`): probability of dropping entries of query, focus, value and the focus logits.
        mask, segment_ids, initial_state, return_state: as in `windowed_mean`, whose state this is, too.

    Returns:
        `tuple`: the output (B, T, H, E) in the inputs' dtype, and the state or None.
    """
    inputs = query, focus, key_value, unrotated_key
    obstacle = _kernel_obstacle(query, window, exponential, mask, initial_state, return_state)
    arguments = {"mask": mask, "segment_ids": segment_ids, "initial_state": initial_state, "return_state": return_state}
    if query.shape[1] > 1 and runs_triton(query, obstacle):
        return _with_kernel(*inputs, window, dropout, **arguments)
    return _with_torch(*inputs, window, dropout, exponential, **arguments)


def _with_torch(query, focus, key_value, key, window, dropout, exponential=False, **arguments):
    dtype = compute_dtype(query.dtype)
    key = key_value[:, :, 0] if key is None else key
    if dropout:
        query, focus = F.dropout(query, dropout), F.dropout(focus, dropout)
        key_value = torch.stack([key_value[:, :, 0], F.dropout(key_value[:, :, 1], dropout)], dim=2)
    weights = focus_weights(focus, key, exponential, dropout)
    means, state = windowed_mean(key_value.to(dtype), weights, window, log_weights=exponential, **arguments)
    focused_key, focused_value = means.unbind(2)  # (B, T, H, E) each
    alignment = torch.sigmoid((query.to(dtype) * focused_key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5)
    return (alignment * focused_value).to(query.dtype), state


def _with_kernel(query, focus, key_value, key, window, dropout, mask, segment_ids, initial_state, return_state):
    from .leap_mechanism_triton import leap_kernel

    if window is None:
        out, state = leap_kernel(query, focus, key, key_value, None, dropout, mask, segment_ids, initial_state)
        return out, state if return_state else None
    documents = segment_ids
    rank = counts = real = None
    if mask is not None:
        # A window counts real tokens: they move together first, and their outputs move back afterwards.
        mask = mask.bool()
        counts, rank = mask.sum(1), mask.long().cumsum(1) - 1
        order = torch.argsort(~mask, dim=1, stable=True)
        query, focus, key_value, key, documents = (
            None if x is None else take_rows(x, order) for x in (query, focus, key_value, key, documents)
        )
        real = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
    inputs = query, focus, key_value, key
    out, _ = leap_kernel(query, focus, key, key_value, window, dropout, real, documents, None)
    if initial_state is not None and window > 1:
        # Only the first W - 1 tokens still see what came before this call.
        near = [None if x is None else x[:, : window - 1] for x in (*inputs, documents)]
        start, _ = _with_torch(*near[:4], window, 0.0, segment_ids=near[4], initial_state=initial_state)
        out = torch.cat([start, out[:, window - 1 :]], dim=1)
    state = None
    if return_state:
        last_document = None if segment_ids is None else segment_ids[:, -1:]
        state = _window_state(inputs, window, counts, documents, last_document, initial_state)
    if rank is not None:
        out = take_rows(out, rank.clamp(min=0)).masked_fill(~mask[..., None, None], 0.0)
    return out, state


def _window_state(inputs, window, counts, documents, last_document, initial_state):
    """The last W - 1 real tokens of the open document, from the row and, where it is shorter, the state before it."""
    _, focus, key_value, key = inputs
    key = key_value[:, :, 0] if key is None else key
    kept = window - 1
    end = key.new_full((key.shape[0],), key.shape[1], dtype=torch.long) if counts is None else counts
    place = end[:, None] - kept + torch.arange(kept, device=key.device)
    here, place = place >= 0, place.clamp(min=0)
    if documents is not None:
        here = here & (take_rows(documents, place) == last_document)
        if initial_state is not None:
            still_open = (documents[:, :1] == last_document)[..., None]
            initial_state = initial_state[0], initial_state[1] * still_open
    weights = focus_weights(take_rows(focus, place), take_rows(key, place))
    return windowed_mean(
        take_rows(key_value, place).to(weights.dtype),
        weights,
        window,
        mask=here,
        initial_state=initial_state,
        return_state=True,
    )[1]


def _kernel_obstacle(query, window, exponential, mask, initial_state, return_state) -> str | None:
    """Why the Triton kernel cannot do this call, or None."""
    if exponential:
        return "it has no exp focus"
    if window is not None and window > LARGEST_KERNEL_WINDOW:
        return f"its windows end at {LARGEST_KERNEL_WINDOW} tokens (or are global), this one has {window}"
    if window is not None and mask is not None and initial_state is not None:
        return "it does not take padding and an earlier state together in a windowed layer"
    if query.shape[-1] > LARGEST_KERNEL_HEAD:
        return f"its heads end at {LARGEST_KERNEL_HEAD} features, these have {query.shape[-1]}"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if torch.is_grad_enabled() and (return_state or initial_state is not None):
        return "it gives no gradient to states"
    return None
