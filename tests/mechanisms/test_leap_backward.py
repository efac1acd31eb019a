"""The operator with its backward written out equals the formula under autograd: values, gradients, second gradients, dropout."""

import pytest
import torch

from hf_linear_attn import LeapConfig, LeapModel
from hf_linear_attn.modeling.leap.formula import gated_means
from hf_linear_attn.modeling.leap.kernels.eager_backward import _Leap
from hf_linear_attn.modeling.leap.mechanism import leap_mechanism

BATCH, LENGTH, HEADS, WIDTH = 2, 150, 3, 8  # three chunks of the scan, the last of them not full
WINDOWS = [None, 1, 2, 3, 64, 65, 66, 100, 129, 400]


def draw(dtype=torch.float64, rotated=False):
    torch.manual_seed(0)
    projected = torch.randn(BATCH, LENGTH, 4, HEADS, WIDTH, dtype=dtype, requires_grad=True)
    if not rotated:
        return projected, None, None
    turned = (torch.randn(BATCH, LENGTH, HEADS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    return projected, *turned


def compare(inputs, window, kept=None, mask=None, segment_ids=None, tolerance=1e-12):
    given = [x for x in inputs if x is not None]
    projected, *rotated = inputs
    rotated = None if rotated[1] is None else rotated
    expected, _ = gated_means(projected, rotated, window, kept, mask=mask, segment_ids=segment_ids)
    out = _Leap.apply(*inputs, window, kept, mask, segment_ids)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, given, grad)
    for found, wanted in zip(grads, torch.autograd.grad(expected, given, grad), strict=True):
        assert wanted.abs().max() > 1e-2
        torch.testing.assert_close(found, wanted, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_formula(window, rotated):
    compare(draw(rotated=rotated), window)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_equals_formula_packed(window):
    documents = torch.tensor([0] * 70 + [1] * 5 + [2] * 75).expand(BATCH, -1)
    compare(draw(), window, segment_ids=documents)


def test_equals_formula_with_padding_and_dropped_logits():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, :20] = mask[1, 60:70] = False
    kept = torch.nn.functional.dropout(torch.ones(BATCH, LENGTH, HEADS, dtype=torch.float64), 0.3)
    compare(draw(), None, kept, mask)


def test_half_precision_sums_in_float32():
    projected, *_ = draw(torch.bfloat16)
    exact = projected.detach().double().requires_grad_()
    out, wanted = _Leap.apply(projected, None, None, None, None, None, None), None
    wanted, _ = gated_means(exact, None, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-6)  # one rounding, at the end
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, projected, grad)
    (wanted,) = torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-5)


def test_can_be_differentiated_twice():
    torch.manual_seed(0)
    small = torch.randn(1, 5, 4, 1, 2, dtype=torch.float64, requires_grad=True)

    def run(x):
        return leap_mechanism(x, 3)[0]

    assert run(small).grad_fn.name() == "_LeapBackward"
    assert torch.autograd.gradgradcheck(run, (small,))


def test_function_transforms_take_the_formula():
    projected, *_ = draw()

    def total(x):
        return leap_mechanism(x)[0].square().sum()

    wanted = torch.autograd.grad(total(projected), projected)[0]
    torch.testing.assert_close(torch.func.grad(total)(projected.detach()), wanted)


def test_dropout_spares_keys_and_keeps_the_mean():
    projected = torch.ones(1, 4000, 4, 1, 4, dtype=torch.float64, requires_grad=True)
    out, _ = leap_mechanism(projected, dropout=0.5)
    seen = out[0, -1].mean() / torch.sigmoid(torch.tensor(2.0))  # a gate between those of dropped queries
    assert 0.5 < seen < 1.2
    assert (out == 0).float().mean() < 0.2, "the gate and the mean are never dropped themselves"


def step_of_a_model(num_recomputed_mlps, compiled):
    """Loss and gradients, and how many tensors as wide as the inner activation are kept for backward."""
    size = {
        "vocab_size": 20,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "hidden_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    model = LeapModel(LeapConfig(**size, intermediate_size=56, num_recomputed_mlps=num_recomputed_mlps)).train()
    ids, wide = torch.arange(30).view(2, 15) % 20, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: wide.append(x.shape[-2:] == (15, 56)) or x, lambda x: x):
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(ids).last_hidden_state.square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], sum(wide)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_inner_activations_formed_again(compiled):
    (plain, kept), (ours, fewer) = (step_of_a_model(number, compiled) for number in (0, 1))
    assert compiled or 2 * fewer == kept > 0
    for x, y in zip(ours, plain, strict=True):
        torch.testing.assert_close(x, y)
