"""What the families' attention layers return, and what they cannot."""

from typing import NamedTuple

import torch


class LayerOutput(NamedTuple):
    """`hidden_states` (B, T, d); on request `attentions` (B, H, T, T), `focus_weights` (B, H, T), `state` (tuple of tensors)."""

    hidden_states: torch.Tensor
    attentions: torch.Tensor | None = None
    focus_weights: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] | None = None


def refuse_maps_after(state) -> None:
    """Attention maps need every token; refuse them where earlier ones are only left as a state (not None)."""
    if state is not None:
        raise ValueError(
            "`output_attentions` needs all tokens of the text in one call, but the earlier ones are only left as a state: "
            "call the model on the whole text, with `use_cache=False`"
        )
