"""What may stand behind a mechanism's heads: a norm a head, a gate, a projection."""

import torch
from torch import nn


class GatedOutput(nn.Module):
    """out = W_o (sigmoid(W_g x) * RMSNorm_head(mixed)), of which every part may be left out.

    Args:
        width (`int`): d, of x and of all heads together. heads (`int`): H; the norm has one weight for each of the d / H
            features, the same for all heads.
        norm, gate, projection (`bool`): which parts there are. eps (`float`): of the norm.

    Source: arXiv 2412.06464 (norm, gate); sigmoid instead of SiLU in the gate: arXiv 2510.26692.
    """

    def __init__(self, width: int, heads: int, norm: bool, gate: bool, projection: bool, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.RMSNorm(width // heads, eps=eps) if norm else None
        self.gate_proj = nn.Linear(width, width, bias=False) if gate else None
        self.o_proj = nn.Linear(width, width, bias=False) if projection else None

    def forward(self, mixed: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Heads (B, T, H, D) and the layer's input x (B, T, d) -> (B, T, d)."""
        if self.norm is not None:
            mixed = self.norm(mixed.to(self.norm.weight.dtype))  # autocast leaves the heads in half precision
        mixed = mixed.flatten(2)
        if self.gate_proj is not None:
            mixed = torch.sigmoid(self.gate_proj(hidden_states)) * mixed
        return mixed if self.o_proj is None else self.o_proj(mixed)
