"""Random features of kernel attention (FAVOR+): the projection and the two feature maps that SEA uses.

B batch, H heads, T time, D head size, F number of features. Tensors are head-major, ``(B, H, T, D)``, as in the
attention functions of Transformers. Padding stands right: row ``t`` of sample ``b`` is real where ``keep[b, t]`` is
True.
"""

import math

import torch

QUERY_KEY_FLOOR = 1e-4  # added to the softmax kernel's features: no denominator can vanish
RELU_FLOOR = 1e-3


def default_num_features(head_dim: int, feature_factor: float) -> int:
    """Number of features ``F = floor(D ln D / feature_factor)``, at least one (specification, section 0)."""
    return max(1, math.floor(head_dim * math.log(head_dim) / feature_factor))


@torch.no_grad()
def orthogonal_gaussian_features(
    num_features: int,
    head_dim: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draw the projection ``W`` of shape (F, D): blocks of D orthonormal rows, each row rescaled by a Gaussian norm.

    The rows of a block are the rows of the transposed Q factor of a Gaussian matrix; the lengths are those of
    independent D-dimensional Gaussian vectors, so that every row on its own is Gaussian while the rows of a block
    stay orthogonal.
    The draw runs on the CPU in float32: the same seed gives the same features on every device.
    Source: specification, section 1.2.
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


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: half precision is raised to float32, float64 stays."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_query_features(q: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Positive features of the queries, (B, H, T, D) -> (B, H, T, F); the maximum over features is taken out per
    row.
    """
    projected, half_norm = _project(q, features)
    shifted = projected - half_norm - projected.amax(dim=-1, keepdim=True).detach()
    return (shifted.exp() + QUERY_KEY_FLOOR) * features.shape[0] ** -0.5


def softmax_key_features(k: torch.Tensor, features: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Positive features of the keys, (B, H, T, D) -> (B, H, T, F).

    The maximum that is taken out runs over features and keys together, because all keys of a head enter one sum.
    ``keep`` (B, T): padded keys take no part in that maximum and get features 0, so they leave every sum as it is.
    Without ``keep`` padded keys count like others, as in the published model.
    """
    projected, half_norm = _project(k, features)
    if keep is None:
        largest = projected.amax(dim=(-1, -2), keepdim=True).detach()
        return ((projected - half_norm - largest).exp() + QUERY_KEY_FLOOR) * features.shape[0] ** -0.5
    kept = keep[:, None, :, None]  # (B, 1, T, 1)
    lowest = torch.finfo(projected.dtype).min
    largest = projected.detach().masked_fill(~kept, lowest).amax(dim=(-1, -2), keepdim=True)
    exponent = (projected - half_norm - largest).masked_fill(
        ~kept, 0.0
    )  # a padded key could overflow: never exponentiate it
    return (exponent.exp() + QUERY_KEY_FLOOR).masked_fill(~kept, 0.0) * features.shape[0] ** -0.5


def relu_features(x: torch.Tensor, features: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Features of the generalised ReLU kernel, (B, H, T, D) -> (B, H, T, F); 0 at padded rows where ``keep`` is
    given.
    """
    dtype = accumulation_dtype(x.dtype)
    mapped = (x.to(dtype) @ (features.to(dtype).T * x.shape[-1] ** -0.25)).relu() + RELU_FLOOR
    return mapped if keep is None else mapped.masked_fill(~keep[:, None, :, None], 0.0)


def _project(x: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``W s x`` (B, H, T, F) and ``|s x|^2 / 2`` (B, H, T, 1) with ``s = D^(-1/4)``, in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    scaled = x.to(dtype) * x.shape[-1] ** -0.25
    return scaled @ features.to(dtype).T, scaled.square().sum(dim=-1, keepdim=True) / 2
