"""The running sum in two levels is the running sum."""

import pytest
import torch

from hf_linear_attn.modeling.kernels.running_sum import RUN, running_sum


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("count", [1, RUN, RUN + 1, 2 * RUN, 5 * RUN + 3])
def test_equals_cumsum(count, dim):
    shape = [2, 3, 4]
    shape[dim] = count
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, expected = running_sum(x, dim), x.cumsum(dim)
    torch.testing.assert_close(ours, expected)
    for found, wanted in zip(*(torch.autograd.grad((y * weight).sum(), x) for y in (ours, expected))):
        torch.testing.assert_close(found, wanted)
