"""A vocabulary whose size is no multiple of 8: in half precision the GPU's library takes five times as long for its product.

A vocabulary of 50,257 becomes one of 50,304 for the product, and the logits are those that belong to it: a view whose rows begin
at whole multiples of 128 bytes.
"""

import torch
import torch.nn.functional as F

from ...kernels.aligned_rows import ALIGNED, CLASS_MULTIPLE, aligned_rows
from ...kernels.conditions import dtypes_as_written, on_cuda, one_dtype, plain, untransformed
from ...kernels.fast_paths import FastPath
from ...kernels.tracing import records_gradients

FEWEST_ROWS = 256  # with fewer, the product is the reading of the weight


class PaddedLinear(torch.autograd.Function):
    """`linear(x, weight, bias)` for x (B, T, d) as a view with gaps between its rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        classes = weight.shape[0]
        more = -classes % CLASS_MULTIPLE
        bias = None if bias is None else F.pad(bias, [0, more])
        return F.linear(x, F.pad(weight, [0, 0, 0, more]), bias)[..., :classes]

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        classes, width = weight.shape
        grad = aligned_rows(grad.reshape(-1, classes))
        whole = classes - classes % ALIGNED  # the sum over classes begins with as many as the library likes
        dx = grad[:, :whole] @ weight[:whole]
        dx.addmm_(grad[:, whole:], weight[whole:])
        dweight = grad.mT @ x.reshape(-1, width) if ctx.needs_input_grad[1] else None
        return dx.view(x.shape), dweight, grad.sum(0) if ctx.needs_input_grad[2] else None


def _is_training(linear, hidden_states) -> bool:
    return records_gradients()


def _covers(linear, hidden_states) -> str | None:
    reason = on_cuda(hidden_states) or plain(linear) or untransformed(hidden_states)
    return (
        reason
        or dtypes_as_written(hidden_states)
        or one_dtype(hidden_states, linear.weight)
        or _pays(linear, hidden_states)
    )


def _pays(linear, hidden_states) -> str | None:
    rows = hidden_states.numel() // hidden_states.shape[-1]
    if linear.out_features % ALIGNED == 0 or hidden_states.dtype == torch.float32 or rows < FEWEST_ROWS:
        return f"it pays for {FEWEST_ROWS} tokens or more in half precision, and a vocabulary that is no multiple of {ALIGNED}"
    return None


def _run(linear, hidden_states):
    return PaddedLinear.apply(hidden_states, linear.weight, linear.bias)


VOCABULARY = (FastPath("a vocabulary made longer for the product", _run, _covers, _is_training, backend="torch"),)
