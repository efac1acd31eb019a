"""Triton kernels of SEA: the same cells as the sort, and attention and gradients as accurate as plain PyTorch."""

import copy

import pytest
import torch
from gpu.device import DEVICE, DTYPES, INTERPRETED, assert_as_accurate, needs_gpu, needs_kernels, poison, sizes

from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.sea.cells import select_cells
from hf_linear_attn.modeling.sea.estimator import narrow_layer_norm
from hf_linear_attn.modeling.sea.kernel_attention import causal_kernel_attention
from hf_linear_attn.modeling.sea.sparse_attention import chunked_sparse_attention, dense_sparse_attention, grow_cells

pytestmark = needs_kernels


def case(length, head=16, heads=4, groups=2, cells=16, causal=True, dtype=torch.float32, batch=None):
    if INTERPRETED:  # an interpreted program takes milliseconds: half as many heads, in one row
        heads, groups, batch = heads // 2, groups // 2, 1
    batch = batch or 2
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    inputs = [draw(batch, heads, length, head), *(draw(batch, groups, length + 3, head) for _ in range(2))]
    seen = torch.arange(length) + 1 if causal else torch.full((length,), length)
    seen = seen.expand(batch, -1).contiguous().to(DEVICE)
    chosen = torch.rand(batch, heads, length, cells, generator=generator).to(DEVICE) < 0.3
    chosen[:, :, length // 2] = False  # a row that keeps nothing
    return inputs, chosen, seen


@pytest.fixture(params=["tiles", "keys"])
def form(request, monkeypatch):
    """Short rows run in tiles of pairs, long ones key by key: both forms on the small cases."""
    if request.param == "keys":
        monkeypatch.setattr("hf_linear_attn.modeling.sea.kernels.sparse_attention.TILED_KEYS", 0)


def attend(backend, inputs, chosen, seen, limit, slots):
    inputs = [x.detach().requires_grad_() for x in inputs]
    poison(4 * inputs[0].numel())
    with use_backend(backend):
        out = chunked_sparse_attention(*inputs, chosen, seen, 0.3, limit, slots)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    return out.detach(), *(x.grad for x in inputs)


def compare(inputs, chosen, seen, limit=None, slots=None):
    exact = attend("torch", [x.double() for x in inputs], chosen, seen, limit, slots)
    plain = attend("torch", inputs, chosen, seen, limit, slots)
    ours = attend("triton", inputs, chosen, seen, limit, slots)
    assert_as_accurate(ours, plain, exact, ("output", "query gradient", "key gradient", "value gradient"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", sizes([1, 2, 15], [63, 64, 65, 500, 1000]))
def test_lengths(length, causal, dtype, form):
    inputs, chosen, seen = case(length, causal=causal, dtype=dtype)
    compare(inputs, chosen, seen, limit=4 if length < 60 else 64)


@pytest.mark.parametrize("head", sizes([16], [60, 64, 100, 128]))
@pytest.mark.parametrize("limit", [None, 3, 1])
def test_head_sizes_and_limits(head, limit, form):
    compare(*case(20, head), limit=limit)


@pytest.mark.interpreted
def test_slots_of_a_cache():
    inputs, chosen, seen = case(18)
    slots = torch.stack([torch.randperm(21)[:18] for _ in range(2)]).to(DEVICE)
    compare(inputs, chosen, seen, limit=4, slots=slots)


@pytest.mark.parametrize("cells", [16, 40, 100])
def test_numbers_of_cells(cells):
    """A word of the tiles' choice holds 32."""
    compare(*case(20, cells=cells))


@needs_gpu
def test_long():
    inputs, chosen, seen = case(16384, 64, heads=2, cells=64, batch=1, dtype=torch.bfloat16)
    compare(inputs, chosen & (torch.rand_like(inputs[0][..., :1]) < 0.05), seen, limit=64)


def test_agrees_with_the_definition():
    inputs, chosen, seen = case(20, groups=4)
    keys, values = (x[:, :, :20] for x in inputs[1:])
    expected, _ = dense_sparse_attention(inputs[0], keys, values, grow_cells(chosen, seen, 20, 4), 0.3)
    with use_backend("triton"):
        ours = chunked_sparse_attention(inputs[0], keys, values, chosen, seen, 0.3, 4)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("group", ["causal_batch", "query"])
@pytest.mark.parametrize("length", sizes([1, 15], [500, 3000]))
@pytest.mark.interpreted("1-query")
def test_the_same_cells_as_the_sort(length, group):
    generator = torch.Generator().manual_seed(length)
    # Rounded, so that many entries are equal: ties go to the smaller index.
    probs = (torch.randn(2, 3, length, 16, generator=generator) * 2).round().softmax(-1).to(DEVICE)
    seen = (torch.arange(length) + 1).expand(2, -1).contiguous().to(DEVICE)
    keep = (torch.rand(2, length, generator=generator) < 0.8).to(DEVICE)
    for mask in (None, keep):
        with use_backend("torch"):
            expected = select_cells(probs, seen, 4, group, mask)
        poison(probs.numel())
        with use_backend("triton"):
            assert torch.equal(select_cells(probs, seen, 4, group, mask), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 60), (300, 16), (5, 256)])
@pytest.mark.interpreted
def test_narrow_layer_norm(rows, width, dtype):
    generator = torch.Generator().manual_seed(width)
    norm = torch.nn.LayerNorm(width)
    torch.nn.init.normal_(norm.weight, generator=generator)
    norm.to(DEVICE)
    x = (torch.randn(2, rows, width, generator=generator) + 3).to(DEVICE)

    def run(backend, dtype, inputs):
        made, given = copy.deepcopy(norm).to(dtype), inputs.to(dtype).requires_grad_()
        poison(2 * given.numel())
        with use_backend(backend):
            out = narrow_layer_norm(made, given)
        out.backward(torch.linspace(-1, 2, out.numel(), device=DEVICE).view_as(out).to(dtype))
        return out.detach(), given.grad, made.weight.grad, made.bias.grad

    x = x.to(dtype).float()
    with torch.no_grad():
        norm.weight.copy_(norm.weight.to(dtype))
    exact = run("torch", torch.float64, x)
    assert_as_accurate(run("triton", dtype, x), run("torch", dtype, x), exact, ("output", "gradient", "weight", "bias"))


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("size", sizes([(2, 5, 16), (70, 33, 16)], [(500, 33, 64), (300, 100, 80)]), ids=str)
@pytest.mark.interpreted(r"\(2, 5, 16\)-False")
def test_causal_kernel_attention(size, continued):
    """Numerators and the sum of features, all gradients, and the state that goes on."""
    length, features, width = size
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.rand(2, 3, length, features, generator=generator).to(DEVICE) for _ in range(2))
    v = torch.randn(2, 2, 3, length, width, generator=generator).to(DEVICE)
    state = torch.rand(2, 3, features, 2 * width + 1, generator=generator).to(DEVICE) if continued else None

    def run(backend, dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in (q, k, *v)]
        past = None if state is None else state.to(dtype)
        poison(2 * v.numel())
        with use_backend(backend):
            out, new = causal_kernel_attention(
                given[0], given[1], (given[2][:, :1].expand(-1, 3, -1, -1), given[3]), past
            )
        out.backward(torch.linspace(-1, 1, out.shape[-1], device=DEVICE).to(dtype).expand_as(out))
        return out.detach(), new.detach(), *(x.grad for x in given)

    exact, plain = run("torch", torch.float64), run("torch", torch.float32)
    names = ("output", "state", "queries", "keys", "shared values", "values")
    assert_as_accurate(run("triton", torch.float32), plain, exact, names)
