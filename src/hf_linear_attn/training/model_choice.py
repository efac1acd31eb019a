"""From training options to a fresh model: the one place that knows how each family spells its config."""

import difflib
from typing import Any

from .options import TrainingOptions

# Families whose layers can look through windows.
WINDOWED_FAMILIES = ("leap", "fastformer")
DANET_WINDOW = 8  # of 8 and 32, the better one on the speeches in blocks of 512


def build_model(options: TrainingOptions, tokenizer) -> Any:
    """A model with new weights (drawn from PyTorch's global seed) that fits the tokenizer and the block length."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(build_config(options, tokenizer))


def build_config(options: TrainingOptions, tokenizer) -> Any:
    """Config of `options.family`. ValueError for an option or a config field that the family does not have."""
    from transformers import AutoConfig

    import hf_linear_attn  # noqa: F401  (registers our families)

    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": options.num_attention_heads,
        "max_position_embeddings": options.block_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if options.family == "gpt2":
        values |= dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), options.dropout)
        # The same tanh GELU as GPT-2's own, in PyTorch's fused spelling: the baseline gets its best speed.
        values["activation_function"] = "gelu_pytorch_tanh"
    else:
        values["hidden_dropout_prob"] = options.dropout  # and, by default, the attention_dropout
    if options.family == "danet":
        values |= _danet_fields(options)
    values |= _window_fields(options)
    if options.position_embedding is not None:
        if options.family not in ("leap", "danet"):
            raise ValueError(f"position_embedding is a choice of leap and danet, not of {options.family}")
        values["position_embedding_type"] = options.position_embedding
    default = AutoConfig.for_model(options.family)
    for key in options.config_fields():
        _check_field(default, key, options.family)
    return AutoConfig.for_model(options.family, **(values | options.config_fields()))


def _danet_fields(options: TrainingOptions) -> dict[str, Any]:
    """The published decoder's design, with windows for short blocks and global layers scaled for the length trained at."""
    if not options.causal:
        raise ValueError("danet has an encoder and a decoder, and language models that write are decoders: give causal")
    return {
        "is_causal": True,
        "layer_pattern": "sw_sw_g",
        "window_size": DANET_WINDOW,
        "ffn_type": "swiglu",
        "scale_length": options.block_length,
        "attention_dropout": options.dropout,
    }


def _window_fields(options: TrainingOptions) -> dict[str, Any]:
    if options.windows is None and not options.all_global:
        return {}
    if options.family not in WINDOWED_FAMILIES:
        raise ValueError(f"windows and all_global belong to {', '.join(WINDOWED_FAMILIES)}, not to {options.family}")
    return {"use_local_attention": False} if options.all_global else {"layer_windows": options.layer_windows()}


def _check_field(config: Any, key: str, family: str) -> None:
    known = set(config.to_dict()) | set(config.attribute_map)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"config: the config of {family} has no field {key!r}{hint}")
