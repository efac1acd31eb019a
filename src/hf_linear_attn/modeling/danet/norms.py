"""The normalisations of DANet: MaxNorm and its relatives. Source: DANet specification, section 2.

All act on the last axis. Each takes two optional arguments that let the block save passes over memory: `row_scale` `(B, T, 1)`
multiplies the result (the n^(-1/3) scale, and 0 for padded rows), and `residual` is added to it. A row scale of 0 also cuts the
gradient: the Jacobian of MaxNorm at a zero row is I/eps, up to 1e12.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.fast_paths import fast_paths
from ..shared.precision import accumulation_dtype
from .fast_paths import NORM


class VectorNorm(nn.Module):
    """x / (size(x) + eps), where size is the maximum or the mean of |x|, with an optional learned scale.

    scale: None (no weight), "after" (weight * x / size(x)) or "before" (y = weight * x; y / size(y)).
    mean: False for the maximum (MaxNorm), True for the mean (the "uncentered" norms).
    The size is computed in float32 at least. Zero rows give zero.
    """

    def __init__(self, hidden_size: int, eps: float, mean: bool = False, scale: str | None = None):
        super().__init__()
        self.eps, self.mean, self.scale = eps, mean, scale
        if scale is not None:
            self.weight = nn.Parameter(torch.ones(hidden_size))

    @fast_paths(*NORM)
    def forward(self, hidden_states, row_scale=None, residual=None):
        """(..., d) -> (..., d)."""
        dtype = hidden_states.dtype
        if self.scale == "before":
            hidden_states = hidden_states * self.weight
        wide = hidden_states.to(accumulation_dtype(dtype))
        factor = (self._size(wide) + self.eps).reciprocal()  # (..., 1)
        if row_scale is not None:
            factor = factor * row_scale.to(factor.dtype)
        if self.scale != "after" and residual is not None and wide.dtype == residual.dtype:
            return torch.addcmul(residual, wide, factor)  # one pass: h + x * factor
        normed = (wide * factor).to(dtype)
        return _finish(normed * self.weight if self.scale == "after" else normed, None, residual)

    def _size(self, wide):
        if self.mean:
            return wide.abs().mean(-1, keepdim=True)
        # Twice as fast on a CPU as abs().amax(), which writes |x|, and 15 times as torch.linalg.vector_norm(ord=inf).
        return torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))

    def extra_repr(self) -> str:
        return f"mean={self.mean}, scale={self.scale}, eps={self.eps}"


def _finish(normed: torch.Tensor, row_scale: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """`residual + row_scale * normed`, as far as they are given."""
    if row_scale is not None:
        normed = normed * row_scale.to(normed.dtype)
    return normed if residual is None else residual + normed


class ScaledLayerNorm(nn.Module):
    """LayerNorm with a learned scale and no bias ("standard_ln"), or not `centred` RMSNorm ("rmsnorm")."""

    def __init__(self, hidden_size: int, eps: float, centred: bool = True):
        super().__init__()
        self.eps, self.centred = eps, centred
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states, row_scale=None, residual=None):
        # float16 has no 1/sqrt(eps) for a constant row: half precision is raised, as for the other norms.
        dtype, wide = hidden_states.dtype, accumulation_dtype(hidden_states.dtype)
        weight, shape = self.weight.to(wide), hidden_states.shape[-1:]
        if self.centred:
            normed = F.layer_norm(hidden_states.to(wide), shape, weight, None, self.eps)
        else:
            normed = F.rms_norm(hidden_states.to(wide), shape, weight, self.eps)
        return _finish(normed.to(dtype), row_scale, residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}" + ("" if self.centred else ", centred=False")


class ElementwiseNorm(nn.Module):
    """A pointwise function in the place of a norm."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, hidden_states, row_scale=None, residual=None):
        return _finish(ACTIVATIONS[self.name](hidden_states), row_scale, residual)

    def extra_repr(self) -> str:
        return self.name


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "no_ln": lambda x: x,
    "hardtanh": lambda x: x.clamp(-1.0, 1.0),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "legacy_gelu": lambda x: F.gelu(x.to(accumulation_dtype(x.dtype))).to(x.dtype),
    "relu": F.relu,
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "leaky_relu_0.1": lambda x: F.leaky_relu(x, 0.1),
}

VECTOR_NORMS = {
    "max_norm": (False, None),
    "fixed_max_norm": (False, None),
    "scaled_max_norm": (False, "after"),
    "prescaled_max_norm": (False, "before"),
    "uncentered_ln": (True, "after"),
    "uncentered_fixed_ln": (True, None),
}

NORM_NAMES = (*VECTOR_NORMS, "standard_ln", "rmsnorm", *ACTIVATIONS)


def build_norm(name: str, hidden_size: int, maxnorm_eps: float = 1e-3, scaled_norm_eps: float = 1e-12) -> nn.Module:
    """The norm called `name`: `maxnorm_eps` is for "max_norm" alone, `scaled_norm_eps` for every other one.

    Raises ValueError for an unknown name: a misspelt norm must not become another one.
    """
    if name in VECTOR_NORMS:
        mean, scale = VECTOR_NORMS[name]
        return VectorNorm(hidden_size, maxnorm_eps if name == "max_norm" else scaled_norm_eps, mean, scale)
    if name in ("standard_ln", "rmsnorm"):
        return ScaledLayerNorm(hidden_size, scaled_norm_eps, centred=name == "standard_ln")
    if name in ACTIVATIONS:
        return ElementwiseNorm(name)
    raise ValueError(f"unknown norm {name!r}; choose one of {NORM_NAMES}")
