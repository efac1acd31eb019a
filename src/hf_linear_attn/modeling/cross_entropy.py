"""Cross-entropy over a vocabulary in two buffers instead of four.

PyTorch's own keeps the log-probabilities beside the logits, and both once more in float32 when the logits are in half precision.
Here the rows are read in blocks that stay in the processor's cache; only one number a row is kept for backward.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .compat import is_transformed
from .windowed_mean import compute_dtype

IGNORED = -100
# Logits in a block: few enough for a CPU's cache, and on a GPU enough for its memory to be busy.
BLOCK_ON_CPU = 2**20
BLOCK_ON_GPU = 2**26


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not -100, computed in at least float32.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`).
        labels (`torch.LongTensor` of shape `(N,)`): -100 is ignored.
        count (`int` or `torch.Tensor`, *optional*): divide by this instead of the number of labels (gradient accumulation).

    Returns:
        `torch.Tensor`: a scalar, at least float32; NaN where nothing is to be predicted.
    """
    if torch.compiler.is_compiling() or type(logits) is not torch.Tensor or is_transformed(logits):
        # The compiler fuses the passes itself; tensor subclasses and function transforms know PyTorch's own operator only.
        total = F.cross_entropy(logits.to(compute_dtype(logits.dtype)), labels, ignore_index=IGNORED, reduction="sum")
    else:
        total = _BlockwiseCrossEntropy.apply(logits, labels)
    if count is None:
        count = (labels != IGNORED).sum()
    elif isinstance(count, torch.Tensor):
        count = count.to(total.device)
    return total / count


class _BlockwiseCrossEntropy(torch.autograd.Function):
    """Sum over the rows; keeps the logits themselves and the logarithm of each row's partition function."""

    @staticmethod
    def forward(ctx, logits, labels):
        dtype = compute_dtype(logits.dtype)
        real = labels != IGNORED
        chosen = labels.where(real, 0)[:, None]
        log_partition = torch.cat([rows.to(dtype).logsumexp(-1) for rows in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, chosen, real, log_partition)
        return (log_partition - logits.gather(1, chosen)[:, 0].to(dtype)).where(real, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, chosen, real, log_partition = ctx.saved_tensors
        dtype = compute_dtype(logits.dtype)
        scale = (grad * real)[:, None]
        result = torch.empty_like(logits)
        size = _rows(logits)
        for out, *parts in zip(*(x.split(size) for x in (result, logits, chosen, log_partition[:, None], scale))):
            rows, label, partition, weight = parts
            if rows.dtype == dtype:  # in place
                block = torch.sub(rows, partition, out=out)
            else:
                block = rows.to(dtype) - partition
            block.exp_().mul_(weight).scatter_add_(1, label, -weight)
            if block is not out:
                out.copy_(block)
        return result, None


def _rows(logits) -> int:
    """Rows of a block."""
    block = BLOCK_ON_GPU if logits.is_cuda else BLOCK_ON_CPU
    return max(1, block // logits.shape[1])
