"""K^T V of DenseAttention where keys and values are the same tensor, its gradient, and the choice of their spelling."""

import torch

from .backend import runs_triton

SHORTEST_WIDTH = 512  # below it there are too few tiles in the triangle to gain from the half
LONGEST_SUM = 16384  # above it the library, which splits the sum among processors, is faster


def gram(x: torch.Tensor) -> torch.Tensor:
    """X^T X of each head, (B, H, T, D) -> (B, H, D, D), products in the dtype of `x`."""
    if _is_faster(x) and runs_triton(x, None):
        from .gram_triton import gram_kernel

        return gram_kernel(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x.transpose(-1, -2) @ x


def with_transpose(matrix: torch.Tensor) -> torch.Tensor:
    """M + M^T for M (B, d, d) that nobody else needs: it may take the place of M."""
    if not runs_triton(matrix, "it sums in float32" if matrix.dtype == torch.float64 else None):
        return matrix + matrix.mT
    from .gram_triton import add_transpose_

    matrix = matrix.contiguous()
    add_transpose_(matrix)
    return matrix


def _is_faster(x: torch.Tensor) -> bool:
    """Whether the kernel takes this product and beats the library's, which does twice the operations."""
    length, width = x.shape[2:]
    half = x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(x.device.type)
    whole_tiles = isinstance(length, int) and length % 64 == 0 and width % 128 == 0
    return half and whole_tiles and width >= SHORTEST_WIDTH and length <= LONGEST_SUM
