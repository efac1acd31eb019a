"""The kernel of causal DenseAttention against float64: outputs, gradients, and states that go on."""

import pytest
import torch
from gpu.device import DEVICE, DTYPES, assert_as_accurate, needs_gpu, needs_kernels, poison, sizes

from hf_linear_attn.modeling.danet.dense_attention import dense_attention
from hf_linear_attn.modeling.kernels.dispatch import use_backend

pytestmark = needs_kernels
WINDOWS = [None, 2, 64, 100]


def inputs(length, head=16, dtype=torch.float32, batch=2, heads=2):
    """Queries, keys, values: views of one tensor, since the kernel must honour strides."""
    generator = torch.Generator().manual_seed(length + head)
    made = torch.randn(batch, length, 3, heads, head, generator=generator) * head**-0.5
    return made.to(DEVICE, dtype)


def run(made, backend, window, shared=False, **arguments):
    made = made.detach().clone().requires_grad_()
    query, key, value = made.unbind(2)
    pattern = {"pattern": "g"} if window is None else {"pattern": "sw", "window_size": window}
    with use_backend(backend):
        out, _ = dense_attention(query, key, key if shared else value, is_causal=True, **pattern, **arguments)
    (out * torch.linspace(-1, 1, out.shape[-1], device=DEVICE).to(out.dtype)).sum().backward()
    return out.detach(), made.grad


def compare(made, window, **arguments):
    exact = run(made.double(), "torch", window, **arguments)
    plain = run(made, "torch", window, **arguments)
    poison(made.numel())
    assert_as_accurate(run(made, "triton", window, **arguments), plain, exact, ("output", "gradient"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", sizes([1, 2, 15, 65], [63, 64, 500, 1000, 16384]))
def test_lengths(length, window, dtype):
    compare(inputs(length, dtype=dtype), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("head", sizes([20], [16, 60, 64, 100, 128]))
def test_heads(head, window, dtype):
    compare(inputs(70, head, dtype), window)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.interpreted
def test_keys_that_are_the_values(window):
    compare(inputs(70), window, shared=True)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.interpreted
def test_padding(window):
    mask = torch.ones(2, 70, dtype=torch.long, device=DEVICE)
    mask[0, :9], mask[1, 30:40] = 0, 0
    compare(inputs(70), window, attention_mask=mask)


@needs_gpu
@pytest.mark.parametrize("window", [None, 64])
def test_through_torch_compile(window):
    made = inputs(300, 64)
    query, key, value = made.unbind(2)
    pattern = {"pattern": "g"} if window is None else {"pattern": "sw", "window_size": window}

    def attend(query, key, value):
        return dense_attention(query, key, value, is_causal=True, **pattern)[0]

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(query, key, value), attend(query, key, value))


@torch.no_grad()
def test_a_state_goes_on():
    """Two halves with a state between them, kernels throughout: the whole row at once in plain PyTorch."""
    made = inputs(150)
    query, key, value = made.unbind(2)
    with use_backend("torch"):
        whole, end = dense_attention(query, key, value, is_causal=True, output_final_state=True)
    with use_backend("triton"):
        parts, state = [], None
        for part in (slice(0, 70), slice(70, 150)):
            out, state = dense_attention(
                query[:, part],
                key[:, part],
                value[:, part],
                is_causal=True,
                initial_state=state,
                output_final_state=True,
            )
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.memory, end.memory, atol=1e-5, rtol=1e-4)


def test_a_gradient_through_a_state_is_left_to_pytorch():
    query, key, value = inputs(70).unbind(2)
    key = key.detach().requires_grad_()
    arguments = {"is_causal": True, "output_final_state": True}
    with use_backend("triton"), pytest.raises(ValueError, match="no gradient to states"):
        dense_attention(query, key, value, **arguments)
