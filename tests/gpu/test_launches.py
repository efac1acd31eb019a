"""Launches at the border of what a GPU and 32 bits hold: many rows, heads far apart in memory, inputs with gaps."""

import pytest
import torch
import torch.nn.functional as F
from gpu.device import DEVICE, needs_kernels

from hf_linear_attn.modeling.kernels.dispatch import use_backend

pytest.importorskip("triton")

from hf_linear_attn.modeling.danet.kernels import gram as gram_kernels
from hf_linear_attn.modeling.danet.kernels.between_blocks import between_blocks
from hf_linear_attn.modeling.kernels import causal_bilinear as dense_attention_triton
from hf_linear_attn.modeling.kernels.step_linear import step_linear
from hf_linear_attn.modeling.sea.kernels import sparse_attention as sparse_attention_triton
from hf_linear_attn.modeling.sea.kernels import sparse_tiles as sparse_tiles_triton
from hf_linear_attn.modeling.shared.cross_entropy import cross_entropy

pytestmark = [*needs_kernels, pytest.mark.interpreted]
LAST_AXES = 65535  # most programs along the second and third axis of a CUDA grid
MANY = LAST_AXES + 1


class Recorder:
    """Stands in for a kernel: notes the grid and runs nothing."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **flags: None


def bilinear():
    rows = torch.empty(MANY, 1, 1, 16, device=DEVICE)
    dense_attention_triton._causal_bilinear(rows, rows, rows, None, None, False)


def gram():
    gram_kernels._gram(torch.empty(MANY, 64, 128, dtype=torch.bfloat16, device=DEVICE))
    gram_kernels.add_transpose_(torch.empty(MANY, 1, 1, device=DEVICE))


def select():
    sparse_attention_triton._select_largest(torch.empty(MANY, 1, 1, 4), torch.ones(MANY, 1, dtype=torch.int32), None)


def tiles():
    q, cells = torch.empty(MANY, 1, 1, 16, device=DEVICE), torch.empty(MANY, 1, 1, 4, dtype=torch.bool, device=DEVICE)
    given = q, q, q, cells, torch.ones(MANY, 1, dtype=torch.long, device=DEVICE), 1.0
    out, log_sum = sparse_tiles_triton.tiled_attention(*given)
    sparse_tiles_triton.tiled_attention_backward(*given, out, log_sum, out)


@pytest.mark.parametrize("launch", [bilinear, gram, select, tiles], ids=lambda launch: launch.__name__)
def test_any_number_of_rows(launch, monkeypatch):
    """A row of a million tokens has thousands of windows, and a packed one thousands of documents: each is a row here."""
    grids = []
    for module in (dense_attention_triton, gram_kernels, sparse_attention_triton, sparse_tiles_triton):
        for name in [name for name in vars(module) if name.endswith("_kernel") and name.startswith("_")]:
            monkeypatch.setattr(module, name, Recorder(grids))
    launch()
    assert grids
    assert all(size <= LAST_AXES for grid in grids for size in grid[1:]), grids


def test_heads_far_apart():
    """The third of three heads begins 2^31 numbers after the first, as the 17th does at a million tokens of 128 features."""
    memory = torch.empty(2**31 + 4 * 16, dtype=torch.bfloat16, device=DEVICE)  # the system maps what is touched
    far = memory.as_strided((1, 4, 3, 16), (0, 16, 2**30, 1))
    far.copy_(torch.randn(far.shape, generator=torch.Generator().manual_seed(0)))
    near = far.clone(memory_format=torch.contiguous_format)
    for window in (None, 2):
        ours, plain = (dense_attention_triton.causal_bilinear(x, x, x, window)[0] for x in (far, near))
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("step", [1, 2])
def test_labels_with_gaps(step):
    logits, labels = torch.randn(5, 20, device=DEVICE), torch.arange(5 * step, device=DEVICE)[::step]
    with use_backend("triton"):
        torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels))


def test_a_transposed_weight():
    linear = torch.nn.Linear(32, 32, bias=False, device=DEVICE)
    linear.weight = torch.nn.Parameter(torch.randn(32, 32, device=DEVICE).T)
    x = torch.randn(2, 1, 32, device=DEVICE)
    with torch.no_grad(), use_backend("auto" if DEVICE == "cuda" else "torch"):
        expected = F.linear(x, linear.weight)
        torch.testing.assert_close(step_linear(linear, x), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), use_backend("triton"), pytest.raises(ValueError, match="more than a Linear with its weight"):
        step_linear(linear, x)


def test_a_stream_with_gaps():
    """The first stream is whatever the caller's embeddings are."""
    y, stream = torch.randn(2, 3, 16, device=DEVICE), torch.randn(2, 16, 3, device=DEVICE).mT
    dense = stream.contiguous()
    ours, plain = (between_blocks(y, x, None, None, None, 1e-3, 1e-3, False)[:2] for x in (stream, dense))
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
