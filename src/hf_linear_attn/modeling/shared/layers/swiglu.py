"""The feed-forward layer of Llama-style models."""

import torch
from torch import nn


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) * W_up x), d -> intermediate -> d, without biases (arXiv 2002.05202)."""

    def __init__(self, width: int, intermediate: int, dropout: float = 0.0):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.dropout(self.down_proj(nn.functional.silu(gate) * up))
