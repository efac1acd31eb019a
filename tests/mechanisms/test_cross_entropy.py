"""Cross-entropy in blocks equals PyTorch's, in value and gradient, whatever the dtype and however the rows fall into blocks."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.modeling import cross_entropy as module
from hf_linear_attn.modeling.cross_entropy import cross_entropy


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ON_CPU", 3 * 50)  # three rows of the vocabulary below


def draw(rows=10, dtype=torch.float64):
    torch.manual_seed(0)
    logits = (5 * torch.randn(rows, 50)).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (rows,))
    labels[::4] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
def test_equals_pytorch(dtype, count):
    logits, labels = draw(dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact, labels, reduction="sum") / (count or (labels != -100).sum())
    loss = cross_entropy(logits, labels, count)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    wanted.backward()
    loss.backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert (logits.grad[::4] == 0).all()


def test_keeps_one_number_a_row_for_backward():
    logits, labels = draw()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cross_entropy(logits, labels).backward()
    new = [x for x in kept if x.data_ptr() != logits.data_ptr()]
    assert new
    assert max(x.numel() for x in new) <= len(labels)


def test_nothing_to_predict_is_nan_as_in_pytorch():
    logits, labels = draw()
    assert cross_entropy(logits, labels.fill_(-100)).isnan()


def test_under_function_transforms_and_compile():
    logits, labels = draw()
    wanted = torch.autograd.grad(cross_entropy(logits, labels), logits)[0]
    found = torch.func.grad(lambda x: cross_entropy(x, labels))(logits.detach())
    torch.testing.assert_close(found, wanted)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(logits, labels), logits)[0], wanted)
