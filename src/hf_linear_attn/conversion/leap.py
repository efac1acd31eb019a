"""The published LEAP package (LEAP and causal Fastformer language models) into our classes (LEAP specification, section 9)."""

import re

import torch
from transformers import PreTrainedConfig

from ..families import CAUSAL_LM, FAMILIES
from .published import load_exactly, rename

# What the published configurations take a field for that is absent; ours have other defaults.
DEFAULTS = {"hidden_size": 256, "vocab_size": 32100, "n_heads": 4, "n_positions": 1024, "n_layer": 4}
# Fields of the published configurations that our configurations have under the same or an aliased name.
SHARED_FIELDS = set(DEFAULTS) | {
    "n_head", "window_sizes", "use_local_att", "hidden_dropout_prob", "initializer_range",
    "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
# And one that only those have whose family computes what it says.
OWN_FIELDS = {"rescale"}
# What `save_pretrained` writes beside them (the last two are old names), which says nothing about the function.
BOOKKEEPING = set(PreTrainedConfig().to_dict()) | {"_name_or_path", "torch_dtype"}

BLOCK_NAMES = {
    "leap.projections.weight": "attention.qfkv_proj.weight",
    "attention.projections.weight": "attention.qkv_proj.weight",
    "attention.query_attn": "attention.query_vector",
    "attention.key_attn": "attention.key_vector",
    "attn_norm": "attention_norm",
    "attention.attn_norm": "attention_norm",
    "boom": "mlp.up_proj",
    "unboom": "mlp.down_proj",
    "boom_norm": "mlp_norm",
}


def from_published(family: str, config: dict, state_dict: dict[str, torch.Tensor]):
    """See `hf_linear_attn.conversion.from_published`."""
    config_class, model_class = FAMILIES[family].config_class(), FAMILIES[family].head(CAUSAL_LM)
    fields = SHARED_FIELDS | (OWN_FIELDS & set(config_class.__dataclass_fields__))
    unknown = sorted(set(config) - fields - BOOKKEEPING)
    if unknown:
        hint = ""
        if "rescale" in unknown:
            hint = (
                ". `rescale` belongs to an earlier LEAP, whose weights are exp of standardised products: another function, "
                "which this family does not compute"
            )
        raise ValueError(
            f"`config` has fields that the published {family} does not know: {unknown}; known: {sorted(fields)}{hint}"
        )
    values = DEFAULTS | {name: value for name, value in config.items() if name in fields}
    if "n_head" in values:
        values["n_heads"] = values.pop("n_head")
    windows = values.pop("window_sizes", None)
    ours = config_class(**values)
    if windows is not None:
        # A window as long as the positions is what the published package calls global.
        bound = ours.max_position_embeddings
        windows = [None if w in (None, "global") or w >= bound else int(w) for w in windows]
        ours = config_class(**values, layer_windows=windows)
    model = model_class(ours)
    load_exactly(model, rename(state_dict, _our_name))
    return model.eval()


def _our_name(name: str) -> str | None:
    fixed = {
        "word_embedding.weight": "model.embed_tokens.weight",
        "last_norm.weight": "model.norm.weight",
        "last_norm.bias": "model.norm.bias",
        "proj_logits.bias": "lm_head.bias",
        "proj_logits.weight": "lm_head.weight",
    }
    if name in fixed:
        return fixed[name]
    name = re.sub(r"^\w+_model\.", "", name)
    if name == "position_embeddings.weight":
        return "model.embed_positions.weight"
    found = re.fullmatch(r"decoders\.(\d+)\.(.+)", name)
    if found is None:
        return None
    layer, inner = found.groups()
    if inner in BLOCK_NAMES:
        return f"model.layers.{layer}.{BLOCK_NAMES[inner]}"
    module, _, kind = inner.rpartition(".")
    if module in BLOCK_NAMES and kind in ("weight", "bias"):
        return f"model.layers.{layer}.{BLOCK_NAMES[module]}.{kind}"
    return None
