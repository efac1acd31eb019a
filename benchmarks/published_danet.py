"""The published DANet encoder as its formulas read (DANet specification, sections 1 to 3): the peer of our own.

Global blocks with MaxNorm and ReLU, learned positions. A Linear layer of ours holds the transpose of the feed-forward matrices.
"""

import torch
from torch import nn


class PublishedDanetBlock(nn.Module):
    """h + norm(FFN(attention(norm(h) n^(-1/3)))). h (B, T, d)."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(width, width) * 1e-4)
        self.expand = nn.Parameter(torch.randn(width, 4 * width) * 0.01)
        self.contract = nn.Parameter(torch.randn(4 * width, width) * 0.01)

    def forward(self, hidden, scale):
        x = max_norm(hidden) * scale
        query = x @ self.queries.T
        if hidden.shape[-1] <= hidden.shape[1]:
            mixed = query @ (x.transpose(1, 2) @ x)
        else:
            mixed = (query @ x.transpose(1, 2)) @ x
        return hidden + max_norm(torch.relu(mixed @ self.expand) @ self.contract)


def max_norm(x):
    """X / (max |x| + 1e-3)."""
    return x / (x.abs().amax(-1, keepdim=True) + 1e-3)


class PublishedDanet(nn.Module):
    """Embeddings, blocks, final MaxNorm. ids (B, T) -> hidden states (B, T, d)."""

    def __init__(self, vocab_size: int, width: int, num_layers: int, length: int):
        super().__init__()
        self.words, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(PublishedDanetBlock(width) for _ in range(num_layers))

    def forward(self, ids):
        hidden = max_norm(self.words(ids) + self.positions.weight)
        scale = hidden.new_full((ids.shape[0], ids.shape[1], 1), ids.shape[1] ** (-1 / 3))
        for layer in self.layers:
            hidden = layer(hidden, scale)
        return max_norm(hidden)
