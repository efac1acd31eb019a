"""The published LEAP language model as its formulas read: the reference for speed, and for the function that we compute.

Every windowed sum is a difference of two running sums over the whole sequence (the published form; see docs on why our own model
builds them without subtraction), and a token of the past is recomputed for each new one: the published model carries no state.
Parameters have the published names, so `hf_linear_attn.conversion.from_published` turns its weights into ours.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class PublishedLeapBlock(nn.Module):
    """One pre-norm block. window: tokens in the mean, None for all so far. hidden (B, T, d) -> (B, T, d)."""

    def __init__(self, hidden_size: int, num_heads: int, window: int | None, dropout: float):
        super().__init__()
        self.num_heads, self.window, self.dropout = num_heads, window, dropout
        self.attn_norm = nn.LayerNorm(hidden_size)
        self.leap = nn.Module()
        self.leap.projections = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.boom_norm = nn.LayerNorm(hidden_size)
        self.boom = nn.Linear(hidden_size, 4 * hidden_size)
        self.unboom = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attend(self.attn_norm(hidden))
        return hidden + self.drop(self.unboom(functional.gelu(self.boom(self.boom_norm(hidden)))))

    def attend(self, normed: Tensor) -> Tensor:
        batch, length, size = normed.shape
        head_size = size // self.num_heads
        projected = self.leap.projections(normed).view(batch, length, 4, self.num_heads, head_size)
        q, f, k, v = projected.unbind(2)  # (B, T, H, e) each
        q, f, v = self.drop(q), self.drop(f), self.drop(v)
        logits = self.drop((f * k).sum(-1, keepdim=True) * head_size**-0.5)  # (B, T, H, 1)
        weights = functional.elu(logits) + 1
        total = self.windowed_sum(weights) + 1e-5
        focused_key = self.windowed_sum(weights * k) / total
        focused_value = self.windowed_sum(weights * v) / total
        gate = torch.sigmoid((q * focused_key).sum(-1, keepdim=True) * head_size**-0.5)
        return (gate * focused_value).reshape(batch, length, size)

    def windowed_sum(self, x: Tensor) -> Tensor:
        """Sum over the last `window` tokens of x (B, T, H, n) as a difference of running sums s_i - s_(i-w)."""
        running = x.cumsum(1)
        if self.window is None or self.window >= x.shape[1]:
            return running
        earlier = functional.pad(running[:, : -self.window], (0, 0, 0, 0, self.window, 0))
        return running - earlier

    def drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class PublishedLeap(nn.Module):
    """Language model of such blocks with learned positions and tied logits. input_ids (B, T) -> loss, or logits (B, T, V)."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_heads: int,
        windows: list[int | None],
        positions: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.dropout = dropout
        self.word_embedding = nn.Embedding(vocab_size, hidden_size)
        self.leap_model = nn.Module()
        self.leap_model.position_embeddings = nn.Embedding(positions, hidden_size)
        self.leap_model.decoders = nn.ModuleList(
            PublishedLeapBlock(hidden_size, num_heads, window, dropout) for window in windows
        )
        self.last_norm = nn.LayerNorm(hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=hidden_size**-0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.word_embedding(input_ids) + self.leap_model.position_embeddings(positions)
        hidden = functional.dropout(hidden, self.dropout, self.training)
        for block in self.leap_model.decoders:
            hidden = block(hidden)
        logits = functional.linear(self.last_norm(hidden), self.word_embedding.weight)
        if labels is None:
            return logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
