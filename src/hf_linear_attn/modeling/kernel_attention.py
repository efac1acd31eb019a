"""Linear attention with feature maps: over all keys at once, and causal by chunks with a state.

Shapes: features (B, H, T, F), values (B, H, T, E). All sums run in the dtype of the features, which is at least
float32.
"""

import torch
import torch.nn.functional as F

CAUSAL_CHUNK = 128
KEY_SUM_EPS = 1e-6  # added to the causal sum of key features (published model)


def bidirectional_kernel_attention(
    query_features: torch.Tensor, key_features: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """``phi(q) (phi(k)^T V) / (phi(q) . sum phi(k))``, (B, H, T, E). O(T F E) time, no T x T tensor.

    A padded key has features 0. A sample without any real key gives 0 instead of 0/0.
    """
    summary = key_features.transpose(-1, -2) @ values.to(key_features.dtype)  # (B, H, F, E)
    total = key_features.sum(dim=-2)  # (B, H, F)
    denominator = (query_features @ total[..., None]).clamp_min(torch.finfo(query_features.dtype).tiny)
    return query_features @ summary / denominator


def causal_kernel_attention_reference(
    query_features: torch.Tensor, key_features: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The definition of the causal form, O(T^2): row ``i`` sums over keys ``j <= i`` (specification, section 1.2)."""
    weights = (query_features @ key_features.transpose(-1, -2)).tril()
    denominator = weights.sum(dim=-1, keepdim=True) + KEY_SUM_EPS * query_features.sum(dim=-1, keepdim=True)
    return weights @ values.to(weights.dtype) / denominator


def causal_kernel_attention(
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    values: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk_size: int = CAUSAL_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal kernel attention by chunks of ``chunk_size`` tokens: O(T F E) time, O(T/C F E) memory.

    ``state`` (B, H, F, E + 1) sums ``phi(k) [v, 1]^T`` over the past (the last column is the sum of the key
    features); None means an empty past. Returns the output (B, H, T, E) and the state after the last token. A token
    whose key features are 0 (padding) leaves the state untouched.
    """
    batch, heads, length, num_features = query_features.shape
    dtype = query_features.dtype
    values = torch.cat([values.to(dtype), torch.ones_like(values[..., :1], dtype=dtype)], dim=-1)  # (B, H, T, E + 1)
    chunk = min(chunk_size, length)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length

    def to_chunks(x: torch.Tensor) -> torch.Tensor:  # (B, H, T, X) -> (B, H, N, C, X)
        return F.pad(x, (0, 0, 0, padding)).view(batch, heads, num_chunks, chunk, x.shape[-1])

    q, k, v = to_chunks(query_features), to_chunks(key_features), to_chunks(values)
    # First phase: what each chunk adds to the state, and the state before each chunk.
    added = k.transpose(-1, -2) @ v  # (B, H, N, F, E + 1)
    if state is None:
        state = added.new_zeros(batch, heads, num_features, values.shape[-1])
    states = torch.cat([state[:, :, None].to(dtype), added], dim=2).cumsum(dim=2)  # (B, H, N + 1, F, E + 1)
    # Second phase: the past through the state, the chunk itself through its lower triangle.
    sums = q @ states[:, :, :-1] + (q @ k.transpose(-1, -2)).tril() @ v  # (B, H, N, C, E + 1)
    sums = sums.view(batch, heads, num_chunks * chunk, -1)[:, :, :length]
    denominator = sums[..., -1:] + KEY_SUM_EPS * query_features.sum(dim=-1, keepdim=True)
    return sums[..., :-1] / denominator, states[:, :, -1]


def running_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of all rows up to each one, (B, H, T, E) -> (B, H, T, E).

    In chunks, and then over chunks: a sum along a long row alone leaves a GPU with a few hundred serial threads.
    """
    length = values.shape[2]
    if length <= CAUSAL_CHUNK:
        return values.cumsum(dim=2)
    padding = -length % CAUSAL_CHUNK
    chunks = F.pad(values, (0, 0, 0, padding)).unflatten(2, (-1, CAUSAL_CHUNK)).cumsum(dim=3)  # (B, H, N, C, E)
    before = F.pad(chunks[:, :, :-1, -1].cumsum(dim=2), (0, 0, 1, 0))  # (B, H, N, E)
    return (chunks + before[:, :, :, None]).flatten(2, 3)[:, :, :length]
