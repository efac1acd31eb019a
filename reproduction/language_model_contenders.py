"""The contenders of `reproduction.language_models`: six causal language models of equal depth of field and equal size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.peers import gpt2

from .training import Hyperparameters


@dataclass(frozen=True)
class Setting:
    """Size of the GPT-2 whose number of parameters all models get, and the recipe."""

    hidden_size: int
    num_layers: int
    num_heads: int
    recipe: Hyperparameters


def build(name: str, setting: Setting, vocab_size: int) -> Any:
    """A model with new weights. Its feed-forward layers are as wide as brings its parameters nearest to GPT-2's."""
    make = (MODELS | VARIANTS)[name]
    with torch.device("meta"):  # shapes alone
        target = _count(_gpt2(setting, vocab_size, 4 * setting.hidden_size))
        small, large = (_count(make(setting, vocab_size, width)) for width in (8, 16))
    width = 8 + 8 * round((target - small) / (large - small))
    return make(setting, vocab_size, width)


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _gpt2(setting: Setting, vocab_size: int, width: int) -> Any:
    size = (setting.hidden_size, setting.num_layers, setting.num_heads, setting.recipe.length)
    return gpt2(vocab_size, *size, n_inner=width)


def _llama(setting: Setting, vocab_size: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=setting.hidden_size,
            num_hidden_layers=setting.num_layers,
            num_attention_heads=setting.num_heads,
            num_key_value_heads=setting.num_heads,
            intermediate_size=width,
            max_position_embeddings=setting.recipe.length,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _averaging(
    family: str, setting: Setting, vocab_size: int, width: int, windows: bool = True, more_heads: int = 1, **fields: Any
) -> Any:
    """LEAP or Fastformer: weighted running means, over windows or over everything so far."""
    import hf_linear_attn

    config, model = {
        "leap": (hf_linear_attn.LeapConfig, hf_linear_attn.LeapForCausalLM),
        "fastformer": (hf_linear_attn.FastformerConfig, hf_linear_attn.FastformerForCausalLM),
    }[family]
    return model(
        config(
            vocab_size=vocab_size,
            hidden_size=setting.hidden_size,
            num_hidden_layers=setting.num_layers,
            num_attention_heads=more_heads * setting.num_heads,
            intermediate_size=width,
            max_position_embeddings=setting.recipe.length,
            use_local_attention=windows,
            hidden_dropout_prob=0.0,
            **fields,
        )
    )


def _leap_wide(setting: Setting, *sizes: int, **fields: Any) -> Any:
    """Windows that double from layer to layer up to 64, and one global layer, the last."""
    windows = [min(64, 4 * 2**layer) for layer in range(setting.num_layers - 1)]
    return _averaging("leap", setting, *sizes, layer_windows=[*windows, None], **fields)


def _danet(setting: Setting, vocab_size: int, width: int, **fields: Any) -> Any:
    """The published decoder (preset gpt-360m), scaled down: windows of half the length, and a third more layers than the
    Transformers', because a layer has one projection in place of four.
    """
    from hf_linear_attn import DanetConfig, DanetForCausalLM

    length = setting.recipe.length
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": setting.hidden_size,
        "num_hidden_layers": round(setting.num_layers * 4 / 3),
        "intermediate_size": width,
        "window_size": length // 2,
        "scale_length": length,
        "max_position_embeddings": length,
        "chunk_size": None,
    }
    return DanetForCausalLM(DanetConfig.preset("gpt-360m", **(sizes | fields)))


def _leap_preset(preset: str, setting: Setting, vocab_size: int, width: int, **fields: Any) -> Any:
    from hf_linear_attn import LeapConfig, LeapForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": setting.hidden_size,
        "num_hidden_layers": setting.num_layers,
        "num_attention_heads": setting.num_heads,
        "intermediate_size": width,
        "hidden_dropout_prob": 0.0,
    }
    return LeapForCausalLM(LeapConfig.preset(preset, **(sizes | fields)))


def _danet_preset(preset: str, setting: Setting, vocab_size: int, width: int, **fields: Any) -> Any:
    """A third more layers than the Transformers', as `_danet`."""
    from hf_linear_attn import DanetConfig, DanetForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": setting.hidden_size,
        "num_hidden_layers": round(setting.num_layers * 4 / 3),
        "intermediate_size": width,
        "scale_length": setting.recipe.length,
        "max_position_embeddings": setting.recipe.length,
    }
    return DanetForCausalLM(DanetConfig.preset(preset, **(sizes | fields)))


MODELS: dict[str, Callable[[Setting, int, int], Any]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "leap-windowed": partial(_averaging, "leap"),
    "leap-global": partial(_averaging, "leap", windows=False),
    "fastformer": partial(_averaging, "fastformer"),
    "danet": _danet,
}

# Tried where a published claim did not hold: what the published model has, changed in one respect.
GLUE_NORMS = {
    "pre_norm": "scaled_max_norm",
    "post_norm": "prescaled_max_norm",
    "embedding_norm": "standard_ln",
    "final_norm": "standard_ln",
}
VARIANTS: dict[str, Callable[[Setting, int, int], Any]] = {
    "danet-relu": partial(_danet, ffn_type="relu"),
    "danet-scaled-norms": partial(_danet, **GLUE_NORMS),
    "danet-all-global": partial(_danet, layer_pattern="g"),
    "danet-window-64": partial(_danet, window_size=64),
    "danet-window-16": partial(_danet, window_size=16),
    "danet-more-heads": lambda setting, *sizes: _danet(setting, *sizes, num_attention_heads=setting.num_heads),
    "danet-large-initial-weights": partial(_danet, initializer_range=0.05),
    "danet-three-changes": lambda setting, *sizes: _danet(
        setting, *sizes, window_size=16, num_attention_heads=setting.num_heads, initializer_range=0.05
    ),
    "leap-rotary": partial(_averaging, "leap", position_embedding_type="rotary"),
    "leap-exp": partial(_averaging, "leap", focus_function="exp"),
    "leap-wide": _leap_wide,
    "leap-hybrid": partial(_leap_preset, "hybrid"),
    "leap-fixed-state": partial(_leap_preset, "fixed-state"),
    "danet-hybrid": partial(_danet_preset, "hybrid"),
    "danet-fixed-state": partial(_danet_preset, "fixed-state"),
    "leap-fixed-state-no-positions": partial(_leap_preset, "fixed-state", position_embedding_type="none"),
    "leap-hybrid-no-positions": partial(_leap_preset, "hybrid", position_embedding_type="none"),
    "leap-decay-alone": lambda setting, *sizes: _leap_preset(
        "fixed-state", setting, *sizes, layer_windows=["decay"] * setting.num_layers, position_embedding_type="none"
    ),
    "danet-fixed-state-fading": partial(_danet_preset, "fixed-state", layer_pattern="softmax:128_decay"),
    "leap-more-heads": partial(_averaging, "leap", more_heads=4),
    "leap-wide-more-heads": partial(_leap_wide, more_heads=4),
}
