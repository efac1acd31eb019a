"""Softmax cross-entropy in one kernel against float64: kept logits, and logits a block at a time."""

import pytest
import torch
import torch.nn.functional as F
from gpu.device import DEVICE, DTYPES, assert_as_accurate, needs_kernels, poison, sizes

pytest.importorskip("triton")

from hf_linear_attn.modeling.kernels import cross_entropy as cross_entropy_triton
from hf_linear_attn.modeling.kernels.dispatch import use_backend
from hf_linear_attn.modeling.shared import cross_entropy as module
from hf_linear_attn.modeling.shared.kernels.padded_vocabulary import PaddedLinear

pytestmark = [*needs_kernels, pytest.mark.interpreted]
WIDTH, ROWS = 32, 7


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    """Small rows go through the kernel's loops, too, and small batches through several blocks."""
    monkeypatch.setattr(cross_entropy_triton, "PIECE", 16 if DEVICE == "cpu" else 4096)
    monkeypatch.setattr(cross_entropy_triton, "BLOCK_ON_CPU", 150)
    monkeypatch.setattr(cross_entropy_triton, "BLOCK_ON_GPU", 3 * 50257)


def draw(classes, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, WIDTH, device=DEVICE), torch.randn(classes, WIDTH, device=DEVICE)
    labels = torch.randint(0, classes, (ROWS,), device=DEVICE)
    labels[::3] = -100
    return hidden.to(dtype), weight.to(dtype), labels


def run(backend, dtype, loss, *inputs):
    *inputs, labels = inputs
    inputs = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    poison(100_000)
    with use_backend(backend):
        out = loss(*inputs, labels)
        (3 * out).backward()
    return out.detach(), *(x.grad for x in inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", sizes([50], [4096, 50257]))
def test_kept_logits(classes, dtype):
    hidden, weight, labels = draw(classes, dtype)
    logits = F.linear(hidden, weight)
    logits[1, :20] = -torch.inf  # the whole of the first piece, where pieces are small
    logits[1, labels[1]] = 0.0
    given = module.cross_entropy, logits, labels
    exact, plain = run("torch", torch.float64, *given), run("torch", dtype, *given)
    assert_as_accurate(run("triton", dtype, *given), plain, exact, ("loss", "gradient"))


@pytest.mark.parametrize("label", [50, -1])
def test_a_label_that_is_no_class(label):
    """NaN in its own row alone; nothing outside the row is read."""
    logits = torch.randn(3, 50, device=DEVICE, requires_grad=True)
    labels = torch.tensor([4, label, -100], device=DEVICE)
    losses, partition = cross_entropy_triton.softmax_loss(logits.detach(), labels, -100)
    assert losses.isnan().tolist() == [False, True, False]
    weights = torch.ones(3, device=DEVICE)
    slope = cross_entropy_triton.softmax_gradient(logits.detach(), labels, partition, weights, -100)
    assert slope.isnan().any(1).tolist() == [False, True, False]
    assert not slope[2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("classes", sizes([50], [4096, 50257]))
def test_logits_a_block_at_a_time(classes, with_bias, dtype):
    hidden, weight, labels = draw(classes, dtype)
    bias = [torch.randn(classes, device=DEVICE).to(dtype)] if with_bias else []

    def loss(hidden, weight, *rest):
        return module.linear_cross_entropy(hidden, weight, rest[0] if with_bias else None, rest[-1])

    given = loss, hidden, weight, *bias, labels
    exact, plain = run("torch", torch.float64, *given), run("torch", dtype, *given)
    assert_as_accurate(run("triton", dtype, *given), plain, exact, ("loss", "hidden states", "weight", "bias"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["gradient with gaps", "without"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("classes", sizes([50], [50257]))
def test_logits_with_gaps(classes, with_bias, dense, dtype):
    """The product with a vocabulary made longer, the loss of its logits, and all gradients."""
    hidden, weight, labels = draw(classes, dtype)
    bias = [torch.randn(classes, device=DEVICE).to(dtype)] if with_bias else []

    def ours(hidden, weight, *rest):
        logits = PaddedLinear.apply(hidden[None], weight, rest[0] if with_bias else None)[0]
        assert logits.stride(0) % 64 == 0
        return module.cross_entropy(logits.contiguous() if dense else logits, rest[-1])

    def plain(hidden, weight, *rest):
        return module.cross_entropy(F.linear(hidden, weight, rest[0] if with_bias else None), rest[-1])

    given = hidden, weight, *bias, labels
    exact, same = run("torch", torch.float64, plain, *given), run("torch", dtype, plain, *given)
    assert_as_accurate(run("triton", dtype, ours, *given), same, exact, ("loss", "hidden states", "weight", "bias"))
