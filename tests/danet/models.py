"""Small DANet models for the tests: weights large enough that every layer, position and window matters."""

import torch

from hf_linear_attn import (
    DanetConfig,
    DanetForCausalLM,
    DanetForMaskedLM,
    DanetForMultipleChoice,
    DanetForPreTraining,
    DanetForQuestionAnswering,
    DanetForSequenceClassification,
    DanetForTokenClassification,
)

VOCAB = 37
ENCODER_HEADS = [
    DanetForPreTraining,
    DanetForMaskedLM,
    DanetForSequenceClassification,
    DanetForTokenClassification,
    DanetForQuestionAnswering,
    DanetForMultipleChoice,
]

ENCODERS = {
    "learned g relu": {"position_embedding_type": "learned", "max_position_embeddings": 64},
    "rotary l_sl_g swiglu": {
        "layer_pattern": "l_sl_g",
        "ffn_type": "swiglu",
        "pre_norm": "scaled_max_norm",
        "post_norm": "prescaled_max_norm",
        "embedding_norm": "standard_ln",
        "final_norm": "standard_ln",
    },
    "cosine qkv l_sl_g": {"position_embedding_type": "cosine", "relpe_scheme": "qkv", "layer_pattern": "l_sl_g"},
    "softmax g": {"layer_pattern": "softmax_g_l", "softmax_attention_heads": 2},
    "l@softmax_sl@softmax_g": {"layer_pattern": "l@softmax_sl@softmax_g", "softmax_attention_heads": 2},
}

DECODERS = {
    "g": {"layer_pattern": "g"},
    "sw_sw_g swiglu": {"layer_pattern": "sw_sw_g", "ffn_type": "swiglu"},
    "l_sl_g learned": {
        "layer_pattern": "l_sl_g",
        "position_embedding_type": "learned",
        "max_position_embeddings": 64,
    },
    "swa@softmax_g_l": {"layer_pattern": "swa@softmax_g_l", "softmax_attention_heads": 2},
    "l@softmax_sl@softmax_g": {"layer_pattern": "l@softmax_sl@softmax_g", "softmax_attention_heads": 2},
}


def config(**kwargs):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "window_size": 4,
        "chunk_size": 4,
        "scale_length": 16,
        "initializer_range": 0.4,
        "query_initializer_range": 0.4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return DanetConfig(**{**values, **kwargs})


def build(model_class, seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    model = model_class(config(**kwargs)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # gains that are not all one
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def encoder(name, model_class=DanetForMaskedLM, **kwargs):
    return build(model_class, **{**ENCODERS[name], **kwargs})


def decoder(name, model_class=DanetForCausalLM, **kwargs):
    return build(model_class, is_causal=True, **{**DECODERS[name], **kwargs})


def tokens(*shape, seed=0):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows, side, width, seed=9):
    """Rows of different lengths in one batch of `width` columns: random ids under the padding, which must not matter."""
    ids, mask = tokens(len(rows), width, seed=seed), torch.zeros(len(rows), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for i, row in enumerate(rows):
        n = len(row)
        if side == "inside":
            where = torch.randperm(width, generator=generator)[:n].sort().values
        else:
            start = {"left": width - n, "right": 0, "both": (width - n) // 2}[side]
            where = torch.arange(start, start + n)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask
