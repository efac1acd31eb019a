"""(G W) where an activation is positive, and 0 elsewhere, as a Triton kernel: the gradient in front of a ReLU in one product.

Programs stay and go from tile to tile, so that the next tile's inputs are on their way while this one's results are written.
What it saves is a pass over the wide gradient; the product itself is a twentieth slower than the library's.
"""

import torch

try:  # inside `try`, since loading a checkpoint's own code demands every other import, also where there is no GPU
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError("the GPU kernels need the package triton: pip install triton") from error

from .backend import on_its_device

TILE_M, TILE_N, TILE_K, GROUP = 128, 256, 64, 8


@triton.jit
def _kernel(
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
    _kernel[(min(tiles, programs),)](
        *descriptors, active, target, rows, columns, depth, BM=TILE_M, BN=TILE_N, BK=TILE_K, GROUP=GROUP,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


@masked_product_kernel.register_fake
def _(grad, weight, active):
    return torch.empty_like(active)
