"""The hosts that SEA can work in: Transformers' own models, whose attention layers get a SEA core as a sub-module.

Padding is nothing to a host around its attention, too: it is embedded as 0, and BERT's pooler, which reads the first column, gets
the first real token of each row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..shared.compat import BertEmbeddings as EmbeddingsOfBert
from ..shared.compat import BertPooler as PoolerOfBert
from ..shared.sequence import blank_padding


@dataclass(frozen=True)
class Host:
    """What SEA has to know of a host.

    Attributes:
        attention_class: name of the class whose instances are its self-attention layers.
        base_name: the attribute that holds the body in the host's models with heads (their `base_model_prefix`).
        causal: whether a token sees only earlier ones.
        learned_positions: whether its position table bounds the length.
        token_types: whether its forward takes `token_type_ids`.
        embeds_padding: whether its embeddings are a module of ours that knows the padding.
        exits_early: whether its body runs as many of its layers as `num_hidden_layers` says, which changes while it drafts.
        sharded: the body's modules that FSDP2 shards each for itself: embeddings, layers, last norm.
    """

    attention_class: str
    base_name: str
    causal: bool
    learned_positions: bool
    token_types: bool = False
    embeds_padding: bool = False
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
        embeds_padding=True,
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


_mask: ContextVar[torch.Tensor | None] = ContextVar("mask", default=None)


@contextmanager
def padding_known(mask: torch.Tensor | None) -> Iterator[None]:
    """Within the block, and this thread, BERT's modules below know which tokens are real: (B, T) bool, None for all."""
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


class BertEmbeddings(EmbeddingsOfBert):
    """BERT's, which add positions and types to 0 where a token is padding."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs) -> torch.Tensor:
        """Ids (B, T), or embeddings (B, T, d) of the words, to (B, T, d)."""
        mask = _mask.get()
        if mask is not None and inputs_embeds is None:
            input_ids, inputs_embeds = None, blank_padding(self.word_embeddings(input_ids), mask)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)


class BertPooler(PoolerOfBert):
    """BERT's, which reads the first real token of each row instead of the first column."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, d)."""
        mask = _mask.get()
        if mask is not None:
            rows = torch.arange(mask.shape[0], device=mask.device)
            hidden_states = hidden_states[rows, mask.to(torch.uint8).argmax(dim=1)][:, None]
        return super().forward(hidden_states)


def know_padding(host: nn.Module) -> None:
    """Give BERT's modules that padding is something to their classes above: same parameters, names and code but for that."""
    classes = {EmbeddingsOfBert: BertEmbeddings, PoolerOfBert: BertPooler}
    for module in host.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


def tokens_for_host(model: PreTrainedModel, input_ids, inputs_embeds, mask: torch.Tensor | None) -> dict:
    """What a host model is given as tokens: ids, or embeddings with 0 at padding that its own embeddings would not know of."""
    if inputs_embeds is None:
        if mask is None or find_host(model.config).embeds_padding:
            return {"input_ids": input_ids}
        inputs_embeds = model.get_input_embeddings()(input_ids)
    return {"inputs_embeds": blank_padding(inputs_embeds, mask)}


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
