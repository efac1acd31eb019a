"""Faster ways through LEAP's code, for `kernels.fast_paths`; none where the folder of its kernels is missing."""

try:
    from .kernels.table import BLOCK, FEED_FORWARD, MECHANISM
except ModuleNotFoundError as error:  # a copy of the package without its kernels
    if "kernels" not in (error.name or ""):
        raise
    BLOCK = FEED_FORWARD = MECHANISM = ()

__all__ = ["BLOCK", "FEED_FORWARD", "MECHANISM"]
