"""A short causal convolution of each feature over the last real tokens of its document, added to the tokens themselves."""

import torch
from torch import nn

from ...kernels.tracing import as_written
from ..precision import accumulation_dtype
from ..token_order import TokenLayout, take_tokens
from .recent_tokens import behind_the_past, documents_behind_the_past, last_tokens


class ShortConvolution(nn.Module):
    """y_i = x_i + sum_{t < K} w_t x_{i-t}, feature by feature; x_{i-t} is 0 before the document's first token.

    Padding is no token: it is neither read nor counted. Weights begin at 0, where the layer changes nothing. O(K T).

    Args:
        width (`int`): features d. taps (`int`): K, at least 1.

    Source: the residual "Canon" layers of arXiv 2512.17351; short convolutions without the residual: arXiv 2412.06464.
    """

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.zeros(taps, width))

    def forward(
        self, hidden_states: torch.Tensor, layout: TokenLayout, past: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T, d) -> (B, T, d), in their dtype; sums in float32 at least.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`).
            layout (`TokenLayout`): where the real tokens stand, and their documents.
            past (`torch.Tensor` of shape `(B, K - 1, d)`, *optional*): the state, as `state_after` gave it; document 0 goes on.
        """
        dtype, kept = accumulation_dtype(hidden_states.dtype), self.taps - 1
        x = hidden_states if layout.order is None else take_tokens(hidden_states, layout.order)
        x = behind_the_past(x.to(dtype), past, kept)
        documents, length = documents_behind_the_past(layout, kept), hidden_states.shape[1]
        weight = self.weight.to(dtype)
        with as_written(x):
            mixed = x[:, kept:]
            for t in range(self.taps):
                earlier = x[:, kept - t : kept - t + length]
                if documents is not None and t:
                    same = documents[:, kept - t : kept - t + length] == documents[:, kept:]
                    earlier = earlier * same[..., None].to(dtype)
                mixed = torch.addcmul(mixed, earlier, weight[t])
        mixed = mixed if layout.slots is None else take_tokens(mixed, layout.slots)
        return mixed.to(hidden_states.dtype)

    def state_after(
        self, hidden_states: torch.Tensor, layout: TokenLayout, past: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The inputs of the last K - 1 real tokens (B, K - 1, d), in float32 at least; arguments as for `forward`."""
        kept = self.taps - 1
        x = hidden_states if layout.order is None else take_tokens(hidden_states, layout.order)
        x = behind_the_past(x.to(accumulation_dtype(x.dtype)), past, kept)
        return last_tokens(x, kept, layout, documents_behind_the_past(layout, kept))


def convolution_reference(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None = None, segment_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, token by token, for x (B, T, d) and weights (K, d); padding gives its own x."""
    batch, length, _ = x.shape
    out = x.clone()
    for b in range(batch):
        for i in range(length):
            real = [
                j
                for j in range(i + 1)
                if (mask is None or mask[b, j]) and (segment_ids is None or segment_ids[b, j] == segment_ids[b, i])
            ]
            if mask is None or mask[b, i]:
                for t, j in enumerate(reversed(real[-weight.shape[0] :])):
                    out[b, i] = out[b, i] + weight[t] * x[b, j]
    return out
