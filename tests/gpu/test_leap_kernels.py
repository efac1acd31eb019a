"""Triton kernels of LEAP against float64: the error is at most twice that of plain PyTorch in the same dtype."""

import pytest
import torch
from gpu.device import DEVICE, DTYPES, assert_as_accurate, needs_gpu, needs_kernels, poison, sizes

from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.leap.mechanism import leap_mechanism

pytestmark = needs_kernels


def make(length, head=64, dtype=torch.float32, batch=2, heads=3, masked=False, packed=False):
    generator = torch.Generator().manual_seed(length + head)
    # Part of a larger tensor: the kernels must honour strides.
    projected = torch.randn(batch, length + 3, 4, heads, head, generator=generator).to(DEVICE, dtype)[:, 2:-1]
    arguments = {}
    if masked:
        arguments["mask"] = (torch.rand(batch, length, generator=generator) < 0.7).to(DEVICE)
    if packed:
        arguments["segment_ids"] = (torch.rand(batch, length, generator=generator) < 0.02).long().cumsum(1).to(DEVICE)
    return projected, arguments


def run(projected, window, arguments, rotated=False):
    projected = projected.detach().requires_grad_()
    turned = tuple(projected[:, :, i].flip(-1) for i in (0, 2)) if rotated else None
    out, _ = leap_mechanism(projected, window, rotated=turned, **arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(grad)
    return out.detach().double(), projected.grad.double()


def compare(projected, window, arguments, rotated=False):
    exact = run(projected.double(), window, arguments, rotated)
    with use_backend("torch"):
        plain = run(projected, window, arguments, rotated)
    with use_backend("triton"):
        poison(exact[1].numel() * 2)
        ours = run(projected, window, arguments, rotated)
    assert_as_accurate(ours, plain, exact, ("output", "gradient"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 4, 65])
@pytest.mark.parametrize("length", sizes([1, 2, 15, 65], [63, 64, 500, 1000]))
def test_lengths(length, window, dtype):
    projected, arguments = make(length, dtype=dtype)
    compare(projected, window, arguments)


@pytest.mark.parametrize("head", sizes([20], [16, 60, 64, 100, 128]))
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", sizes([torch.float32], [torch.bfloat16]), ids=str)
def test_head_sizes(dtype, window, head):
    projected, arguments = make(200 if DEVICE == "cuda" else 70, head, dtype)
    compare(projected, window, arguments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 4, 17])
@pytest.mark.parametrize("length", [2, 31, 70])
@pytest.mark.interpreted("70-4-True")
def test_near_windows_in_one_backward_kernel(length, window, packed, monkeypatch):
    """What bfloat16 takes by itself, in float32."""
    monkeypatch.setattr("hf_linear_attn.modeling.leap.kernels.mechanism.SMALL_DTYPES", (torch.float32,))
    projected, arguments = make(length, 16, packed=packed)
    compare(projected, window, arguments)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.interpreted("None-True-True-True")
def test_masks_documents_rotation(window, masked, packed, rotated):
    for length in (50, 333) if DEVICE == "cuda" else (70,):
        projected, arguments = make(length, masked=masked, packed=packed)
        compare(projected, window, arguments, rotated)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 8])
def test_long(window, dtype):
    projected, arguments = make(16384, dtype=dtype, batch=1, heads=2)
    compare(projected, window, arguments)


@needs_gpu
@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_states(window, masked, packed):
    projected, arguments = make(300, masked=masked, packed=packed)

    def go(part, state, backend, **arguments):
        with use_backend(backend):
            return leap_mechanism(part, window, initial_state=state, return_state=True, **arguments)

    first = {k: v[:, :177] for k, v in arguments.items()}
    second = {k: v[:, 177:] for k, v in arguments.items()}
    expected, state = go(projected[:, :177].double(), None, "torch", **first)
    ours, ours_state = go(projected[:, :177], None, "auto", **first)
    more, more_state = go(projected[:, 177:].double(), state, "torch", **second)
    ours_more, ours_more_state = go(projected[:, 177:], ours_state, "auto", **second)
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours_more.double(), more, atol=2e-5, rtol=1e-4)
    for mine, exact in zip((*ours_state, *ours_more_state), (*state, *more_state)):
        if mine.dim() == 5:  # places of a window that nothing was written to have no weight; their values do not count
            continue
        torch.testing.assert_close(mine.double(), exact, atol=1e-3, rtol=1e-4)


def test_dropout_is_the_same_forward_and_backward():
    """The gradient is that of the very entries that forward kept: compare with a numerical derivative along one direction."""
    projected, _ = make(100, 16, batch=1, heads=1)
    direction = torch.randn_like(projected)

    def loss(x):
        torch.manual_seed(3)
        out, _ = leap_mechanism(x, 8, dropout=0.3)
        return out.double().square().sum()

    with use_backend("triton"):
        x = projected.clone().requires_grad_()
        loss(x).backward()
        step = 1e-3
        numeric = (loss(projected + step * direction) - loss(projected - step * direction)) / (2 * step)
        analytic = (x.grad * direction).sum()
        dropped = (x.grad == 0).float().mean()
    assert abs(numeric - analytic) < 2e-2 * abs(numeric)
    assert 0.1 < dropped < 0.5


@needs_gpu
def test_compiles_as_one_graph():
    projected, _ = make(200, dtype=torch.bfloat16)
    compiled = torch.compile(run, fullgraph=False)
    with use_backend("triton"):
        expected = run(projected, 8, {})
        ours = compiled(projected, 8, {})
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
