"""Configuration of the Hedgehog family: that of a pretrained Transformer, and what takes the place of its attention."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from ..shared.configuration import (
    LARGEST_SIZE,
    DerivedLayerTypes,
    check_choice,
    check_format,
    check_size,
    check_sizes,
    check_window,
)
from ..shared.files.state_file import (
    COUNTS,
    INPUT_DTYPES,
    StateTensor,
    keys_and_values,
    noted_columns,
    numbered,
)
from ..shared.states.state_layer import LAYER_TYPE
from .hosts import ATTENTION_NAME, check_host, fsdp_plan, head_size, key_heads, sliding_window, softmax_type
from .mechanism import state_shapes

FORGETTING = ("none", "head", "token")
FEATURE_MAPS = ("softmax",)
# Kept equal in both configurations: Transformers reads them on ours, and the host is built from its own.
SHARED_WITH_HOST = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
# What only the host's configuration holds.
OF_HOST = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
SIZES_OF_HOSTS = ("num_key_value_heads", "head_dim", "ffn_dim", "n_inner", "word_embed_proj_dim")


@strict
class HedgehogConfig(DerivedLayerTypes, PreTrainedConfig):
    """Configuration of Hedgehog: a causal Transformer (the host) whose attention keeps a state of fixed size.

    Args:
        host_config (`PreTrainedConfig` or `dict`, *optional*): the host's configuration; `LlamaConfig()` if not given. Hosts are
            causal language models whose layers call Transformers' attention functions: Llama, Mistral, Qwen2, Qwen3, SmolLM,
            Gemma, GPT-2, OPT and what is built like them.
        window (`int`, defaults to 64): w, the last tokens that a query sees by exact softmax, its own included. Quality and the
            size of the state grow with it.
        feature_size (`int`, *optional*): F, columns of each head's feature map, which gives 2 F features; the head size if not
            given. The state and its cost grow with it.
        feature_map (`str`, defaults to `"softmax"`): how features are made positive: by a softmax over W x and one over -W x.
        forgetting (`str`, defaults to `"none"`): what a token leaves of all that is older than its window: all of it (`"none"`),
            a learned share a key head (`"head"`), or one that also depends on the token's value (`"token"`).
        softmax_layers (`list` of `int`, *optional*): layers that keep the host's softmax attention (counted from 0), and keys and
            values in an ordinary cache. At least one layer must be left.
        chunk_size (`int`, *optional*): tokens that are handled together; equal results. By the window if not given.
        lm_head_bias (`bool`, defaults to `False`): whether the host's output matrix has a bias.
        classifier_dropout (`float`, defaults to 0): dropout before the classifier of texts.
        use_cache (`bool`, defaults to `True`): whether the model returns its state.
        tie_word_embeddings (`bool`, *optional*): whether the output matrix is that of the embeddings; as in the host.
        fused_linear_cross_entropy (`bool`, defaults to `False`): in training, the loss without ever holding all logits.
    """

    model_type = "hedgehog"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    sub_configs = {"host_config": AutoConfig}

    host_config: dict | PreTrainedConfig | None = None
    window: int = 64
    feature_size: int | None = None
    feature_map: str = "softmax"
    forgetting: str = "none"
    softmax_layers: list[int] | None = None
    chunk_size: int | None = None
    lm_head_bias: bool = False
    classifier_dropout: float | int = 0.0
    initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool | None = None
    fused_linear_cross_entropy: bool = False
    vocab_size: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        check_format(self, kwargs)
        foreign = sorted(set(OF_HOST) & set(kwargs))
        if foreign:
            raise ValueError(
                f"`{foreign[0]}` belongs to the host: HedgehogConfig(host_config=LlamaConfig({foreign[0]}=...)), or that of "
                "another host"
            )
        self.host_config = host = _own_copy(self.host_config)
        check_host(host)
        check_sizes(host, "host_config.", *SIZES_OF_HOSTS)  # before lists are made of that length
        for name in (*SHARED_WITH_HOST, "tie_word_embeddings", "initializer_range"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(host, name, None))
        self.tie_word_embeddings = bool(self.tie_word_embeddings)
        if self.feature_size is None:
            self.feature_size = head_size(host)
        self.keep_softmax(self.softmax_layers or [])
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        # Until `__post_init__` sets the layer types, `host_config` is still the caller's own object.
        if name in SHARED_WITH_HOST and self.__dict__.get("layer_types") is not None:
            setattr(self.host_config, name, value)

    @property
    def hidden_size(self) -> int:
        """Width of the host's embeddings and of what its output matrix takes, which OPT may project."""
        return getattr(self.host_config, "word_embed_proj_dim", None) or self.host_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the host; fewer while `assistant_early_exit` drafts."""
        return self.host_config.num_hidden_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        self.host_config.num_hidden_layers = value

    @property
    def linear_layers(self) -> list[int]:
        """The layers that keep no softmax attention."""
        return [i for i, kind in enumerate(self.layer_types or ()) if kind == LAYER_TYPE]

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the host."""
        return self.host_config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values of the host, and of the states."""
        return key_heads(self.host_config)

    @property
    def head_dim(self) -> int:
        """D of the host."""
        return head_size(self.host_config)

    @property
    def max_position_embeddings(self) -> int:
        """The host's: the longest text in tokens where its positions are learned."""
        return self.host_config.max_position_embeddings

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """What FSDP2 shards of a Hedgehog body: the host's embeddings, layers and last norm, which lie one name deeper."""
        return {f"host.{name}": style for name, style in fsdp_plan(self.host_config).items()}

    @property
    def hidden_dropout_prob(self) -> float | int:
        """The name that the heads of all families read."""
        return self.classifier_dropout

    @PreTrainedConfig._attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None):
        """The attention function of softmax layers. The host's configuration does not follow: its layers ask ours."""
        own = value if isinstance(value, dict) else {"": value}
        PreTrainedConfig._attn_implementation.fset(self, own | {"host_config": ATTENTION_NAME})

    def state_tensors(self, length: int) -> list[dict[str, StateTensor]]:
        """What each layer keeps of a text, by name, after `length` columns."""
        heads, size = self.num_key_value_heads, self.head_dim
        ring, matrix, vector, _ = state_shapes(self.window, heads, size, self.feature_size)
        count = COUNTS._replace(shared="tokens of the open document")
        state = numbered(StateTensor(ring, INPUT_DTYPES), StateTensor(matrix), StateTensor(vector), count)
        layers = []
        for kind in self.layer_types:
            sliding = self.sliding_window if kind == "sliding_attention" else None
            layers.append(dict(state) if kind == LAYER_TYPE else keys_and_values(heads, size, length, sliding))
        layers[self.linear_layers[0]] |= noted_columns(length if self.softmax_layers else None)
        return layers

    def to_dict(self) -> dict:
        """Every field that a configuration is built from; the host's dtype is ours."""
        fields = super().to_dict()  # a copy, the host's included
        fields.pop("sliding_window", None)
        if isinstance(fields.get("host_config"), dict):
            fields["host_config"]["dtype"] = None
        return fields

    def keep_softmax(self, layers: list[int]) -> None:
        """Take `layers` for those that keep softmax attention; a model follows by `set_softmax_layers`.

        Raises:
            ValueError: a layer that the host does not have, or all of them.
        """
        host, count = self.host_config, self.host_config.num_hidden_layers
        wrong = [i for i in layers if not 0 <= i < count]
        if wrong:
            raise ValueError(f"`softmax_layers` names {wrong}, but the host has layers 0 to {count - 1}")
        self.softmax_layers = sorted(set(layers))
        if len(self.softmax_layers) == count:
            raise ValueError(
                f"`softmax_layers` names all {count} layers, so that nothing would be linear: leave at least one out, or use the "
                "host itself"
            )
        kept = {i: softmax_type(host, i) for i in self.softmax_layers}
        self.layer_types = [kept.get(i, LAYER_TYPE) for i in range(count)]
        if "sliding_attention" in self.layer_types:
            self.sliding_window = sliding_window(
                host
            )  # the name under which Transformers' caches and masks look for it

    def validate_architecture(self):
        """Refuse values that no model can be built from."""
        host = self.host_config
        check_sizes(host, "host_config.", *SIZES_OF_HOSTS)
        heads, of_keys = self.num_attention_heads, self.num_key_value_heads
        if heads % of_keys:
            raise ValueError(
                f"`host_config.num_attention_heads` {heads} is not a multiple of `host_config.num_key_value_heads` {of_keys}"
            )
        check_window("window", self.window)
        check_size("feature_size", self.feature_size, LARGEST_SIZE)
        check_size("chunk_size", self.chunk_size, LARGEST_SIZE)
        check_choice("forgetting", self.forgetting, FORGETTING)
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"`feature_map` is {self.feature_map!r}, expected one of {', '.join(map(repr, FEATURE_MAPS))}: features have "
                "to be positive, because their products are the weights of a mean"
            )
        near = sliding_window(host)
        if near is not None and self.window > near:
            raise ValueError(
                f"`window` is {self.window}, but layers of the host see {near} tokens (`host_config.sliding_window`): expected "
                f"1 to {near}"
            )
        check_size("num_labels", self.num_labels)
        if not 0 <= self.classifier_dropout <= 1:
            raise ValueError(f"`classifier_dropout` is {self.classifier_dropout}, expected a probability, 0 to 1")

    def validate_layer_type(self):
        """Our layer type is not one of Transformers' own, which is all that the base class would accept."""


def _own_copy(host) -> PreTrainedConfig:
    """The host's configuration, never the caller's own object, which must not change with ours."""
    if host is None:
        return LlamaConfig()
    if not isinstance(host, dict):
        return copy.deepcopy(host)
    fields = dict(host)
    if "model_type" not in fields:
        raise ValueError('`host_config` must name its `model_type`, such as "llama" or "gpt2"')
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


__all__ = ["HedgehogConfig"]
