"""Matrices of logits whose rows begin at aligned places, whatever the size of the vocabulary."""

import torch

ALIGNED, CLASS_MULTIPLE = 8, 64


def aligned_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (N, V) itself if its rows begin at aligned places, otherwise a copy whose rows do."""
    if matrix.stride(1) == 1 and matrix.stride(0) % ALIGNED == 0:
        return matrix
    return rows_apart(matrix).copy_(matrix)


def rows_apart(matrix: torch.Tensor) -> torch.Tensor:
    """An empty matrix of the same shape, dtype and device whose rows begin at aligned places."""
    rows, classes = matrix.shape
    return matrix.new_empty(rows, classes + -classes % CLASS_MULTIPLE)[:, :classes]
