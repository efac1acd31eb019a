"""Softmax cross-entropy over a vocabulary in two buffers instead of four, and without its logits.

PyTorch's own keeps the log-probabilities beside the logits, and both once more in float32 when the logits are in half precision.
Here only one number a row is kept for backward; on a CPU the rows are read in blocks that stay in the processor's cache, on a
GPU by a kernel that reads each row once forward and once backward. The kernel gives the loss, its gradient, or both in one go:

    loss = log sum_j exp(x_j) - x_label         gradient = weight (exp(x_j - log sum exp(x)) - [j = label])

A program does one row, in pieces that registers hold. Loss and gradient together read a row twice, the second time out of the
cache, and write it once: the gradient takes the place of the logits. Sums are float32. A label that is no class gives NaN.
"""

import torch
import torch.nn.functional as F

from .aligned_rows import ALIGNED, CLASS_MULTIPLE, rows_apart
from .conditions import NextPath, kernel_dtype, untransformed
from .dispatch import on_its_device
from .fast_paths import FastPath, fast_paths
from .tracing import converts, product_dtype, records_gradients
from .triton_shim import tl, triton

IGNORED = -100  # the label of a row without a target
PIECE = 4096
# Logits in a block: few enough for a CPU's cache, and on a GPU enough for its memory to be busy.
BLOCK_ON_CPU = 2**20
BLOCK_ON_GPU = 2**27


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows(vocabulary: int, is_cuda: bool) -> int:
    """Rows of a block."""
    return max(1, (BLOCK_ON_GPU if is_cuda else BLOCK_ON_CPU) // vocabulary)


def _dense_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _with_graph(logits, chosen, scale):
    """The gradient of the weighted losses under `create_graph=True`: it must have a graph itself."""
    dtype = _wide(logits.dtype)
    one = torch.ones_like(chosen, dtype=dtype)
    return (logits.to(dtype).softmax(-1).scatter_add(1, chosen, -one) * scale).to(logits.dtype)


class _KernelCrossEntropy(torch.autograd.Function):
    """Sum over the rows; keeps the logits themselves and the logarithm of each row's partition function."""

    @staticmethod
    def forward(ctx, logits, labels):
        losses, log_partition = softmax_loss(_dense_rows(logits), labels, IGNORED)
        ctx.save_for_backward(logits, labels, log_partition)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad):
        logits, labels, log_partition = ctx.saved_tensors
        real = labels != IGNORED
        chosen, scale = labels.where(real, 0), grad * real
        if records_gradients():
            return _with_graph(logits, chosen[:, None], scale[:, None]), None
        return softmax_gradient(_dense_rows(logits), chosen, log_partition, scale, IGNORED), None


class _BlockwiseCrossEntropy(torch.autograd.Function):
    """As `_KernelCrossEntropy`, in PyTorch's operations on blocks of rows."""

    @staticmethod
    def forward(ctx, logits, labels):
        dtype, size = _wide(logits.dtype), _rows(logits.shape[1], logits.is_cuda)
        real = labels != IGNORED
        chosen = labels.where(real, 0)[:, None]
        log_partition = torch.cat([rows.to(dtype).logsumexp(-1) for rows in logits.split(size)])
        ctx.save_for_backward(logits, chosen, real, log_partition)
        return (log_partition - logits.gather(1, chosen)[:, 0].to(dtype)).where(real, 0.0).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, chosen, real, log_partition = ctx.saved_tensors
        dtype, size = _wide(logits.dtype), _rows(logits.shape[1], logits.is_cuda)
        scale = (grad * real)[:, None]
        if records_gradients():
            return _with_graph(logits, chosen, scale), None
        result = torch.empty_like(logits)
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


def _ordinary(logits, labels) -> NextPath | None:
    """Tensor subclasses and function transforms know PyTorch's own operator only."""
    if type(logits) is not torch.Tensor:
        return NextPath(f"the logits are a {type(logits).__name__}, which knows PyTorch's own operators only")
    reason = untransformed(logits)
    return None if reason is None else NextPath(reason)


