"""LayerNorm and a linear layer that keep no normed rows: outputs and all gradients against float64."""

import copy

import pytest
import torch
from gpu.device import DEVICE, DTYPES, assert_as_accurate, needs_gpu, needs_kernels, poison
from torch import nn

from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.kernels.normed_linear import normed_linear, normed_linear_covers

pytestmark = [*needs_kernels, pytest.mark.interpreted]
NAMES = ("stream", "output", "input", "norm weight", "norm bias", "weight", "bias")


def run(layers, backend, x, dtype, compiled=False):
    norm, linear = (copy.deepcopy(layer).to(dtype) for layer in layers)
    x = x.detach().clone().to(dtype).requires_grad_()

    def forward(x):
        if backend == "torch":
            return x, linear(norm(x))
        assert normed_linear_covers(norm, linear, linear, x) is None
        return normed_linear(norm, linear, x)

    poison(8 * x.numel())
    with use_backend(backend):
        outputs = (torch.compile(forward, fullgraph=True) if compiled else forward)(x)
    grads = [torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(dtype) for out in outputs]
    torch.autograd.backward(outputs, grads)
    return *(out.detach() for out in outputs), x.grad, *(p.grad for layer in (norm, linear) for p in layer.parameters())


def make(rows, width, dtype):
    torch.manual_seed(0)
    layers = nn.LayerNorm(width).to(DEVICE), nn.Linear(width, 3 * width).to(DEVICE)
    for parameter in (layers[0].weight, layers[0].bias):
        nn.init.normal_(parameter)
    layers = tuple(layer.to(dtype).float() for layer in layers)
    return layers, (1 + 3 * torch.randn(2, rows, width, device=DEVICE)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (70, 24), *[pytest.param(1000, 768, marks=needs_gpu)]])
def test_norm_and_linear(rows, width, dtype):
    layers, x = make(rows, width, dtype)
    exact, plain = run(layers, "torch", x, torch.float64), run(layers, "torch", x, dtype)
    assert_as_accurate(run(layers, "triton", x, dtype), plain, exact, NAMES)


@needs_gpu
def test_compiled():
    """In half precision alone: what a compiler adds up in float32 is less accurate than PyTorch's own sums."""
    layers, x = make(500, 768, torch.bfloat16)
    exact, plain = run(layers, "torch", x, torch.float64), run(layers, "torch", x, torch.bfloat16)
    assert_as_accurate(run(layers, "triton", x, torch.bfloat16, compiled=True), plain, exact, NAMES)


@needs_gpu
def test_wide_rows():
    layers, x = make(20, 8192, torch.float32)
    exact, plain = run(layers, "torch", x, torch.float64), run(layers, "torch", x, torch.float32)
    assert_as_accurate(run(layers, "triton", x, torch.float32), plain, exact, NAMES)


def test_what_is_more_than_its_weights_runs_by_itself():
    """A hook sees its layer called."""
    norm, linear = nn.LayerNorm(16).to(DEVICE), nn.Linear(16, 16).to(DEVICE)
    x = torch.randn(1, 3, 16, device=DEVICE)
    owner = nn.Sequential(linear)
    assert normed_linear_covers(norm, linear, owner, x) is None
    for layer in (owner, norm, linear):
        hook = layer.register_forward_hook(lambda *arguments: None)
        assert f"hook is registered on {type(layer).__name__}" in normed_linear_covers(norm, linear, owner, x)
        hook.remove()
