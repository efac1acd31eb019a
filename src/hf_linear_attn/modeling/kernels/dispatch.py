"""Which implementation of a mechanism runs: the one place that decides.

By itself the choice follows the tensor's device: Triton kernels for CUDA tensors they cover, plain PyTorch otherwise; what
happens to be installed plays no part. `use_backend("torch")` overrides it for a block of code.
"""

import contextlib
import contextvars
import functools
import importlib.util

import torch

from .tracing import is_in_backward, is_traced

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
# Of the block that began last in any thread, of those that are open. A compiler cannot trace the context, but compiles again when
# this name changes; and a GPU's backward, which may run a layer again (checkpointing), has a thread of its own without a context.
_chosen_last = "auto"
_open_blocks: list[list[str]] = []


@contextlib.contextmanager
def use_backend(name: str):
    """Within the block, run every mechanism as `name`: `"torch"`, `"triton"` (an error where no kernel fits) or `"auto"`.

    Holds for this thread, or asynchronous task, alone; calls of compiled functions, and layers that a GPU's backward runs again,
    follow the block that began last in any.
    """
    global _chosen_last
    if name not in BACKENDS:
        raise ValueError(f"`name` is {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    token, block = _chosen.set(name), [name]
    _open_blocks.append(block)
    _chosen_last = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _open_blocks[:] = [x for x in _open_blocks if x is not block]  # threads end their blocks in any order
        _chosen_last = _open_blocks[-1][0] if _open_blocks else "auto"


def chosen_backend(traced: bool | None = None) -> str:
    """What `use_backend` asks for here, "auto" outside of it. `traced`: what `is_traced` says, if the caller knows it."""
    if is_traced() if traced is None else traced:
        return _chosen_last
    return _chosen.get() or (_chosen_last if _open_blocks and is_in_backward() else "auto")


def runs_triton(tensor: torch.Tensor, reason: str | None) -> bool:
    """Whether a mechanism on `tensor` runs as a Triton kernel; `reason` says why its kernel cannot do this call, if so."""
    backend = chosen_backend()
    if backend == "torch":
        return False
    if backend == "triton":
        if reason is None and not HAS_TRITON:
            reason = "the package triton is not installed"
        if reason is not None:
            raise ValueError(f"the Triton kernel cannot run this call: {reason}; use the backend 'auto' or 'torch'")
        return True
    return tensor.is_cuda and reason is None and HAS_TRITON


def prefers_fused(tensor: torch.Tensor) -> bool:
    """Whether a product on `tensor` takes its activation along (a CUDA library's epilogue, no Triton)."""
    return tensor.is_cuda and chosen_backend() != "torch"


def on_its_device(launch):
    """Decorates what launches Triton kernels: they start on the current device, which need not be that of the tensors."""

    @functools.wraps(launch)
    def wrapper(*arguments, **options):
        tensor = next(x for x in arguments if isinstance(x, torch.Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            return launch(*arguments, **options)

    return wrapper


@functools.cache
def _launches_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def early_options(device: torch.device, wanted: bool = True) -> dict:
    """Flag and launch option of a kernel that may start before the one in front of it has ended, where the device can do that."""
    return {"EARLY": True, "launch_pdl": True} if wanted and _launches_early(device) else {"EARLY": False}
