"""Triton, or stand-ins where it is not installed (macOS, Windows, a broken installation): files of kernels load everywhere.

Kernel files take `tl` (triton.language), `triton` and what else they use of it from here. A stand-in takes every decorator and
annotation; launching its kernel raises an ImportError that says what to install. Whether a kernel is chosen at all is up to
`dispatch` and `fast_paths`.
"""

try:  # inside `try`, since loading a checkpoint's own code demands every other import, also where there is no GPU
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception as error:  # whatever a broken installation raises

    class _StandIn:
        """Of a module, and of all that lies in it."""

        def __init__(self, cause: Exception):
            self._cause = cause

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args, **kwargs):  # a decorator, or one that is made
            return self

        def __getitem__(self, grid):
            raise ImportError("the GPU kernels need the package triton: pip install triton") from self._cause

    triton = tl = gdc_launch_dependents = gdc_wait = TensorDescriptor = _StandIn(error)

__all__ = ["TensorDescriptor", "gdc_launch_dependents", "gdc_wait", "tl", "triton"]
