"""The tables of DANet's fast paths. They are empty in a copy of the package without its kernels: the plain code then runs."""

try:
    from .kernels.table import (
        ATTENTION,
        BODY,
        CAUSAL_PRODUCT,
        FEED_FORWARD,
        LINEAR_PRODUCT,
        MIX,
        NORM,
        QUADRATIC_PRODUCT,
        SLIDING_PRODUCT,
    )
except ModuleNotFoundError as error:
    if "kernels" not in (error.name or ""):
        raise
    ATTENTION = BODY = CAUSAL_PRODUCT = FEED_FORWARD = LINEAR_PRODUCT = MIX = NORM = QUADRATIC_PRODUCT = ()
    SLIDING_PRODUCT = ()

__all__ = [
    "ATTENTION",
    "BODY",
    "CAUSAL_PRODUCT",
    "FEED_FORWARD",
    "LINEAR_PRODUCT",
    "MIX",
    "NORM",
    "QUADRATIC_PRODUCT",
    "SLIDING_PRODUCT",
]
