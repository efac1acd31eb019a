"""Softmax cross-entropy over the rows of logits as a Triton kernel: the loss, its gradient, or both in one go.

    loss = log sum_j exp(x_j) - x_label         gradient = weight (exp(x_j - log sum exp(x)) - [j = label])

A program does one row, in pieces that registers hold. Loss and gradient together read a row twice, the second time out of the
cache, and write it once: the gradient takes the place of the logits. Sums are float32. A label that is no class gives NaN.
"""

import torch

try:  # inside `try`, since loading a checkpoint's own code demands every other import, also where there is no GPU
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need the package triton: pip install triton") from error

from .backend import on_its_device
from .vocabulary_logits import rows_apart

PIECE = 4096


@triton.jit
def _add(x, largest, total):
    """Largest number of each place so far, and the sum of exponentials relative to it, with x (PIECE,) as well."""
    higher = tl.maximum(largest, x)
    return higher, total * tl.exp(largest - higher) + tl.exp(x - higher)


@triton.jit
def _slope(x, partition, place, label, classes, weight):
    """Gradient of a weighted row by its logits x at the places; 0 from `classes` on."""
    slope = tl.exp(x - partition) - tl.where(place == label, 1.0, 0.0)
    return tl.where(place < classes, slope * weight, 0.0)


@triton.jit
def _kernel(
    x_ptr, label_ptr, weight_ptr, loss_ptr, partition_ptr, grad_ptr, row_stride, grad_stride, classes, width, ignored,
    PIECE: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Partition is the logarithm of a row's sum of exponentials: written with the loss, read without.

    The gradient's rows have `width` places; it is 0 from `classes` on. Whole pieces need no mask, with which they would be
    read number by number.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    column = tl.arange(0, PIECE)
    whole = classes // PIECE * PIECE
    label = tl.load(label_ptr + row)
    real = label != ignored
    known = (label >= 0) & (label < classes)  # a label that is no class makes loss and gradient NaN
    if LOSS:
        largest, total = tl.full((PIECE,), -3.0e38, tl.float32), tl.zeros((PIECE,), tl.float32)
        for start in tl.range(0, whole, PIECE):
            largest, total = _add(tl.load(x_ptr + start + column).to(tl.float32), largest, total)
        rest = tl.load(x_ptr + whole + column, mask=whole + column < classes, other=-float("inf")).to(tl.float32)
        largest, total = _add(rest, largest, total)
        top = tl.max(largest, axis=0)
        partition = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
        chosen = tl.load(x_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        tl.store(loss_ptr + row, tl.where(real, partition - chosen, 0.0))
        tl.store(partition_ptr + row, partition)
    else:
        partition = tl.load(partition_ptr + row)
    if GRADIENT:
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weight_ptr + row).to(tl.float32)
        weight = tl.where(real, tl.where(known, weight, float("nan")), 0.0)
        grad_ptr += row * grad_stride
        dtype = grad_ptr.dtype.element_ty
        if LOSS:
            tl.debug_barrier()  # the label's logit is read before another thread writes there
        for start in tl.range(0, whole, PIECE):
            x = tl.load(x_ptr + start + column).to(tl.float32)
            tl.store(grad_ptr + start + column, _slope(x, partition, start + column, label, classes, weight).to(dtype))
        for start in tl.range(whole, width, PIECE):
            place = start + column
            x = tl.load(x_ptr + place, mask=place < classes, other=0.0).to(tl.float32)
            tl.store(
                grad_ptr + place, _slope(x, partition, place, label, classes, weight).to(dtype), mask=place < width
            )


def _run(logits, labels, weights, losses, partition, grad, classes, ignored, **flags):
    rows, width = logits.shape
    # A kernel never touches a pointer whose flag is off; any tensor will do.
    weights, losses, partition, grad = (logits if x is None else x for x in (weights, losses, partition, grad))
    _kernel[(rows,)](
        logits, labels.contiguous(), weights, losses, partition, grad, logits.stride(0), grad.stride(0), classes, width,
        ignored,
        PIECE=min(PIECE, triton.next_power_of_2(classes)), num_warps=8, **flags,
    )  # fmt: skip


@on_its_device
def softmax_loss(logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (N,), 0 where the label is `ignored`, and log partition (N,) of logits (N, V) whose rows are dense."""
    losses, partition = torch.empty(2, logits.shape[0], device=logits.device)
    _run(
        logits,
        labels,
        None,
        losses,
        partition,
        None,
        logits.shape[1],
        ignored,
        LOSS=True,
        GRADIENT=False,
        WEIGHTED=False,
    )
    return losses, partition


@on_its_device
def softmax_gradient(logits, labels, partition, weights, ignored: int) -> torch.Tensor:
    """Gradient (N, V) of the sum of `weights` (N,) times the losses, from the log partition that `softmax_loss` gave."""
    grad = torch.empty_like(logits) if logits.is_contiguous() else rows_apart(logits)
    _run(
        logits,
        labels,
        weights,
        None,
        partition,
        grad,
        logits.shape[1],
        ignored,
        LOSS=False,
        GRADIENT=True,
        WEIGHTED=True,
    )
    return grad


@torch.library.custom_op("hf_linear_attn::softmax_loss_and_gradient", mutates_args=("logits",))
@on_its_device
def softmax_loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, classes: int, ignored: int) -> torch.Tensor:
    """Losses (N,), 0 where the label is `ignored`; the gradient of their sum takes the place of the logits (N, V or more).

    Logits from number `classes` on count for nothing, and get gradient 0.
    """
    losses, partition = (torch.empty(logits.shape[0], device=logits.device) for _ in range(2))
    _run(logits, labels, None, losses, partition, logits, classes, ignored, LOSS=True, GRADIENT=True, WEIGHTED=False)
    return losses


@softmax_loss_and_gradient.register_fake
def _(logits, labels, classes, ignored):
    return torch.empty(logits.shape[0], device=logits.device)
