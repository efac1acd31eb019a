"""Nothing of size T x T outside the dense form: every tensor that a layer makes is looked at."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_linear_attn.modeling.sea import losses as sea_losses
from hf_linear_attn.modeling.sea.losses import TeacherTargets

from .layers import make_core, make_inputs


class LargestTensors(TorchDispatchMode):
    """Records the largest tensor of any operation (`made`: views left out), and shapes with two axes of at least `side`."""

    def __init__(self, side: int):
        super().__init__()
        self.side, self.largest, self.made, self.square = side, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                if x._base is None and not any(
                    isinstance(a, torch.Tensor) and a.data_ptr() == x.data_ptr() for a in args
                ):
                    self.made = max(self.made, x.numel())
                if sum(s >= self.side for s in x.shape) > 1:
                    self.square.append((func, tuple(x.shape)))
        return out


def watch(causal, length, backend="chunked", padded=False, teacher=False):
    core = make_core(causal, backend=backend, k=2, predictor_length=8, max_positions=length).train()
    inputs = make_inputs(1, 2, length, requires_grad=True)
    mask = None
    if padded:
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[:, :9] = False
    targets = (
        TeacherTargets(torch.randn(1, length, 16), q=inputs[0].detach(), k=inputs[1].detach()) if teacher else None
    )
    with LargestTensors(length) as seen:
        out = core(*inputs, attention_mask=mask, teacher=targets)
        (out.context.square().sum() + (out.loss if teacher else 0)).backward()
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_training_step_makes_no_square_tensor_and_grows_linearly(causal, padded):
    seen = [watch(causal, length, padded=padded) for length in (512, 1024, 2048)]
    assert not [x for s in seen for x in s.square]
    assert seen[2].largest <= 2.2 * seen[1].largest <= 2.2 * 2.2 * seen[0].largest


def test_the_check_finds_the_dense_form():
    assert watch(True, 512, backend="dense").square


def test_distillation_makes_blocks_of_rows_only(monkeypatch):
    monkeypatch.setattr(sea_losses, "BLOCK_ELEMENTS", 2 * 512 * 64)
    seen = watch(True, 512, teacher=True)
    assert not seen.square
    assert seen.largest <= 2 * 512 * 64 * 2
