"""A linear layer while decoding: when its own kernel runs."""

import torch
from torch import nn

from .backend import runs_triton
from .plain_layers import has_hooks, is_plain

LARGEST_STEP_BATCH = 64  # rows that a program of the kernel holds at once
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def step_linear(linear: nn.Module, hidden_states: torch.Tensor, relu: bool = False) -> torch.Tensor:
    """`linear(hidden_states)` or its ReLU; for (B, 1, d) without gradients (decoding) in a kernel that reads the weight once."""
    if not _runs_kernel(linear, hidden_states):
        out = linear(hidden_states)
        if not relu:
            return out
        return out.relu() if has_hooks(linear) else out.relu_()  # a hook may have kept it
    from .step_linear_triton import project

    return project(hidden_states[:, 0].contiguous(), linear, relu=relu)[:, None]


def step_feed_forward(up: nn.Module, down: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`down(ReLU(up(hidden_states)))`; for (B, 1, d) without gradients in two kernels, of which the first prepares the second."""
    if not _runs_kernel(up, hidden_states) or not _runs_kernel(down, hidden_states):
        return step_linear(down, step_linear(up, hidden_states, relu=True))
    from .step_linear_triton import counters_of, project

    done = counters_of(down, hidden_states.device)
    inner = project(hidden_states[:, 0].contiguous(), up, relu=True, clears=done)
    return project(inner, down, done=done)[:, None]


def _runs_kernel(linear, hidden_states) -> bool:
    if not isinstance(linear, nn.Linear) or hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return runs_triton(hidden_states, _obstacle(linear, hidden_states))


def _obstacle(linear, hidden_states) -> str | None:
    """Why the kernel cannot do this product, or None."""
    if not is_plain(linear) or torch.is_autocast_enabled(hidden_states.device.type):
        return "the layer is more than its weight"
    if hidden_states.shape[0] > LARGEST_STEP_BATCH:
        return f"its batches end at {LARGEST_STEP_BATCH} rows, this one has {hidden_states.shape[0]}"
    if hidden_states.dtype not in KERNEL_DTYPES or hidden_states.dtype != linear.weight.dtype:
        return f"it takes float32, bfloat16 or float16 throughout, not {hidden_states.dtype} and {linear.weight.dtype}"
    return None
