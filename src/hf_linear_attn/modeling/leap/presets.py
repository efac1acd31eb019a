"""LEAP configurations by name.

"published" is the model of the specification. The other two have the parts that published ablations and this package's own
prototypes found to count most: weights that fade, a short convolution, a norm a head, a gate, a projection, RMSNorm and SwiGLU;
and every third layer is softmax attention: over the last 128 tokens in "fixed-state", whose state does not grow, over the whole
text in "hybrid".
"""

from typing import Any

_MODERN = {
    "conv_kernel": 4,
    "output_gate": True,
    "head_norm": True,
    "output_projection": True,
    "norm_type": "rmsnorm",
    "ffn_type": "swiglu",
    "position_embedding_type": "rotary",
}

# `layer_cycle` is repeated over the layers; so many heads of queries share one of keys in softmax layers (`softmax_group`), where
# their number divides.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "fixed-state": {**_MODERN, "layer_cycle": ["decay", "decay", "softmax:128"], "softmax_group": 2},
    "hybrid": {**_MODERN, "layer_cycle": ["decay", "decay", "softmax"]},
}
