"""What the families' attention layers return."""

from typing import NamedTuple

import torch


class LayerOutput(NamedTuple):
    """`hidden_states` (B, T, d); on request `attentions` (B, H, T, T), `focus_weights` (B, H, T), `state` (tuple of tensors)."""

    hidden_states: torch.Tensor
    attentions: torch.Tensor | None = None
    focus_weights: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] | None = None
