"""Which implementation of a mechanism runs: the one place that decides.

By itself the choice follows the tensor's device: Triton kernels for CUDA tensors they cover, plain PyTorch otherwise; what
happens to be installed plays no part. `use_backend("torch")` overrides it for a block of code.
"""

import contextlib
import contextvars
import functools
import importlib.util

import torch

from .tracing import is_traced

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_chosen: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="auto")
# A compiler cannot trace the context; it compiles again when this name changes, which the last block to begin or end sets.
_chosen_for_compiler = "auto"


@contextlib.contextmanager
def use_backend(name: str):
    """Within the block, run every mechanism as `name`: `"torch"`, `"triton"` (an error where no kernel fits) or `"auto"`.

    Holds for this thread, or asynchronous task, alone; calls of compiled functions follow the block that began last in any.
    """
    global _chosen_for_compiler
    if name not in BACKENDS:
        raise ValueError(f"`name` is {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    before, _chosen_for_compiler = _chosen_for_compiler, name
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
        _chosen_for_compiler = before


def chosen_backend() -> str:
    """What `use_backend` asks for here, "auto" outside of it."""
    return _chosen_for_compiler if is_traced() else _chosen.get()


def runs_triton(tensor: torch.Tensor, obstacle: str | None) -> bool:
    """Whether a mechanism on `tensor` runs as a Triton kernel; `obstacle` says why its kernel cannot do this call, if so."""
    backend = chosen_backend()
    if backend == "torch":
        return False
    if backend == "triton":
        if obstacle is None and not HAS_TRITON:
            obstacle = "the package triton is not installed"
        if obstacle is not None:
            raise ValueError(f"the Triton kernel cannot run this call: {obstacle}; use the backend 'auto' or 'torch'")
        return True
    return tensor.is_cuda and obstacle is None and HAS_TRITON


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
