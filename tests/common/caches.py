"""How the tests speak of a cache, whose name differs between releases of Transformers.

Our own models take `cache=` and answer to `.cache` on every release, which is what the tests say throughout. Transformers' models
and messages know the release's name alone: `cache_keyword(cache)`, `cache_of(output)` and `CACHE_NAME` are for those.
"""

from hf_linear_attn.modeling.compat import CACHE_NAME, CACHE_NAMES, cache_keyword, cache_of

__all__ = ["CACHE_NAME", "CACHE_NAMES", "cache_keyword", "cache_of"]
