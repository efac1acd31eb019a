"""What the families' attention layers return, and what they cannot."""

from typing import NamedTuple

import torch


class LayerOutput(NamedTuple):
    """`hidden_states` (B, T, d); on request `attentions` (B, H, T, T), `focus_weights` (B, H, T), `state` (tuple of tensors)."""

    hidden_states: torch.Tensor
    attentions: torch.Tensor | None = None
    focus_weights: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] | None = None


def check_state(state: tuple[torch.Tensor, ...], layer_idx: int, count: int, shape: tuple[int, ...]) -> None:
    """Refuse a layer's state unless it has `count` tensors, the first of this shape."""
    if len(state) != count or tuple(state[0].shape) != shape:
        raise ValueError(
            f"the state of layer {layer_idx} has {len(state)} tensors, of shapes {[tuple(x.shape) for x in state]}, expected "
            f"{count}, the first of shape {shape}: it comes from another model or another batch size"
        )


def refuse_maps_after(state) -> None:
    """Attention maps need every token; refuse them where earlier ones are only left as a state (not None)."""
    if state is not None:
        raise ValueError(
            "`output_attentions` needs all tokens of the text in one call, but the earlier ones are only left as a state: "
            "call the model on the whole text, with `use_cache=False`"
        )


def shown_weights(weights: torch.Tensor, is_log: bool, mask: torch.Tensor | None, wanted: bool | str) -> torch.Tensor:
    """What `output_focus_weights` gives, (B, H, T), from weights (B, T, H) or their logarithms: weights, or "log" of them.

    Padding has weight 0, or -inf. Raises ValueError for another word.
    """
    if isinstance(wanted, str) and wanted != "log":
        raise ValueError(f'`output_focus_weights` is {wanted!r}, expected True, False or "log"')
    if wanted == "log":
        shown, nothing = weights if is_log else weights.log(), -torch.inf
    else:
        shown, nothing = weights.exp() if is_log else weights, 0.0
    shown = shown.transpose(1, 2)
    return shown if mask is None else shown.masked_fill(~mask[:, None], nothing)
