"""The feed-forward layer that forms its activation again in backward: outputs and all gradients against float64."""

import copy

import pytest
import torch
from gpu.device import DEVICE, DTYPES, assert_as_accurate, needs_gpu, needs_kernels, poison, sizes
from torch import nn

from hf_linear_attn import LeapConfig, LeapModel
from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.leap.modeling_leap import LeapMLP

pytestmark = [*needs_kernels, pytest.mark.interpreted]
NAMES = ("output", "input", "up weight", "up bias", "down weight", "down bias")


def run(layer, backend, x, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    x = x.detach().clone().to(dtype).requires_grad_()
    poison(8 * x.numel())
    with use_backend(backend):
        out = layer(x)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(dtype))
    return out.detach(), x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (70, 24), *[pytest.param(1000, 256, marks=needs_gpu)]])
def test_feed_forward(rows, width, dtype):
    torch.manual_seed(0)
    layer = LeapMLP(LeapConfig(hidden_size=width, num_attention_heads=1, hidden_dropout_prob=0.0)).to(DEVICE)
    nn.init.normal_(layer.up_proj.bias)
    layer = layer.to(dtype).float()
    x = (3 * torch.randn(2, rows, width, device=DEVICE)).to(dtype)
    exact, plain = run(layer, "torch", x, torch.float64), run(layer, "torch", x, dtype)
    assert_as_accurate(run(layer, "triton", x, dtype), plain, exact, NAMES)


@pytest.mark.parametrize("dtype", sizes([], DTYPES), ids=str)
def test_all_values(dtype):
    """Every number from -12 to 12, without its neighbours' help: the error of GELU itself and of its derivative."""
    x = torch.linspace(-12, 12, 100_001, device=DEVICE).to(dtype)[:, None]
    from hf_linear_attn.modeling.kernels.gelu_linear import bias_gelu, bias_gelu_backward

    zero, ones = torch.zeros(1, device=DEVICE, dtype=dtype), torch.ones_like(x)
    wide = x.double().requires_grad_()
    expected = nn.functional.gelu(wide)
    expected.sum().backward()
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(bias_gelu(x, zero).double(), expected.detach(), atol=2e-6, rtol=2 * tolerance)
    _, again = bias_gelu_backward(x, zero, derivative := ones)
    torch.testing.assert_close(derivative.double(), wide.grad, atol=2e-6, rtol=2 * tolerance)
    assert torch.equal(again, bias_gelu(x, zero))


@needs_gpu
def test_a_compiled_model_forms_it_again():
    """Gradients of a compiled model are those of the eager one, and it keeps less than plain PyTorch does."""
    torch.manual_seed(0)
    size = {
        "vocab_size": 50,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
    }
    model = LeapModel(LeapConfig(**size, max_position_embeddings=2048)).to(DEVICE, torch.bfloat16)
    ids = torch.randint(0, 50, (4, 2048), device=DEVICE)

    def step(run, backend):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with use_backend(backend):
            out = run(ids, use_cache=False).last_hidden_state
        kept = torch.cuda.memory_allocated() - before
        model.zero_grad()
        out.float().square()[..., ::3].mean().backward()
        return torch.cat([p.grad.float().flatten() for p in model.layers.parameters()]), kept

    expected, most = step(model, "torch")
    eager, less = step(model, "auto")
    compiled, least = step(torch.compile(model), "auto")
    assert less < most
    assert least < most
    for found in (eager, compiled):
        assert (found - expected).norm() < 0.05 * expected.norm()
