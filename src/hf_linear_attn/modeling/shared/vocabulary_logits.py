"""Logits of a vocabulary from the last hidden states."""

import torch
from torch import nn

from ..kernels.fast_paths import fast_paths
from ..kernels.step_linear import step_linear
from .kernels.padded_vocabulary import VOCABULARY


@fast_paths(*VOCABULARY)
def vocabulary_logits(linear: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`linear(hidden_states)` for (B, T, d); on a GPU in training possibly a view with gaps between its rows."""
    logits = step_linear(linear, hidden_states)
    lost = _lost_bias(linear, hidden_states)
    return logits if lost is None else logits + lost


def _lost_bias(linear, hidden_states) -> torch.Tensor | None:
    """What a layer for some trained tokens leaves out: PEFT's (0.21), tied to the embedding, multiplies without the bias."""
    wrapped = getattr(getattr(linear, "token_adapter", None), "base_layer", None)
    bias = getattr(wrapped, "bias", None)
    if bias is None:
        return None
    return bias - linear(hidden_states.new_zeros(1, hidden_states.shape[-1]))
