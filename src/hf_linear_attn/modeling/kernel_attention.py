"""Linear attention with feature maps: over all keys at once, and causal by chunks with a state.

Shapes: features (B, H, T, F), values (B, H, T, E). All sums run in the dtype of the features, which is at least
float32.
"""

import torch
import torch.nn.functional as F

from .backend import runs_triton

CAUSAL_CHUNK = 128
KERNEL_FEATURES = 128  # the most that the kernel holds
KERNEL_WIDTH = 64  # features of the values that it sums at once
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
    values: torch.Tensor | tuple[torch.Tensor, ...],
    state: torch.Tensor | None = None,
    chunk_size: int = CAUSAL_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal kernel attention by chunks of ``chunk_size`` tokens: O(T F E) time, O(T/C F E) memory. ``values`` may come in parts,
    which stand beside each other in the output.

    ``state`` (B, H, F, E + 1) sums ``phi(k) [v, 1]^T`` over the past (the last column is the sum of the key
    features); None means an empty past. Returns the output (B, H, T, E) and the state after the last token. A token
    whose key features are 0 (padding) leaves the state untouched. On a GPU the returned state has no gradient.
    """
    values = values if isinstance(values, tuple) else (values,)
    if runs_triton(query_features, _kernel_obstacle(query_features, state)):
        return _with_kernel(query_features, key_features, values, state)
    batch, heads, length, num_features = query_features.shape
    dtype = query_features.dtype
    ones = values[0].new_ones(1, dtype=dtype).expand(batch, heads, length, 1)
    values = torch.cat([*(x.to(dtype) for x in values), ones], dim=-1)  # (B, H, T, E + 1)
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


def _with_kernel(query_features, key_features, values, state):
    """The causal form as sums of causal DenseAttention's kernel: one for each part of the values, one for the denominator."""
    from .dense_attention_triton import causal_bilinear

    q, k = query_features.transpose(1, 2), key_features.transpose(1, 2)
    narrow = [part for x in values for part in x.split(KERNEL_WIDTH, dim=-1)]
    parts, sums = [], []
    start = 0
    for part in (*narrow, q.new_ones(*query_features.shape[:3], 1)):
        memory = None if state is None else state[..., start : start + part.shape[-1]].float()
        out, final = causal_bilinear(q, k, part.transpose(1, 2), None, memory)
        parts.append(out.transpose(1, 2))
        sums.append(final)
        start += part.shape[-1]
    denominator = parts.pop() + KEY_SUM_EPS * query_features.sum(dim=-1, keepdim=True)
    return torch.cat(parts, dim=-1) / denominator, torch.cat(sums, dim=-1)


def _kernel_obstacle(query_features: torch.Tensor, state: torch.Tensor | None) -> str | None:
    """Why the Triton kernel cannot do this call, or None."""
    if query_features.dtype != torch.float32:
        return f"it takes float32 features, not {query_features.dtype}"
    if query_features.shape[-1] > KERNEL_FEATURES:
        return f"its features end at {KERNEL_FEATURES}, these are {query_features.shape[-1]}"
    if query_features.shape[2] == 1:
        return "a single token is a step, with nothing to sum"
    if state is not None and torch.is_grad_enabled() and state.requires_grad:
        return "it gives no gradient to states"
    return None
