"""The tables of SEA's fast paths, each beside what it stands for; empty where the package was copied without its kernels."""

try:
    from .kernels.table import KERNEL_ATTENTION, NARROW_NORM, SELECTION, SPARSE_ATTENTION
except ModuleNotFoundError as error:
    if "kernels" not in (error.name or ""):
        raise
    KERNEL_ATTENTION = NARROW_NORM = SELECTION = SPARSE_ATTENTION = ()

__all__ = ["KERNEL_ATTENTION", "NARROW_NORM", "SELECTION", "SPARSE_ATTENTION"]
