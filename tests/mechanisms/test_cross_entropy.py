"""Cross-entropy in blocks equals PyTorch's, in value and gradient, whatever the dtype and however the rows fall into blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from hf_linear_attn.modeling.kernels import cross_entropy as module
from hf_linear_attn.modeling.shared.cross_entropy import batch_share, cross_entropy, linear_cross_entropy
from hf_linear_attn.modeling.shared.kernels.padded_vocabulary import PaddedLinear


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


@pytest.mark.parametrize("count", [None, 0, 7, torch.tensor(0), torch.tensor(0.0)])
def test_nothing_to_predict_is_zero(count):
    """A batch that teaches nothing must not make the weights NaN, as PyTorch's mean would."""
    logits, labels = draw()
    hidden, weight = torch.randn(10, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()
    labels.fill_(-100)
    for loss in (cross_entropy(logits, labels, count), linear_cross_entropy(hidden, weight, None, labels, count)):
        assert loss == 0
        loss.backward()
    assert all((x.grad == 0).all() for x in (logits, hidden, weight))


def test_a_count_on_a_device_is_not_waited_for():
    """Fake tensors hold no value that could be looked at."""
    with FakeTensorMode():
        logits, labels, count = torch.randn(10, 50), torch.zeros(10, dtype=torch.long), torch.tensor(3)
        for each in (None, count):
            assert cross_entropy(logits, labels, each).shape == ()
            assert batch_share(logits.mean(), labels, each).shape == ()


def test_under_function_transforms_and_compile():
    logits, labels = draw()
    wanted = torch.autograd.grad(cross_entropy(logits, labels), logits)[0]
    found = torch.func.grad(lambda x: cross_entropy(x, labels))(logits.detach())
    torch.testing.assert_close(found, wanted)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(logits, labels), logits)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [None, 7])
def test_without_logits_equals_with_them(dtype, with_bias, count):
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8).to(dtype).requires_grad_(), torch.randn(50, 8).to(dtype).requires_grad_()
    bias = torch.randn(50).to(dtype).requires_grad_() if with_bias else None
    labels = torch.randint(0, 50, (10,))
    labels[::4] = -100
    exact = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    wanted = F.cross_entropy(F.linear(*exact), labels, reduction="sum") / (count or (labels != -100).sum())
    loss = linear_cross_entropy(hidden, weight, bias, labels, count)
    (3 * wanted).backward()
    (3 * loss).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(loss.double(), wanted, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip((hidden, weight, bias), exact):
        if ours is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["leap", "fastformer", "danet"])
def test_a_model_trains_the_same_without_logits(family):
    extra = {"is_causal": True} if family == "danet" else {}
    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(family, **size, max_position_embeddings=16, **extra)
    model = AutoModelForCausalLM.from_config(config).double().train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    ids, mask = torch.randint(0, 50, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    results = []
    for fused in (False, True):
        model.config.fused_linear_cross_entropy = fused
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=mask, labels=ids, num_items_in_batch=ids[:, 1:].numel())
        assert (output.logits is None) == fused
        torch.testing.assert_close(output.loss, model(input_ids=ids, attention_mask=mask, labels=ids).loss)
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    model.eval()
    assert model(input_ids=ids, labels=ids).logits is not None
    model.train().lm_head.register_forward_hook(lambda *_: None)
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        model(input_ids=ids, labels=ids)


def test_can_be_differentiated_twice():
    logits, labels = draw(rows=4)
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, labels), (logits,))


def test_logits_of_a_padded_vocabulary_can_be_differentiated_twice():
    """The product that a GPU takes for a vocabulary that is no multiple of 8."""
    x, weight, bias = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 5), (11, 5), (11,))
    )
    assert torch.autograd.gradcheck(PaddedLinear.apply, (x, weight, bias))
    assert torch.autograd.gradgradcheck(PaddedLinear.apply, (x, weight, bias))