def _covers_kernel(logits, labels) -> str | None:
    return _ordinary(logits, labels) or kernel_dtype(logits)


# For `(logits (N, V), labels (N,))`; a compiler fuses the passes itself.
SUMMED_LOSS = (
    FastPath("a kernel that keeps one number a row", _KernelCrossEntropy.apply, _covers_kernel),
    FastPath("blocks of rows, keeping one number a row", _BlockwiseCrossEntropy.apply, _ordinary, backend="torch"),
)


def _loss_and_gradient_kernel(logits, labels, classes, dtype, wants_gradient):
    if wants_gradient:
        return softmax_loss_and_gradient(logits, labels, classes, IGNORED).sum(), logits
    return softmax_loss(logits[:, :classes], labels, IGNORED)[0].sum(), None


_ONE_KERNEL = FastPath("loss and gradient in one kernel", _loss_and_gradient_kernel, kernel_dtype, traceable=True)


@fast_paths(_ONE_KERNEL)
def _loss_and_gradient(logits, labels, classes, dtype, wants_gradient):
    """The sum of the losses in `dtype`, and its gradient in the dtype of the logits (N, V or more), which it may replace."""
    real = labels != IGNORED
    chosen = labels.where(real, 0)[:, None]
    wide = logits.to(dtype)
    log_partition = wide.logsumexp(-1, keepdim=True)
    total = (log_partition - wide.gather(1, chosen))[:, 0].where(real, 0.0).sum()
    if not wants_gradient:
        return total, None
    one = torch.ones_like(chosen, dtype=dtype)
    grad = wide.sub_(log_partition).exp_().scatter_add_(1, chosen, -one).mul_(real[:, None])
    return total, grad.to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over the rows of the loss of `linear(hidden_states (N, d), weight (V, d), bias)`; no logits are kept.

    Gradients are made in forward, a block of rows at a time, and scaled in backward.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels):
        dtype = _wide(hidden_states.dtype)
        if converts(hidden_states):
            weight, bias = (None if x is None else x.to(product_dtype(hidden_states)) for x in (weight, bias))
        hidden_states = hidden_states.to(weight.dtype)
        wanted, classes = ctx.needs_input_grad, weight.shape[0]
        if classes % ALIGNED and _ONE_KERNEL.takes(hidden_states):
            more = -classes % CLASS_MULTIPLE  # see `padded_vocabulary`
            weight, bias = F.pad(weight, [0, 0, 0, more]), None if bias is None else F.pad(bias, [0, more])
        grad_hidden = torch.empty_like(hidden_states) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] else None
        total = hidden_states.new_zeros((), dtype=dtype)
        size = _rows(classes, hidden_states.is_cuda)
        for start in range(0, hidden_states.shape[0], size):
            rows, targets = hidden_states[start : start + size], labels[start : start + size]
            logits = F.linear(rows, weight, bias)
            losses, grad = _loss_and_gradient(logits, targets, classes, dtype, any(wanted[:3]))
            total = total + losses
            if wanted[2]:
                grad_bias += grad.sum(0, dtype=dtype)
            if wanted[0]:
                torch.mm(grad, weight, out=grad_hidden[start : start + size])
            if wanted[1]:
                grad_weight += grad.t() @ rows
        ctx.save_for_backward(grad_hidden, *(None if x is None else x[:classes] for x in (grad_weight, grad_bias)))
        return total

    @staticmethod
    def backward(ctx, grad):
        if records_gradients():  # create_graph=True
            raise RuntimeError(
                "`fused_linear_cross_entropy=True` has no second derivatives, which `create_graph=True` asks for (a gradient "
                "penalty, a Hessian): its gradients are formed in forward, and the logits are gone. Set "
                "`model.config.fused_linear_cross_entropy = False`"
            )
        return *(None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors), None
