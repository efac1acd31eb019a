"""Published DANet checkpoints into `DanetForPreTraining`, and the fusion of norm weights into projections.

Source: DANet specification, sections 2, 5 and 10.
"""

import copy
import re
from typing import Any

import torch

from ..modeling.danet.block import DanetBlock
from ..modeling.danet.configuration_danet import DanetConfig
from ..modeling.danet.modeling_danet import DanetForPreTraining, DanetPreTrainedModel
from ..modeling.danet.norms import build_norm
from .published import load_exactly, rename

# published field -> ours, where the value needs no thought
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_expansion",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_complexity": "attention_mode",
    "attention_probs_dropout_prob": "attention_dropout",
    "pre_attn_ln_type": "pre_norm",
    "post_attn_ln_type": "post_norm",
    "max_position_embeddings": "max_position_embeddings",
    "token_type_embeddings": "use_token_type",
    "type_vocab_size": "type_vocab_size",
    "embedding_ln_type": "embedding_norm",
    "initializer_range": "initializer_range",
    "embedding_dropout": "embedding_dropout",
    "relpe_scheme": "relpe_scheme",
    "final_ln_type": "final_norm",
    "pooler_function": "pooler",
    "pooler_act": "pooler_act",
    "pooler_ln_type": "pooler_norm",
    "classifier_bias": "classifier_bias",
    "lm_head_act": "lm_head_act",
    "lm_head_ln_type": "lm_head_norm",
    "causal": "is_causal",
    "chunk_size": "chunk_size",
    "window_size": "window_size",
    "local_relpe": "local_relpe",
    "transformer_heads": "softmax_attention_heads",
    "attn_proj_biases": "attention_bias",
}
_HANDLED = {"pos_emb_type", "relpe_type", "swiglu_ffn", "pooler_no_dense", "local_attention", "local_scheme"}
_WITHOUT_EFFECT = {
    "hidden_act",
    "hybrid",
}  # the published feed-forward layer is always ReLU; the scheme names hybrid layers
_RELATIVE = {"rope": "rotary", "cosine": "cosine", "cos_minus_sin": "cos_minus_sin", None: "none"}

# Published defaults that differ from ours, for configuration files that leave a field out.
_DEFAULTS = {
    "embedding_ln_type": "hardtanh",
    "final_ln_type": None,
    "lm_head_ln_type": "uncentered_ln",
    "pooler_function": "mean",
    "pooler_act": "gelu",
    "pos_emb_type": "learned",
    "relpe_type": None,
    "relpe_scheme": "qkv",
    "local_attention": False,
    "local_scheme": "l_sl_g",
    "chunk_size": 1024,
}

_NAMES = [
    (r"bert\.embeddings\.word_embeddings\.", "model.embed_tokens."),
    (r"bert\.embeddings\.position_embeddings\.", "model.embed_positions."),
    (r"bert\.embeddings\.token_type_embeddings\.", "model.embed_token_types."),
    (r"bert\.embeddings\.LayerNorm\.", "model.embedding_norm."),
    (r"bert\.encoder\.FinalLayerNorm\.", "model.norm."),
    (r"bert\.encoder\.layer\.(\d+)\.activation\.", r"model.layers.\1.pre_norm."),
    (r"bert\.encoder\.layer\.(\d+)\.attention\.queries$", r"model.layers.\1.attention.query_proj.weight"),
    (r"bert\.encoder\.layer\.(\d+)\.ffn\.expanding_weight$", r"model.layers.\1.mlp.up_proj.weight"),
    (r"bert\.encoder\.layer\.(\d+)\.ffn\.contracting_weight$", r"model.layers.\1.mlp.down_proj.weight"),
    (r"bert\.encoder\.layer\.(\d+)\.ffn\.c_up\.", r"model.layers.\1.mlp.gate_up_proj."),
    (r"bert\.encoder\.layer\.(\d+)\.ffn\.c_proj\.", r"model.layers.\1.mlp.down_proj."),
    (r"bert\.encoder\.layer\.(\d+)\.ffn_activation\.", r"model.layers.\1.post_norm."),
    (r"bert\.pooler\.dense_act\.", "pooler.dense."),
    (r"bert\.pooler\.layer_norm\.", "pooler.norm."),
    (r"cls\.predictions\.bias$", "lm_head.decoder.bias"),
    (r"cls\.predictions\.transform\.dense_act\.", "lm_head.dense."),
    (r"cls\.predictions\.transform\.LayerNorm\.", "lm_head.norm."),
    (r"cls\.predictions\.decoder\.", "lm_head.decoder."),
    (r"cls\.seq_relationship\.", "seq_relationship."),
]
_SINUSOIDS = "bert.embeddings.position_embeddings.pe"
_TRANSPOSED = ("ffn.expanding_weight", "ffn.contracting_weight")


