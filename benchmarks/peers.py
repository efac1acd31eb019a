"""Models that ours are compared with: the published LEAP and DANet as their formulas read, and Transformers' GPT-2.

LEAP: every windowed sum is a difference of two running sums over the whole sequence (the published form; see docs on why our own
model builds them without subtraction), and a token of the past is recomputed for each new one: the published model carries no
state. Parameters have the published names, so `hf_linear_attn.conversion.from_published` turns its weights into ours.

DANet (specification, sections 1 to 3): global blocks with MaxNorm and ReLU, learned positions. A Linear layer of ours holds the
transpose of the feed-forward matrices.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel


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


def gpt2(
    vocab_size: int, width: int, layers: int, heads: int, positions: int, dropout: float = 0.0, **fields: Any
) -> Any:
    """GPT-2 with new weights, scaled-dot-product attention and the fused form of its own GELU.

    fields: further ones of GPT2Config, such as the feed-forward width `n_inner`. No end of text is set, so
    that a measured generation never stops early.
    """
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_positions=positions,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            activation_function="gelu_pytorch_tanh",
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
            **fields,
        )
    )
