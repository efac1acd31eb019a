"""Performer's kernel attention (FAVOR+): random features, and linear attention with them, over all keys or causal with a state.

Shapes: queries and keys (B, H, T, D), features (B, H, T, F), values (B, H, T, E). Padding stands right: row `t` of sample `b` is
real where `keep[b, t]` is True. All sums run in the dtype of the features, which is at least float32. Source: specification,
section 1.2.
"""

import math

import torch
import torch.nn.functional as F

from ..kernels.fast_paths import fast_paths
from ..kernels.tracing import records_gradients
from ..shared.precision import accumulation_dtype
from .fast_paths import KERNEL_ATTENTION

CAUSAL_CHUNK = 128
KEY_SUM_EPS = 1e-6  # added to the causal sum of key features (published model)
QUERY_KEY_FLOOR = 1e-4  # added to the softmax kernel's features: no denominator can vanish
RELU_FLOOR = 1e-3


def default_num_features(head_dim: int, feature_factor: float) -> int:
    """Number of features `F = floor(D ln D / feature_factor)`, at least one (specification, section 0)."""
    return max(1, math.floor(head_dim * math.log(head_dim) / feature_factor))


@torch.no_grad()
def orthogonal_gaussian_features(
    num_features: int,
    head_dim: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draw the projection `W` of shape (F, D): blocks of D orthonormal rows, each row rescaled by a Gaussian norm.

    The rows of a block are the rows of the transposed Q factor of a Gaussian matrix; the lengths are those of independent
    D-dimensional Gaussian vectors, so that every row on its own is Gaussian while the rows of a block stay orthogonal. The draw
    runs on the CPU in float32: the same seed gives the same features on every device.
    """
    # Named, since a model built in half precision has made that the default, which QR does not know.
    exact = {"generator": generator, "dtype": torch.float32}
    blocks = []
    for start in range(0, num_features, head_dim):
        gaussian = torch.randn(head_dim, head_dim, **exact)
        orthonormal, _ = torch.linalg.qr(gaussian)
        blocks.append(orthonormal.T[: min(head_dim, num_features - start)])
    lengths = torch.randn(num_features, head_dim, **exact).norm(dim=-1, keepdim=True)
    return (torch.cat(blocks) * lengths).to(device=device, dtype=dtype)


def softmax_query_features(q: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Positive features of the queries, (B, H, T, D) -> (B, H, T, F); the maximum over features is taken out per row."""
    projected, half_norm = _project(q, features)
    return _positive(projected, half_norm + projected.amax(dim=-1, keepdim=True).detach())


def _positive(projected: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`(exp(projected - shift) + floor) / sqrt(F)`, in place where no gradient is recorded: these are the widest tensors."""
    scale = projected.shape[-1] ** -0.5
    if records_gradients(projected, shift):
        return ((projected - shift).exp() + QUERY_KEY_FLOOR) * scale
    return projected.sub_(shift).exp_().add_(QUERY_KEY_FLOOR).mul_(scale)


def softmax_key_features(k: torch.Tensor, features: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Positive features of the keys, (B, H, T, D) -> (B, H, T, F).

    The maximum that is taken out runs over features and keys together, because all keys of a head enter one sum.

    Args:
        keep: (B, T); padded keys take no part in that maximum and get features 0, so they leave every sum as it is. Without it
            padded keys count like others, as in the published model.
    """
    projected, half_norm = _project(k, features)
    if keep is None:
        largest = projected.amax(dim=(-1, -2), keepdim=True).detach()
        return _positive(projected, half_norm + largest)
    padded = ~keep[:, None, :, None]  # (B, 1, T, 1)
    lowest = torch.finfo(projected.dtype).min
    largest = projected.detach().masked_fill(padded, lowest).amax(dim=(-1, -2), keepdim=True)
    # A padded key could overflow: it is never exponentiated.
    exponent = (projected - half_norm - largest).masked_fill(padded, 0.0)
    return (exponent.exp() + QUERY_KEY_FLOOR).masked_fill(padded, 0.0) * features.shape[0] ** -0.5


def relu_features(x: torch.Tensor, features: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Features of the generalised ReLU kernel, (B, H, T, D) -> (B, H, T, F); 0 at padded rows where `keep` (B, T) is given."""
    dtype = accumulation_dtype(x.dtype)
    mapped = (x.to(dtype) @ (features.to(dtype).T * x.shape[-1] ** -0.25)).relu() + RELU_FLOOR
    return mapped if keep is None else mapped.masked_fill(~keep[:, None, :, None], 0.0)


def _project(x: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`W s x` (B, H, T, F) and `|s x|^2 / 2` (B, H, T, 1) with `s = D^(-1/4)`, in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    scaled = x.to(dtype) * x.shape[-1] ** -0.25
    return scaled @ features.to(dtype).T, scaled.square().sum(dim=-1, keepdim=True) / 2


def bidirectional_kernel_attention(
    query_features: torch.Tensor, key_features: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """`phi(q) (phi(k)^T V) / (phi(q) . sum phi(k))`, (B, H, T, E). O(T F E) time, no T x T tensor.

    A padded key has features 0. A sample without any real key gives 0 instead of 0/0.
    """
    summary = key_features.transpose(-1, -2) @ values.to(key_features.dtype)  # (B, H, F, E)
    total = key_features.sum(dim=-2)  # (B, H, F)
    denominator = (query_features @ total[..., None]).clamp_min(torch.finfo(query_features.dtype).tiny)
    return query_features @ summary / denominator


def causal_kernel_attention_reference(
    query_features: torch.Tensor, key_features: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The definition of the causal form, O(T^2): row `i` sums over keys `j <= i`."""
    weights = (query_features @ key_features.transpose(-1, -2)).tril()
    denominator = weights.sum(dim=-1, keepdim=True) + KEY_SUM_EPS * query_features.sum(dim=-1, keepdim=True)
    return weights @ values.to(weights.dtype) / denominator


@fast_paths(*KERNEL_ATTENTION)
def causal_kernel_attention(
    query_features: torch.Tensor,
    key_features: torch.Tensor,
    values: torch.Tensor | tuple[torch.Tensor, ...],
    state: torch.Tensor | None = None,
    chunk_size: int = CAUSAL_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal kernel attention by chunks of `chunk_size` tokens: O(T F E) time, O(T/C F E) memory.

    Args:
        values: (B, H, T, E), or several such parts, which stand beside each other in the output.
        state: (B, H, F, E + 1), the sum of `phi(k) [v, 1]^T` over the past (the last column is the sum of the key features);
            None means an empty past. A token whose key features are 0 (padding) leaves it untouched.

    Returns:
        The output (B, H, T, E) and the state after the last token, which has no gradient on a GPU.
    """
    values = values if isinstance(values, tuple) else (values,)
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
