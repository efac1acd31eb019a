"""The feed-forward layer down(ReLU(x M)): the ReLU inside of a product, forward and backward, where it costs no pass over memory.

The inner activation is f times as wide as the model: a separate ReLU would read and write it once more, which takes a third of
the product's own time. Forward, a CUDA library's product takes it along. In front of the ReLU, a Triton kernel forms (G W) where
the activation is positive, and 0 elsewhere: its programs stay and go from tile to tile, so that the next tile's inputs are on
their way while this one's results are written. It saves a pass over the wide gradient; the product itself is a twentieth slower
than the library's.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.conditions import (
    dtypes_as_written,
    no_bias,
    on_cuda,
    plain,
    torch_not_asked_for,
    training_only,
    untransformed,
)
from ...kernels.dispatch import on_its_device, runs_triton
from ...kernels.fast_paths import FastPath
from ...kernels.second_derivatives import differentiable_gradients
from ...kernels.step_linear import step_feed_forward, step_linear
from ...kernels.tracing import is_traced, records_gradients
from ...kernels.triton_shim import TensorDescriptor, tl, triton

FEWEST_ROWS = 4096  # with fewer there are too few tiles for all processors
TILE_M, TILE_N, TILE_K, GROUP = 128, 256, 64, 8


@triton.jit
def _masked_product_kernel(
    grad_desc, weight_desc, active_ptr, out_desc, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # Tiles near each other in time share rows of G and columns of W, which the cache then holds.
        first = tile // (GROUP * tiles_n) * GROUP
        size = min(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        row, column = (first + within % size) * BM, within // size * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(tl.cdiv(K, BK)):
            total = tl.dot(grad_desc.load([row, k * BK]), weight_desc.load([k * BK, column]), total)
        # In halves, which need less shared memory.
        left, right = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        rows = row + tl.arange(0, BM).to(tl.int64)
        active = active_ptr + rows[:, None] * N + (column + tl.arange(0, BN // 2))[None, :]
        inside = rows[:, None] < M
        left = tl.where(tl.load(active, mask=inside, other=0.0) > 0, left, 0.0)
        out_desc.store([row, column], left.to(active_ptr.dtype.element_ty))
        right = tl.where(tl.load(active + BN // 2, mask=inside, other=0.0) > 0, right, 0.0)
        out_desc.store([row, column + BN // 2], right.to(active_ptr.dtype.element_ty))


@torch.library.custom_op("hf_linear_attn::masked_product", mutates_args=())
@on_its_device
def masked_product_kernel(grad: torch.Tensor, weight: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """G (M, K) W (K, N) where `active` (M, N) > 0; all contiguous in half precision, K a multiple of 64, N of 256."""
    (rows, depth), columns = grad.shape, weight.shape[1]
    out = torch.empty_like(active)
    descriptors = (
        TensorDescriptor.from_tensor(grad, [TILE_M, TILE_K]),
        TensorDescriptor.from_tensor(weight, [TILE_K, TILE_N]),
    )
    target = TensorDescriptor.from_tensor(out, [TILE_M, TILE_N // 2])
    tiles = triton.cdiv(rows, TILE_M) * (columns // TILE_N)
    programs = torch.cuda.get_device_properties(grad.device).multi_processor_count if grad.is_cuda else 2
    _masked_product_kernel[(min(tiles, programs),)](
        *descriptors, active, target, rows, columns, depth, BM=TILE_M, BN=TILE_N, BK=TILE_K, GROUP=GROUP,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@masked_product_kernel.register_fake
def _(grad, weight, active):
    return torch.empty_like(active)


def masked_product(grad: torch.Tensor, weight: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """G W (M, N) where `active` (M, N) is positive, 0 elsewhere."""
    if _is_faster(grad, weight) and runs_triton(grad, None):
        return masked_product_kernel(grad.contiguous(), weight.contiguous(), active.contiguous())
    return torch.ops.aten.threshold_backward(grad @ weight, active, 0)


def _is_faster(grad, weight) -> bool:
    """Whether the kernel takes this product, and the GPU has what it lives on (Hopper's tensor memory accelerator)."""
    half = grad.dtype in (torch.bfloat16, torch.float16)
    whole_tiles = weight.shape[0] % TILE_K == 0 and weight.shape[1] % TILE_N == 0
    if is_traced() or not half or not whole_tiles or grad.shape[0] < FEWEST_ROWS:
        return False
    return not grad.is_cuda or torch.cuda.get_device_capability(grad.device) >= (9, 0)


@torch.library.custom_op("hf_linear_attn::relu_product", mutates_args=())
def _relu_product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(*x.shape[:-1], matrix.shape[-1])
    bias = x.new_zeros(matrix.shape[-1])
    # The library's product with an epilogue takes one matrix at a time; rows of a batch with a matrix each are long.
    parts = [(x.flatten(0, -2), matrix, out.flatten(0, -2))] if matrix.dim() == 2 else zip(x, matrix, out)
    for rows, weight, result in parts:
        torch.ops.aten._addmm_activation.out(bias, rows, weight, out=result)
    return out


@_relu_product.register_fake
def _(x, matrix):
    return x.new_empty(*x.shape[:-1], matrix.shape[-1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx, grad):
    x, matrix, out = ctx.saved_tensors
    return _product_gradients(torch.ops.aten.threshold_backward(grad, out, 0), x, matrix, ctx.needs_input_grad)


def _product_gradients(grad, x, matrix, wanted):
    """Gradients of x and M, where wanted, from that of the product x M."""
    grad_x = grad @ matrix.mT if wanted[0] else None
    if not wanted[1]:
        return grad_x, None
    if matrix.dim() == 2:
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    return grad_x, (grad.mT @ x).mT  # laid out as the weight whose transpose the matrix is


_relu_product.register_autograd(_differentiate, setup_context=_save)


def relu_product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """max(x M, 0) for x (..., n, d) and M (d, f), or x (B, n, d) and M (B, d, f): a matrix for each row of the batch.

    Same dtype as the inputs; equal to `torch.relu(x @ matrix)` and its gradients, to rounding.
    """
    if x.dtype == matrix.dtype and (on_cuda(x) or torch_not_asked_for() or dtypes_as_written(x)) is None:
        return _relu_product(x, matrix)
    return torch.relu_(x @ matrix)  # a product needs no output for backward


class _ReluFeedForward(torch.autograd.Function):
    """Keeps its input and the wide activation."""

    @staticmethod
    def forward(ctx, x, matrix, down):
        inner = relu_product(x, matrix)
        ctx.save_for_backward(x, matrix, down, inner)
        return F.linear(inner, down)

    @staticmethod
    def backward(ctx, grad):
        x, matrix, down, inner = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must have one itself
            return differentiable_gradients(_formula, (x, matrix, down), ctx.needs_input_grad, grad)
        rows, wide = grad.flatten(0, -2), inner.flatten(0, -2)
        ddown = rows.mT @ wide if ctx.needs_input_grad[2] else None
        dinner = masked_product(rows, down, wide).view(inner.shape)
        return *_product_gradients(dinner, x, matrix, ctx.needs_input_grad), ddown


def _formula(x, matrix, down):
    return F.linear(torch.relu(x @ matrix), down)


def relu_feed_forward(x: torch.Tensor, matrix: torch.Tensor, down: nn.Module) -> torch.Tensor:
    """`down(relu_product(x, matrix))`, arguments as there; in training on a GPU as one step with a backward of its own."""
    reason = (
        on_cuda(x)
        or torch_not_asked_for()
        or training_only()
        or plain(down)
        or no_bias(down)
        or untransformed(x)
        or dtypes_as_written(x)
    )
    if reason is None and down.weight.dtype == x.dtype:
        return _ReluFeedForward.apply(x, matrix, down.weight)
    return down(relu_product(x, matrix))


def feed_forward_of_product(mlp, hidden_states: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """A `DanetMLP` for x (B, T, d) whose first layer multiplies it with `product`: (B, d, width of that layer)."""
    dropout, down = mlp.dropout, mlp.down_proj
    drops = mlp.training and dropout.p > 0
    if not mlp.gated and not drops:
        return dropout(relu_feed_forward(hidden_states, product, down))
    return dropout(down(dropout(mlp.activate(hidden_states @ product))))


def _run(mlp, hidden_states) -> torch.Tensor:
    if mlp.training and mlp.dropout.p > 0:
        return mlp.dropout(mlp.down_proj(mlp.dropout(torch.relu_(mlp.up_proj(hidden_states)))))
    return mlp.dropout(relu_feed_forward(hidden_states, mlp.up_proj.weight.t(), mlp.down_proj))


def _suits(mlp, hidden_states) -> bool:
    return not mlp.gated and (hidden_states.shape[1] > 1 or mlp.training)


def _covers(mlp, hidden_states) -> str | None:
    return plain(mlp.up_proj) or no_bias(mlp.up_proj)


RELU = FastPath("ReLU inside of its product", run=_run, covers=_covers, suits=_suits, backend="torch", traceable=True)


def _step(mlp, hidden_states) -> torch.Tensor:
    if mlp.gated:
        inner = mlp.activate(step_linear(mlp.gate_up_proj, hidden_states))
        return mlp.dropout(step_linear(mlp.down_proj, mlp.dropout(inner)))
    return step_feed_forward(mlp.up_proj, mlp.down_proj, hidden_states)


def _is_step(mlp, hidden_states) -> bool:
    return hidden_states.shape[1] == 1 and (mlp.gated or not mlp.training) and not records_gradients()


def _nothing_more(mlp, hidden_states) -> None:
    """`step_linear` asks for each layer itself."""


STEP_FEED_FORWARD = FastPath("one token: each weight is read once", run=_step, covers=_nothing_more, suits=_is_step)
