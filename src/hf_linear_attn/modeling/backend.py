"""Which spelling of a mechanism runs: the one place that decides.

By itself the choice follows the tensor's device: Triton kernels for CUDA tensors they cover, plain PyTorch otherwise; what
happens to be installed plays no part. `use_backend("torch")` overrides it for a block of code.
"""

import contextlib
import functools
import importlib.util

import torch

BACKENDS = ("auto", "torch", "triton")
_chosen = "auto"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def use_backend(name: str):
    """Within the block, run every mechanism as `name`: `"torch"`, `"triton"` (an error where no kernel fits) or `"auto"`."""
    if name not in BACKENDS:
        raise ValueError(f"`name` is {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def runs_triton(tensor: torch.Tensor, obstacle: str | None) -> bool:
    """Whether a mechanism on `tensor` runs as a Triton kernel; `obstacle` says why its kernel cannot do this call, if so."""
    if _chosen == "torch":
        return False
    if _chosen == "triton":
        if obstacle is None and not HAS_TRITON:
            obstacle = "the package triton is not installed"
        if obstacle is not None:
            raise ValueError(f"the Triton kernel cannot run this call: {obstacle}; use the backend 'auto' or 'torch'")
        return True
    return tensor.is_cuda and obstacle is None and HAS_TRITON


def prefers_fused(tensor: torch.Tensor) -> bool:
    """Whether a product on `tensor` takes its activation along (a CUDA library's epilogue, no Triton)."""
    return tensor.is_cuda and _chosen != "torch"


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
