"""How the tests speak of a cache, whose name differs between releases of Transformers.

Our own models take `cache=` and answer to `.cache` on every release, which is what the tests say throughout. Transformers' models
and messages know the release's name alone: `cache_keyword(cache)`, `cache_of(output)` and `CACHE_NAME` are for those.
"""

import torch

from hf_linear_attn.modeling.compat import CACHE_NAME, CACHE_NAMES, cache_keyword, cache_of

__all__ = ["CACHE_NAME", "CACHE_NAMES", "cache_keyword", "cache_of", "held", "is_hybrid"]


def held(layer) -> list[torch.Tensor]:
    """The tensors of a layer that has seen a token."""
    return [*(layer.saved_tensors().values() if hasattr(layer, "saved_tensors") else (layer.keys, layer.values))]


def is_hybrid(cache) -> bool:
    """Whether some layers are Transformers' own: they keep no mask, so that later calls have to give it for all columns."""
    return not all(hasattr(layer, "saved_tensors") for layer in cache.layers)
