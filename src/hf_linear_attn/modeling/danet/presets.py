"""DANet configurations by name: `PRESETS`, the published ones (specification, sections 5.2 and 5.3), and `DECODERS` of any size.

Of the latter "published" has the layers of the published decoder. "fixed-state", whose state does not grow, and "hybrid" have
what this package's own runs found to count most on text: short windows, heads of 64 features, initial weights of 0.05; and
some layers of softmax attention, over the last 128 tokens or over the whole text.
"""

from typing import Any

_BERT = {
    "vocab_size": 30528,
    "hidden_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 1,
    "max_position_embeddings": 512,
    "embedding_norm": "max_norm",
    "final_norm": "max_norm",
    "pooler": "first",
    "pooler_act": "tanh",
    "classifier_bias": True,
}
_ROTARY = {"position_embedding_type": "rotary", "relpe_scheme": "q,k"}
_LOCAL_32 = {"layer_pattern": "l_sl_g", "window_size": 32}
_GPT = {
    **_BERT,
    **_ROTARY,
    "vocab_size": 50304,
    "ffn_type": "swiglu",
    "is_causal": True,
    "max_position_embeddings": 2048,
    "scale_length": 2048,
    "chunk_size": 2048,
    "pad_token_id": None,
}
_LRA = {
    "position_embedding_type": "cosine",
    "relpe_scheme": "qkv",
    "layer_pattern": "l_sl_g",
    "initializer_range": 0.2,
    "embedding_norm": "max_norm",
    "final_norm": None,
    "lm_head_norm": "uncentered_ln",
    "pooler": "first",
    "hidden_dropout_prob": 0.1,
    "attention_dropout": 0.1,
}
_PATHFINDER = {
    **_LRA,
    "vocab_size": 264,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "ffn_expansion": 1,
    "embedding_norm": "hardtanh",
    "hidden_dropout_prob": 0.05,
    "attention_dropout": 0.05,
}
_PATH_X = {**_PATHFINDER, "window_size": 1024, "max_position_embeddings": 16384, "pooler_norm": "uncentered_fixed_ln"}

_DECODER = {"is_causal": True, "ffn_type": "swiglu"}
_SMALL_HEADS = {**_DECODER, "window_size": 16, "initializer_range": 0.05, "head_size": 64}
# Of any size; `head_size` stands for numbers of heads, see `with_heads`.
DECODERS: dict[str, dict[str, Any]] = {
    "published": {**_DECODER, "layer_pattern": "sw_sw_g"},
    "fixed-state": {**_SMALL_HEADS, "layer_pattern": "softmax:128_g"},
    "hybrid": {**_SMALL_HEADS, "layer_pattern": "sw_sw_sw_softmax"},
}

PRESETS: dict[str, dict[str, Any]] = {
    # Encoders. "bert-large-128" is the one of the published speed tables.
    "bert-large": {**_BERT, "position_embedding_type": "learned"},
    "bert-large-128": {**_BERT, "position_embedding_type": "learned", "max_position_embeddings": 128},
    "bert-large-rotary": {**_BERT, **_ROTARY, **_LOCAL_32},
    "bert-large-rotary-swiglu": {
        **_BERT,
        **_ROTARY,
        **_LOCAL_32,
        "ffn_type": "swiglu",
        "embedding_norm": "standard_ln",
        "final_norm": "standard_ln",
    },
    "bert-large-glue": {
        **_BERT,
        **_ROTARY,
        **_LOCAL_32,
        "ffn_type": "swiglu",
        "pre_norm": "scaled_max_norm",
        "post_norm": "prescaled_max_norm",
        "embedding_norm": "standard_ln",
        "final_norm": "standard_ln",
    },
    # Decoders.
    "gpt-360m": {**_GPT, "layer_pattern": "sw_sw_g", "window_size": 1024},
    "gpt-hybrid-360m": {
        **_GPT,
        "num_hidden_layers": 26,
        "layer_pattern": "swa@softmax_swa@softmax_g",
        "window_size": 256,
        "softmax_attention_heads": 8,
    },
    # Long Range Arena. Dropout is that of the published recipe for each task.
    "lra-listops": {
        **_LRA,
        "vocab_size": 32,
        "hidden_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "ffn_expansion": 2,
        "window_size": 20,
        "max_position_embeddings": 2000,
    },
    "lra-text": {
        **_LRA,
        "vocab_size": 256,
        "hidden_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "ffn_expansion": 2,
        "window_size": 10,
        "max_position_embeddings": 4000,
        "pooler": "mean",
        "pooler_norm": "uncentered_fixed_ln",
    },
    "lra-retrieval": {
        **_LRA,
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "window_size": 10,
        "max_position_embeddings": 4000,
        "hidden_dropout_prob": 0.05,
        "attention_dropout": 0.05,
    },
    "lra-image": {
        **_LRA,
        "vocab_size": 264,
        "hidden_size": 256,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "ffn_expansion": 2,
        "window_size": 64,
        "max_position_embeddings": 1024,
        "embedding_norm": "hardtanh",
        "pooler": "mean",
        "pooler_act": "legacy_gelu",
        "hidden_dropout_prob": 0.05,
        "attention_dropout": 0.05,
    },
    "lra-pathfinder": {**_PATHFINDER, "window_size": 256, "max_position_embeddings": 1024, "pooler_dense": False},
    "lra-pathx": _PATH_X,
    "lra-pathfinder-256": {**_PATH_X, "hidden_dropout_prob": 0.1, "attention_dropout": 0.1},
}


def with_heads(fields: dict[str, Any], width: int) -> dict[str, Any]:
    """The fields of a preset with numbers of heads in the place of `head_size`: the most that leave heads of an even size, and no
    smaller than that, in `width` features.
    """
    fields = dict(fields)
    size = fields.pop("head_size", None)
    if size is None:
        return fields
    fitting = [heads for heads in range(1, width // size + 1) if width % (2 * heads) == 0]
    heads = max(fitting, default=1)
    return {"num_attention_heads": heads, "softmax_attention_heads": heads, **fields}
