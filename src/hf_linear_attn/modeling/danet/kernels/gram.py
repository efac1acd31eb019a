"""X^T X of the rows of a batch as a Triton kernel: it is symmetric, so half of its tiles are computed and stored twice.

The K^T V of DenseAttention where keys and values are the same tensor. Products in the input's dtype, sums in float32.
"""

import torch

from ...kernels.conditions import NextPath, at_most, dtypes_as_written
from ...kernels.dispatch import on_its_device, runs_triton
from ...kernels.fast_paths import FastPath
from ...kernels.triton_shim import tl, triton
from ..layouts import heads_first

SHORTEST_WIDTH = 512  # below it there are too few tiles in the triangle to gain from the half
LONGEST_SUM = 16384  # above it the library, which splits the sum among processors, is faster
TILE, STEP = 128, 64
SQUARE = 64  # side of the tiles of a transposed sum


@triton.jit
def _triangle(tiles):
    """Matrix of a program (64 bits) and its tile (i, j): number i (i + 1) / 2 + j of the `tiles` of the lower triangle."""
    tile = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)  # off by one at most
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    return (tl.program_id(0) // tiles).to(tl.int64), i, tile - i * (i + 1) // 2


@triton.jit
def _add_transpose_kernel(x_ptr, tiles, d, SQUARE: tl.constexpr):
    """X + x^T in the place of x (d, d): a program reads and writes a tile and its mirror image."""
    b, i, j = _triangle(tiles)
    x_ptr += b * d * d
    rows, columns = i * SQUARE + tl.arange(0, SQUARE), j * SQUARE + tl.arange(0, SQUARE)
    here = rows[:, None] * d + columns[None, :]
    there = columns[:, None] * d + rows[None, :]
    inside = (rows[:, None] < d) & (columns[None, :] < d)
    mirrored = (columns[:, None] < d) & (rows[None, :] < d)
    tile = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    image = tl.load(x_ptr + there, mask=mirrored, other=0.0).to(tl.float32)
    total = (tile + tl.trans(image)).to(x_ptr.dtype.element_ty)
    tl.debug_barrier()  # on the diagonal the two are one tile
    tl.store(x_ptr + here, total, mask=inside)
    if i != j:
        tl.store(x_ptr + there, tl.trans(total), mask=mirrored)


@triton.jit
def _gram_kernel(x_ptr, out_ptr, tiles, T, d, TILE: tl.constexpr, STEP: tl.constexpr):
    b, i, j = _triangle(tiles)
    rows, columns, t = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
    left = x_ptr + b * T * d + t[:, None] * d + rows[None, :]
    right = x_ptr + b * T * d + t[:, None] * d + columns[None, :]
    sums = tl.zeros((TILE, TILE), tl.float32)
    for _ in range(0, T, STEP):
        sums = tl.dot(tl.trans(tl.load(left)), tl.load(right), sums)
        left += STEP * d
        right += STEP * d
    result = sums.to(out_ptr.dtype.element_ty)
    out_ptr += b * d * d
    tl.store(out_ptr + rows[:, None] * d + columns[None, :], result)
    if i != j:
        tl.store(out_ptr + columns[:, None] * d + rows[None, :], tl.trans(result))


@torch.library.custom_op("hf_linear_attn::add_transpose", mutates_args=("matrix",))
@on_its_device
def add_transpose_(matrix: torch.Tensor) -> None:
    """M + M^T in the place of M (B, d, d), contiguous."""
    n = triton.cdiv(matrix.shape[1], SQUARE)
    tiles = n * (n + 1) // 2
    _add_transpose_kernel[(tiles * matrix.shape[0],)](matrix, tiles, matrix.shape[1], SQUARE=SQUARE)


@torch.library.custom_op("hf_linear_attn::gram", mutates_args=())
@on_its_device
def _gram(x: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    out = x.new_empty(batch, width, width)
    n = width // TILE
    tiles = n * (n + 1) // 2
    _gram_kernel[(tiles * batch,)](x, out, tiles, length, width, TILE=TILE, STEP=STEP, num_warps=8, num_stages=3)
    return out


@_gram.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[2], x.shape[2])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    if torch.is_grad_enabled():  # create_graph=True: the gradient must have one itself
        return ctx.saved_tensors[0] @ (grad + grad.mT)
    grad = grad.clone(memory_format=torch.contiguous_format)
    add_transpose_(grad)
    return ctx.saved_tensors[0] @ grad


_gram.register_autograd(_differentiate, setup_context=_save)


def gram_kernel(x: torch.Tensor) -> torch.Tensor:
    """X^T X for x (B, T, d), T a multiple of 64 and d of 128: (B, d, d)."""
    return _gram(x.contiguous())


def gram(x: torch.Tensor) -> torch.Tensor:
    """X^T X of each head, (B, H, T, D) -> (B, H, D, D), products in the dtype of `x`."""
    if _reason(x) is None and runs_triton(x, None):
        return gram_kernel(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x.transpose(-1, -2) @ x


def with_transpose(matrix: torch.Tensor) -> torch.Tensor:
    """M + M^T for M (B, d, d) that nothing else needs: it may take the place of M."""
    if not runs_triton(matrix, "it sums in float32" if matrix.dtype == torch.float64 else None):
        return matrix + matrix.mT
    matrix = matrix.contiguous()
    add_transpose_(matrix)
    return matrix


def _reason(x: torch.Tensor) -> str | None:
    """Why the kernel cannot take x (B, H, T, D), or the library's product, of twice the operations, is faster; or None."""
    length, width = x.shape[2:]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16, not {x.dtype}"
    if not isinstance(length, int) or length % STEP or width % TILE or width < SHORTEST_WIDTH:
        return (
            f"it takes whole tiles: a multiple of {STEP} tokens, heads of a multiple of {TILE} from {SHORTEST_WIDTH} on"
        )
    return dtypes_as_written(x) or at_most("row", length, LONGEST_SUM)


def _run(query, key, value) -> torch.Tensor:
    query, key = heads_first(query), heads_first(key)
    return (query @ gram(key)).transpose(1, 2)


def _covers(query, key, value) -> str | None:
    reason = _reason(key.transpose(1, 2))
    return None if reason is None else NextPath(reason)  # the library's product is as good


def _suits(query, key, value) -> bool:
    return value is key


SYMMETRIC = FastPath("half of the symmetric K^T K", run=_run, covers=_covers, suits=_suits, traceable=True)
