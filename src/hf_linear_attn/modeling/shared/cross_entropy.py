"""Cross-entropy over a vocabulary: the mean over the labels there are, 0 where there are none, in at least float32."""

import torch
import torch.nn.functional as F

from ..kernels.cross_entropy import IGNORED, SUMMED_LOSS, LinearCrossEntropy
from ..kernels.fast_paths import fast_paths
from .precision import accumulation_dtype


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not -100, computed in at least float32.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`).
        labels (`torch.LongTensor` of shape `(N,)`): -100 is ignored.
        count (`int` or `torch.Tensor`, *optional*): divide by this instead of the number of labels (gradient accumulation).

    Returns:
        `torch.Tensor`: a scalar, at least float32; 0, with gradients of 0, where nothing is to be predicted, whatever `count` is.
    """
    return _mean(_summed_loss(logits, labels), labels, count)


@fast_paths(*SUMMED_LOSS)
def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits.to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def or_one(count: int | torch.Tensor) -> int | torch.Tensor:
    """A number to divide by: 1 in place of 0, without a look at what lies on a device."""
    return count + (count == 0)


def batch_share(mean: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None) -> torch.Tensor:
    """What a batch's `mean` over its `labels` (-100: none) adds to the mean over the `count` labels of several batches."""
    if count is None:
        return mean
    own = (labels != IGNORED).sum().clamp(min=1).to(mean.device, accumulation_dtype(mean.dtype))
    return mean * (own / or_one(_beside(mean, count)))


def _mean(total, labels, count):
    if count is None:
        count = (labels != IGNORED).sum()
    return total / or_one(_beside(total, count))


def _beside(value, count):
    return count.to(value.device) if isinstance(count, torch.Tensor) else count


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    count: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`cross_entropy(hidden_states @ weight.T + bias, labels, count)` without ever holding the (N, V) logits.

    A block of rows at a time goes through the product, the softmax and back: the gradients are ready when the loss is, in as many
    products as logits that are kept need, and memory for one block and the gradients. Products in the inputs' dtype, softmax and
    the sum over blocks in at least float32. First derivatives: RuntimeError under `create_graph=True`.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, d)`), weight (`(V, d)`), bias (`(V,)`, *optional*).
        labels (`torch.LongTensor` of shape `(N,)`), count: as for `cross_entropy`.
    """
    total = LinearCrossEntropy.apply(hidden_states, weight, bias, labels)
    return _mean(total, labels, count)


__all__ = ["IGNORED", "batch_share", "cross_entropy", "linear_cross_entropy", "or_one"]
