"""Logits of a vocabulary whose size is no multiple of 8: in half precision the GPU's library takes five times as long for them.

A vocabulary of 50,257 becomes one of 50,304 for the product, and the logits are those that belong to it: a view whose rows begin
at whole multiples of 128 bytes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .compat import is_transformed
from .plain_layers import is_plain
from .step_linear import step_linear

ALIGNED, CLASS_MULTIPLE = 8, 64
FEWEST_ROWS = 256  # with fewer, the product is the reading of the weight


def vocabulary_logits(linear: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`linear(hidden_states)` for (B, T, d); on a GPU in training possibly a view with gaps between its rows."""
    if not _pays(linear, hidden_states):
        logits = step_linear(linear, hidden_states)
        lost = _lost_bias(linear, hidden_states)
        return logits if lost is None else logits + lost
    return _PaddedLinear.apply(hidden_states, linear.weight, linear.bias)


def _lost_bias(linear, hidden_states) -> torch.Tensor | None:
    """What a layer for some trained tokens leaves out: PEFT's (0.21), tied to the embedding, multiplies without the bias."""
    wrapped = getattr(getattr(linear, "token_adapter", None), "base_layer", None)
    bias = getattr(wrapped, "bias", None)
    if bias is None:
        return None
    return bias - linear(hidden_states.new_zeros(1, hidden_states.shape[-1]))


def _pays(linear, hidden_states) -> bool:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not hidden_states.is_cuda:
        return False
    if not is_plain(linear) or linear.out_features % ALIGNED == 0 or is_transformed(hidden_states):
        return False
    rows, dtype = hidden_states.numel() // hidden_states.shape[-1], hidden_states.dtype
    half = dtype in (torch.bfloat16, torch.float16) and dtype == linear.weight.dtype
    return half and rows >= FEWEST_ROWS and not torch.is_autocast_enabled("cuda")


class _PaddedLinear(torch.autograd.Function):
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


def aligned_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (N, V) itself if its rows begin at aligned places, otherwise a copy whose rows do."""
    if matrix.stride(1) == 1 and matrix.stride(0) % ALIGNED == 0:
        return matrix
    return rows_apart(matrix).copy_(matrix)


def rows_apart(matrix: torch.Tensor) -> torch.Tensor:
    """An empty matrix of the same shape, dtype and device whose rows begin at aligned places."""
    rows, classes = matrix.shape
    return matrix.new_empty(rows, classes + -classes % CLASS_MULTIPLE)[:, :classes]
