"""The hosts that SEA can work in: Transformers' own models, whose attention layers get a SEA core as a sub-module."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Host:
    """What SEA has to know of a host.

    Attributes:
        attention_class: name of the class whose instances are its self-attention layers.
        base_name: the attribute that holds the body in the host's models with heads (their `base_model_prefix`).
        causal: whether a token sees only earlier ones.
        learned_positions: whether its position table bounds the length.
        token_types: whether its forward takes `token_type_ids`.
        exits_early: whether its body runs as many of its layers as `num_hidden_layers` says, which changes while it drafts.
        sharded: the body's modules that FSDP2 shards each for itself: embeddings, layers, last norm.
    """

    attention_class: str
    base_name: str
    causal: bool
    learned_positions: bool
    token_types: bool = False
    exits_early: bool = False
    sharded: tuple[str, str, str | None] = ("embed_tokens", "layers.*", "norm")

    @property
    def fsdp_plan(self) -> dict[str, str]:
        """The body's `base_model_fsdp_plan`, which Transformers itself states for Llama's names only."""
        embeddings, layers, norm = self.sharded
        plan = {embeddings: "free_full_weight", layers: "free_full_weight"}
        return plan if norm is None else plan | {norm: "keep_full_weight"}


HOSTS = {
    "bert": Host(
        "BertSelfAttention",
        "bert",
        causal=False,
        learned_positions=True,
        token_types=True,
        sharded=("embeddings", "encoder.layer.*", None),
    ),
    "llama": Host("LlamaAttention", "model", causal=True, learned_positions=False, exits_early=True),
    "opt": Host(
        "OPTAttention",
        "model",
        causal=True,
        learned_positions=True,
        sharded=("decoder.embed_tokens", "decoder.layers.*", "decoder.final_layer_norm"),
    ),
    "gpt2": Host(
        "GPT2Attention",
        "transformer",
        causal=True,
        learned_positions=True,
        token_types=True,
        sharded=("wte", "h.*", "ln_f"),
    ),
}


def find_host(config: PreTrainedConfig) -> Host:
    """The entry of a host's configuration.

    Raises:
        ValueError: a model type that is not supported, or a variant of it that SEA is not defined for.
    """
    if config.model_type not in HOSTS:
        raise ValueError(
            f"SEA cannot be put into a model of type {config.model_type!r}; supported hosts: {', '.join(sorted(HOSTS))}"
        )
    host = HOSTS[config.model_type]
    if getattr(config, "add_cross_attention", False):
        raise ValueError("SEA replaces self-attention only: a host with add_cross_attention=True is not supported")
    if bool(getattr(config, "is_decoder", False)) and not host.causal:
        raise ValueError(
            f"a {config.model_type} host with is_decoder=True (causal) is not supported: use it as an encoder, or take one "
            f"of the causal hosts {', '.join(name for name, entry in HOSTS.items() if entry.causal)}"
        )
    if getattr(config, "is_causal", None) is False and host.causal:
        raise ValueError(f"a {config.model_type} host with is_causal=False is not supported: its SEA layers are causal")
    return host


def attention_layers(model: nn.Module, config: PreTrainedConfig) -> list[nn.Module]:
    """The self-attention modules of a host model, by layer.

    Raises:
        ValueError: their number is not that of the configuration's layers (another version of the host's code).
    """
    name = HOSTS[config.model_type].attention_class
    layers = [module for module in model.modules() if type(module).__name__ == name]
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"found {len(layers)} modules of class {name} in {type(model).__name__}, expected {config.num_hidden_layers}, one "
            "a layer: this version of Transformers builds the host differently"
        )
    return layers


def embedding_size(config: PreTrainedConfig) -> int:
    """Width of a host's embeddings, which OPT may project to the hidden size."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def head_size(config: PreTrainedConfig) -> int:
    """D of a host."""
    explicit = getattr(config, "head_dim", None)
    return explicit if explicit is not None else config.hidden_size // config.num_attention_heads


def key_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values of a host, fewer than of queries where these share them."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
