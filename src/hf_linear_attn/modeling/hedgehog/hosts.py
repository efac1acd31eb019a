"""Which pretrained Transformers Hedgehog fits, asked of their structure and not of their names.

A host is a causal model whose every layer has one self-attention module that hands queries, keys and values (B, heads, T, D),
already turned by their positions, to the attention function of Transformers' registry. What that function returns is all that
changes.
"""

import inspect

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION_NAME = "hf_linear_attn_hedgehog"  # of the function that hosts call, in Transformers' registry
FITTING = "Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma, GPT-2, OPT and models built like them"
SOFTMAX_TYPES = ("full_attention", "sliding_attention")

# Names of embeddings, layers and last norm of a body, by the type of its configuration; else those of Llama.
NAMES = {
    "gpt2": ("wte", "h.*", "ln_f"),
    "gpt_neox": ("embed_in", "layers.*", "final_layer_norm"),
    "opt": ("decoder.embed_tokens", "decoder.layers.*", "decoder.final_layer_norm"),
    "phi": ("embed_tokens", "layers.*", "final_layernorm"),
}


def fsdp_plan(config: PreTrainedConfig) -> dict[str, str]:
    """What FSDP2 shards of a host's body, each by itself; Transformers states it for Llama's names."""
    embeddings, layers, norm = NAMES.get(config.model_type, ("embed_tokens", "layers.*", "norm"))
    return {embeddings: "free_full_weight", layers: "free_full_weight", norm: "keep_full_weight"}


def head_size(config: PreTrainedConfig) -> int:
    """D of a host."""
    explicit = getattr(config, "head_dim", None)
    return explicit if explicit is not None else config.hidden_size // config.num_attention_heads


def key_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values of a host, fewer than of queries where these share them."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def softmax_type(config: PreTrainedConfig, layer: int) -> str:
    """How a layer of the host attends, in the words of Transformers' caches."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return types[layer]
    return "full_attention" if sliding_window(config) is None else "sliding_attention"


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that the host's sliding layers see, its own included; None where it has none."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if types is not None and "sliding_attention" not in types:
        return None
    return window if getattr(config, "use_sliding_window", True) else None


def check_host(config: PreTrainedConfig) -> None:
    """Refuse a configuration whose models Hedgehog does not fit, as far as it tells.

    Raises:
        ValueError: with the reason.
    """
    reason = _why_not(config)
    if reason is not None:
        raise ValueError(
            f"Hedgehog cannot be put into a model of type {config.model_type!r}: {reason}. Hosts that fit: {FITTING}"
        )


def _why_not(config: PreTrainedConfig) -> str | None:
    needed = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
    lacking = [name for name in needed if not hasattr(config, name)]
    if lacking:
        return f"its configuration has no `{lacking[0]}` (of several models in one, give that of the text part)"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder with a decoder, and Hedgehog replaces causal self-attention only"
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention (`add_cross_attention=True`)"
    if getattr(config, "is_causal", None) is False or getattr(config, "use_bidirectional_attention", False):
        return "its tokens see later ones"
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - set(SOFTMAX_TYPES))
    if foreign:
        return f"it has layers of type {foreign[0]!r}, expected {' or '.join(map(repr, SOFTMAX_TYPES))} throughout"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers read keys and values of others (`num_kv_shared_layers`)"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "its keys and values are of different sizes (`kv_lora_rank`)"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"its logits are more than a matrix times the last hidden states (`{name}`={getattr(config, name)})"
    return None


def attention_layers(host: nn.Module, config: PreTrainedConfig) -> list[nn.Module]:
    """The self-attention modules of a host's body, by layer.

    Raises:
        ValueError: it has none, or not one a layer, or does not call Transformers' attention functions.
    """
    name = type(host).__name__
    layers = [m for m in host.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "is_causal")]
    if not getattr(host, "_supports_attention_backend", False):
        reason = "its attention does not go through Transformers' attention functions"
    elif [layer.layer_idx for layer in layers] != list(range(config.num_hidden_layers)):
        found = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        wanted = f"one in each of its {config.num_hidden_layers} layers"
        reason = f"it has {len(layers)} self-attention modules ({found}), expected {wanted}"
    elif not all(layer.is_causal for layer in layers):
        reason = "its tokens see later ones"
    elif any(list(layer.parameters(recurse=False)) for layer in layers):
        own = next(name for layer in layers for name, _ in layer.named_parameters(recurse=False))
        reason = f"its attention has a parameter beside its projections (`{own}`), which would be ignored"
    else:
        return layers
    raise ValueError(f"Hedgehog cannot be put into a {name}: {reason}. Hosts that fit: {FITTING}")


def learned_positions(host: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether the host has a table of positions, which bounds the length: one of that many rows, or two more (OPT's)."""
    most = config.max_position_embeddings
    tables = [m for m in host.modules() if isinstance(m, nn.Embedding) and m is not host.get_input_embeddings()]
    return any(most <= table.num_embeddings <= most + 2 for table in tables)


def exits_early(host: PreTrainedModel) -> bool:
    """Whether the body runs as many of its layers as `num_hidden_layers` says, which is fewer while it drafts."""
    return "num_hidden_layers" in inspect.unwrap(type(host).forward).__code__.co_names


def name_in(host: nn.Module, part: nn.Module) -> str:
    """The name of a module within another."""
    return next(name for name, module in host.named_modules() if module is part)