def config_from_published(config: dict[str, Any]) -> DanetConfig:
    """Our configuration from the published fields, with the published behaviour switched on.

    That is: scale by the number of real tokens, pooling over padding, epsilon 1e-3 in MaxNorm, no cache.
    Raises ValueError for a field that is unknown or that this family does not reproduce.
    """
    published = {**_DEFAULTS, **config}
    ours: dict[str, Any] = {}
    for name, value in published.items():
        if name in _FIELDS:
            ours[_FIELDS[name]] = value
        elif name == "default_ffn_norm" and value is not None:
            raise ValueError(
                "`default_ffn_norm` is set: merge the scaled feed-forward weights first, then leave it out"
            )
        elif name not in _HANDLED | _WITHOUT_EFFECT | {"default_ffn_norm"}:
            raise ValueError(f"unknown published field {name!r}; known are {sorted(set(_FIELDS) | _HANDLED)}")
    ours["ffn_type"] = "swiglu" if published.get("swiglu_ffn") else "relu"
    ours["pooler_dense"] = not published.get("pooler_no_dense", False)
    if not ours["pooler_dense"]:
        ours["pooler_norm"] = None  # the published pooler has neither then
    ours["layer_pattern"] = published["local_scheme"] if published["local_attention"] else "g"
    kind = str(published["pos_emb_type"]).lower().split(".")[-1]
    if kind == "relpe":
        relative = published["relpe_type"]
        if isinstance(relative, str):
            relative = relative.lower()  # the published code ignores the case, too
        if relative not in _RELATIVE:
            raise ValueError(f"`relpe_type` is {relative!r}, expected one of {list(_RELATIVE)}")
        kind = _RELATIVE[relative]
    ours["position_embedding_type"] = kind
    if kind == "rotary" and ours.get("num_attention_heads", 1) > 1:
        raise ValueError(
            "published rotary positions with several heads turn pairs across heads, so that scores are no function of the "
            "distance; this family turns each head by itself and cannot reproduce that. One head is exact"
        )
    return DanetConfig(**ours, scale_mode="valid_length", pooler_mask_padding=False, maxnorm_eps=1e-3, use_cache=False)


def from_published(family: str, config: dict, state_dict: dict[str, torch.Tensor]) -> DanetForPreTraining:
    """See `hf_linear_attn.conversion.from_published`. A checkpoint under the key "module" is unwrapped."""
    state_dict = state_dict.get("module", state_dict)
    model = DanetForPreTraining(config_from_published(config))
    if model.config.position_embedding_type == "sinusoidal":  # computed here, a saved table there
        state_dict = {name: tensor for name, tensor in state_dict.items() if name != _SINUSOIDS}
    turned = {name: tensor.T if name.endswith(_TRANSPOSED) else tensor for name, tensor in state_dict.items()}
    load_exactly(model, rename(turned, _our_name))
    return model.eval()


def _our_name(name: str) -> str | None:
    for pattern, replacement in _NAMES:
        ours, found = re.subn("^" + pattern, replacement, name)
        if found:
            return ours
    return None


def fuse_norm_weights(model: DanetPreTrainedModel, pre: bool = True, post: bool = True) -> DanetPreTrainedModel:
    """A copy of `model` whose MaxNorms carry no gains: they are multiplied into the projections around them.

    * `pre_norm="scaled_max_norm"` with gain g, D = diag(g): W <- D W D, and D into the first feed-forward matrix. Exact
      without positions in the layers and with (elementwise) cosine positions.
    * `post_norm="prescaled_max_norm"` with gain u: diag(u) into the last feed-forward matrix. Always exact.

    Raises ValueError for other norms, and for `pre` under rotary positions: a rotation mixes features j and j + D/2, so it does
    not commute with a gain for each feature. `pre=False` then fuses the post-norms alone.
    """
    config = model.config
    if pre and config.pre_norm != "scaled_max_norm":
        raise ValueError(
            f"`pre_norm` is {config.pre_norm!r}; only the gains of 'scaled_max_norm' can be fused: `pre=False`"
        )
    if post and config.post_norm != "prescaled_max_norm":
        raise ValueError(
            f"`post_norm` is {config.post_norm!r}; only the gains of 'prescaled_max_norm' can be fused: `post=False`"
        )
    if pre and config.position_embedding_type == "rotary":
        raise ValueError(
            "the gains of `pre_norm` cannot be fused under rotary positions: a rotation mixes features j and j + D/2, so it "
            "does not commute with a gain for each feature. Pass `pre=False` to fuse the post-norms alone"
        )
    fused = copy.deepcopy(model)
    for name, wanted in (("pre_norm", pre), ("post_norm", post)):
        if wanted:
            setattr(fused.config, name, "fixed_max_norm")  # the same norm and epsilon without a gain
    for block in fused.modules():
        if isinstance(block, DanetBlock):
            _fuse_block(block, pre, post)
    return fused


@torch.no_grad()
def _fuse_block(block: DanetBlock, pre: bool, post: bool) -> None:
    eps = block.config.scaled_norm_eps
    width = block.config.hidden_size
    if pre:
        gain = block.pre_norm.weight
        first = block.mlp.gate_up_proj if block.mlp.gated else block.mlp.up_proj
        block.attention.query_proj.weight.mul_(gain[:, None] * gain)
        first.weight.mul_(gain)
        block.pre_norm = build_norm("fixed_max_norm", width, scaled_norm_eps=eps)
    if post:
        block.mlp.down_proj.weight.mul_(block.post_norm.weight[:, None])
        block.post_norm = build_norm("fixed_max_norm", width, scaled_norm_eps=eps)
