"""How the tests speak of a cache, whose name differs between releases of Transformers.

Our own models take `cache=` and answer to `.cache` on every release, which is what the tests say throughout. Transformers' models
and messages know the release's name alone: `cache_keyword(cache)`, `cache_of(output)` and `CACHE_NAME` are for those.
"""

import pytest
import torch

from hf_linear_attn.modeling.shared.compat import CACHE_NAME, CACHE_NAMES, cache_keyword, cache_of
from hf_linear_attn.modeling.shared.releases import RELEASE

__all__ = ["CACHE_NAME", "CACHE_NAMES", "cache_keyword", "cache_of", "held", "is_hybrid", "skip_recording_windows"]


def held(layer) -> list[torch.Tensor]:
    """The tensors of a layer that has seen a token."""
    return [*(layer.saved_tensors().values() if hasattr(layer, "saved_tensors") else (layer.keys, layer.values))]


def is_hybrid(cache) -> bool:
    """Whether some layers are Transformers' own: they keep keys and values, and count columns."""
    return not all(hasattr(layer, "saved_tensors") for layer in cache.layers)


def skip_recording_windows(model) -> None:
    """Where the cache of a model with sliding softmax layers records its past."""
    if RELEASE < (5, 23) and getattr(model.config, "sliding_window", None):
        pytest.skip("a recording window of older releases hands out more columns than its mask covers")
