"""What defines a SEA layer but its weights, checked."""

from dataclasses import dataclass

from .cell_maps import CAUSAL_TOPK_GROUPS, TOPK_GROUPS
from .configuration_common import LARGEST_SIZE
from .random_features import default_num_features
from .sea_estimator import BIDIRECTIONAL_REDUCTION, CAUSAL_REDUCTION

LEAST_CELLS = 4
BACKENDS = ("auto", "dense", "chunked")


@dataclass(frozen=True)
class SeaOptions:
    """Everything that defines a layer but its weights. See ``SeaConfig`` for the advice on each field.

    ``None`` takes the default of the direction: ``feature_factor`` 1 or 8 (causal), ``max_keys_per_cell`` k (no limit
    if official).

    Raises:
        ValueError: a value outside its range, or a group that causality forbids.
    """

    num_heads: int
    head_dim: int
    causal: bool
    k: int = 64
    predictor_length: int = 128
    feature_factor: float | None = None
    num_features: int | None = None
    topk_group: str = "causal_batch"
    max_keys_per_cell: int | None = None
    max_positions: int = 2048
    official: bool = False
    backend: str = "auto"

    def __post_init__(self):
        for name in ("num_heads", "head_dim", "k", "predictor_length", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
                raise ValueError(f"{name} must be a positive integer up to {LARGEST_SIZE:,}, got {value!r}")
        direction = "causal" if self.causal else "bidirectional"
        divisor = CAUSAL_REDUCTION if self.causal else BIDIRECTIONAL_REDUCTION
        if self.predictor_length % divisor:
            raise ValueError(
                f"predictor_length must be a multiple of {divisor} for a {direction} host, got {self.predictor_length}"
                f": its network works on 1/{divisor} of that width"
            )
        if self.predictor_length < LEAST_CELLS:
            raise ValueError(
                f"predictor_length must be at least {LEAST_CELLS}, got {self.predictor_length}: with fewer cells they all "
                "tie, and nothing is estimated"
            )
        groups = CAUSAL_TOPK_GROUPS if self.causal else TOPK_GROUPS
        if self.topk_group not in groups:
            raise ValueError(
                f"topk_group must be one of {groups} for a {direction} host, got {self.topk_group!r}"
                + ("; other groups let a row see how later rows score" if self.topk_group in TOPK_GROUPS else "")
            )
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}")
        if self.feature_factor is not None and not self.feature_factor > 0:
            raise ValueError(
                f"feature_factor must be positive (it divides the number of features), got {self.feature_factor}"
            )
        for name in ("num_features", "max_keys_per_cell"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise ValueError(f"{name} must be 1 to {LARGEST_SIZE:,} or None, got {getattr(self, name)}")

    @property
    def feature_count(self) -> int:
        """F."""
        if self.num_features is not None:
            return self.num_features
        factor = self.feature_factor if self.feature_factor is not None else (8 if self.causal else 1)
        return default_num_features(self.head_dim, factor)

    @property
    def cell_limit(self) -> int | None:
        """Keys that one cell may hand out; None is no limit."""
        if self.max_keys_per_cell is not None:
            return self.max_keys_per_cell
        return None if self.official else self.k
