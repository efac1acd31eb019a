"""Cross-entropy over a vocabulary in two buffers instead of four.

PyTorch's own keeps the log-probabilities beside the logits, and both once more in float32 when the logits are in half precision.
Here only one number a row is kept for backward; on a CPU the rows are read in blocks that stay in the processor's cache, on a
GPU by a kernel that reads each row once forward and once backward.
"""

import torch
import torch.nn.functional as F

from .backend import runs_triton
from .compat import is_transformed
from .vocabulary_logits import ALIGNED, CLASS_MULTIPLE
from .windowed_mean import compute_dtype

IGNORED = -100
# Logits in a block: few enough for a CPU's cache, and on a GPU enough for its memory to be busy.
BLOCK_ON_CPU = 2**20
BLOCK_ON_GPU = 2**27


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not -100, computed in at least float32.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`).
        labels (`torch.LongTensor` of shape `(N,)`): -100 is ignored.
        count (`int` or `torch.Tensor`, *optional*): divide by this instead of the number of labels (gradient accumulation).

    Returns:
        `torch.Tensor`: a scalar, at least float32; 0, with gradients of 0, where nothing is to be predicted, whatever `count` is.
    """
    if torch.compiler.is_compiling() or type(logits) is not torch.Tensor or is_transformed(logits):
        # The compiler fuses the passes itself; tensor subclasses and function transforms know PyTorch's own operator only.
        total = F.cross_entropy(logits.to(compute_dtype(logits.dtype)), labels, ignore_index=IGNORED, reduction="sum")
    else:
        total = _BlockwiseCrossEntropy.apply(logits, labels)
    return _mean(total, labels, count)


def or_one(count: int | torch.Tensor) -> int | torch.Tensor:
    """A number to divide by: 1 in place of 0, without a look at what lies on a device."""
    return count + (count == 0)


def batch_share(mean: torch.Tensor, labels: torch.Tensor, count: int | torch.Tensor | None) -> torch.Tensor:
    """What a batch's `mean` over its `labels` (-100: none) adds to the mean over the `count` labels of several batches."""
    if count is None:
        return mean
    own = or_one((labels != IGNORED).sum()).to(mean.device, compute_dtype(mean.dtype))
    return mean * (own / or_one(_beside(mean, count)))


def _mean(total, labels, count):
    if count is None:
        count = (labels != IGNORED).sum()
    return total / or_one(_beside(total, count))


def _beside(value, count):
    return count.to(value.device) if isinstance(count, torch.Tensor) else count


class _BlockwiseCrossEntropy(torch.autograd.Function):
    """Sum over the rows; keeps the logits themselves and the logarithm of each row's partition function."""

    @staticmethod
    def forward(ctx, logits, labels):
        dtype = compute_dtype(logits.dtype)
        real = labels != IGNORED
        chosen = labels.where(real, 0)[:, None]
        if runs_triton(logits, _kernel_obstacle(logits)):
            from .cross_entropy_triton import softmax_loss

            losses, log_partition = softmax_loss(_dense_rows(logits), labels, IGNORED)
            ctx.save_for_backward(logits, chosen, real, log_partition)
            return losses.sum()
        log_partition = torch.cat(
            [rows.to(dtype).logsumexp(-1) for rows in logits.split(_rows(logits.shape[1], logits.is_cuda))]
        )
        ctx.save_for_backward(logits, chosen, real, log_partition)
        return (log_partition - logits.gather(1, chosen)[:, 0].to(dtype)).where(real, 0.0).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, chosen, real, log_partition = ctx.saved_tensors
        dtype = compute_dtype(logits.dtype)
        scale = (grad * real)[:, None]
        if torch.is_grad_enabled():  # create_graph=True: the gradient must have one itself
            one = torch.ones_like(chosen, dtype=dtype)
            return (logits.to(dtype).softmax(-1).scatter_add(1, chosen, -one) * scale).to(logits.dtype), None
        if runs_triton(logits, _kernel_obstacle(logits)):
            from .cross_entropy_triton import softmax_gradient

            return softmax_gradient(_dense_rows(logits), chosen[:, 0], log_partition, scale[:, 0], IGNORED), None
        result = torch.empty_like(logits)
        size = _rows(logits.shape[1], logits.is_cuda)
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


def _kernel_obstacle(logits: torch.Tensor) -> str | None:
    """Why the kernel cannot read these logits, or None."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {logits.dtype}"
    return None


def _dense_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _rows(vocabulary: int, is_cuda: bool) -> int:
    """Rows of a block."""
    return max(1, (BLOCK_ON_GPU if is_cuda else BLOCK_ON_CPU) // vocabulary)


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
    total = _LinearCrossEntropy.apply(hidden_states, weight, bias, labels)
    return _mean(total, labels, count)


def _loss_and_gradient(logits, labels, classes, dtype, wants_gradient):
    """The sum of the losses in `dtype`, and its gradient in the dtype of the logits (N, V or more), which it may replace."""
    if runs_triton(logits, _kernel_obstacle(logits)):
        from .cross_entropy_triton import softmax_loss, softmax_loss_and_gradient

        if wants_gradient:
            return softmax_loss_and_gradient(logits, labels, classes, IGNORED).sum(), logits
        return softmax_loss(logits[:, :classes], labels, IGNORED)[0].sum(), None
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


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over the rows; gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels):
        dtype = compute_dtype(hidden_states.dtype)
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            weight, bias = (None if x is None else x.to(torch.get_autocast_dtype(kind)) for x in (weight, bias))
        hidden_states = hidden_states.to(weight.dtype)
        wanted, classes = ctx.needs_input_grad, weight.shape[0]
        if classes % ALIGNED and runs_triton(hidden_states, _kernel_obstacle(hidden_states)):
            more = -classes % CLASS_MULTIPLE  # see `vocabulary_logits`
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
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "`fused_linear_cross_entropy=True` has no second derivatives, which `create_graph=True` asks for (a gradient "
                "penalty, a Hessian): its gradients are formed in forward, and the logits are gone. Set "
                "`model.config.fused_linear_cross_entropy = False`"
            )
        return *(None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors), None
