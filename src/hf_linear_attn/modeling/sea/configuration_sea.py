"""Configuration of the SEA family: a host's configuration and what SEA adds to it."""

import copy
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, BertConfig, PreTrainedConfig

from ..shared.configuration import LARGEST_SIZE, DerivedLayerTypes, check_format, check_sizes
from ..shared.files.state_file import INPUT_DTYPES, SUM_DTYPES, StateTensor, keys_and_values, noted_columns, numbered
from .cache import SEA_LAYER_TYPE
from .cells import CAUSAL_TOPK_GROUPS, TOPK_GROUPS
from .estimator import BIDIRECTIONAL_REDUCTION, CAUSAL_CHANNELS, CAUSAL_REDUCTION, CONV_HISTORY
from .hosts import find_host, head_size, key_heads
from .kernel_attention import default_num_features

LEAST_CELLS = 4
# Where sparse attention becomes faster than PyTorch's dense attention. On a CPU a plane through what was measured for k and M of
# 13 and 64 (3,072), 64 and 64 (6,400), 64 and 128 (9,500), MiniLM's shape; on a GPU the H200's layer (docs/performance/sea.md).
LEAST_AUTO_LENGTH, AUTO_LENGTH_CUDA = 1024, 24576
FORMS = ("auto", "dense", "chunked")  # of the sparse attention
# What a SEA model adds to its host's output.
SEA_FIELDS = ("estimated_attentions", "kept_cells", "kept_keys", "attention_losses", "fidelity")
# Kept equal in both configurations, because Transformers reads them on ours and the host's heads on theirs.
SHARED_WITH_HOST = (
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "label2id",
    "problem_type",
)
# Sizes that some hosts have besides those of every model.
SIZES_OF_HOSTS = ("num_key_value_heads", "head_dim", "ffn_dim", "n_inner", "word_embed_proj_dim", "type_vocab_size")
# What a SEA configuration only reads from its host's.
OF_HOST = {"hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "is_causal"}


@dataclass(frozen=True)
class SeaOptions:
    """Everything that defines a layer but its weights. See `SeaConfig` for the advice on each field.

    `None` takes the default of the direction: `feature_factor` 1 or 8 (causal), `max_keys_per_cell` k (no limit if official).

    Raises:
        ValueError: a value outside its range, or a group that causality forbids.
    """

    num_heads: int
    head_dim: int
    causal: bool
    k: int = 64
    predictor_length: int = 128
    feature_factor: float | None = None
    num_features: int | None = None
    topk_group: str = "causal_batch"
    max_keys_per_cell: int | None = None
    max_positions: int = 2048
    official: bool = False
    backend: str = "auto"
    min_sparse_length: int | str = 0

    def __post_init__(self):
        for name in ("num_heads", "head_dim", "k", "predictor_length", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
                raise ValueError(f"`{name}` is {value!r}, expected a positive integer up to {LARGEST_SIZE:,}")
        direction = "causal" if self.causal else "bidirectional"
        divisor = CAUSAL_REDUCTION if self.causal else BIDIRECTIONAL_REDUCTION
        if self.predictor_length % divisor:
            raise ValueError(
                f"`predictor_length` is {self.predictor_length}, expected a multiple of {divisor} for a {direction} host, whose "
                f"network works on 1/{divisor} of that width"
            )
        if self.predictor_length < LEAST_CELLS:
            raise ValueError(
                f"`predictor_length` is {self.predictor_length}, expected at least {LEAST_CELLS}: with fewer cells they all "
                "tie, and nothing is estimated"
            )
        groups = CAUSAL_TOPK_GROUPS if self.causal else TOPK_GROUPS
        if self.topk_group not in groups:
            raise ValueError(
                f"`topk_group` is {self.topk_group!r}, expected one of {', '.join(map(repr, groups))} for a {direction} host"
                + ("; other groups let a row see how later rows score" if self.topk_group in TOPK_GROUPS else "")
            )
        if self.backend not in FORMS:
            raise ValueError(f"`backend` is {self.backend!r}, expected one of {', '.join(map(repr, FORMS))}")
        if self.feature_factor is not None and not self.feature_factor > 0:
            raise ValueError(
                f"`feature_factor` is {self.feature_factor}, expected a positive number: it divides the number of features"
            )
        shortest = self.min_sparse_length
        if shortest != "auto" and (not isinstance(shortest, int) or not 0 <= shortest <= LARGEST_SIZE):
            raise ValueError(
                f'`min_sparse_length` is {shortest!r}, expected "auto" or 0 (sparse at every length) to {LARGEST_SIZE:,} tokens'
            )
        if self.official and shortest != 0:
            raise ValueError(
                f"`min_sparse_length` is {shortest!r}, expected 0 with `official=True`: that layer is sparse at every length"
            )
        for name in ("num_features", "max_keys_per_cell"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 1 to {LARGEST_SIZE:,} or None")

    @property
    def feature_count(self) -> int:
        """F."""
        if self.num_features is not None:
            return self.num_features
        factor = self.feature_factor if self.feature_factor is not None else (8 if self.causal else 1)
        return default_num_features(self.head_dim, factor)

    @property
    def cell_limit(self) -> int | None:
        """Keys that one cell may hand out; None is no limit."""
        if self.max_keys_per_cell is not None:
            return self.max_keys_per_cell
        return None if self.official else self.k

    def dense_below(self, device: torch.device) -> int:
        """N: a query that sees fewer keys attends to all of them. Measured where `min_sparse_length` says "auto"."""
        if self.min_sparse_length != "auto":
            return int(self.min_sparse_length)
        if device.type == "cuda":
            return AUTO_LENGTH_CUDA
        return max(LEAST_AUTO_LENGTH, 65 * self.k + 48 * self.predictor_length - 832)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes, behind the batch, of what a causal layer keeps (`SeaState`)."""
        rows = (CAUSAL_CHANNELS * self.num_heads, CONV_HISTORY, self.predictor_length // CAUSAL_REDUCTION)
        return (self.num_heads, self.feature_count, 2 * self.head_dim + 1), (self.num_heads, self.head_dim), rows, rows


@strict
class SeaConfig(DerivedLayerTypes, PreTrainedConfig):
    """Configuration of SEA: sparse attention with an estimated mask, inside a BERT, Llama, OPT or GPT-2.

    Args:
        host_config (`PreTrainedConfig` or `dict`, *optional*): the host's configuration; `BertConfig()` if not given.
        k (`int`, defaults to 64): mean number of keys that a query attends to in a head. Quality and cost grow with it; it
            can be changed after training. The paper's k: 7 to 25 for short texts, 32 to 128 for language models.
        predictor_length (`int`, defaults to 128): width M of the compressed attention, at least 4, a multiple of 2
            (bidirectional) or 4 (causal). Cost per token grows with it; finer than the text is long (M > T) is of no use.
        topk_group (`str`, defaults to `"causal_batch"`): cells compete within a row over its heads (`"causal_batch"`), within
            each row of each head (`"query"`), each head (`"head"`) or a whole sample (`"batch"`). Causal hosts: the first only.
        max_keys_per_cell (`int`, *optional*): most keys that one selected cell hands out, evenly spaced; `k` if not given.
            Bounds the cost of long texts, where a cell covers T / M keys.
        feature_factor (`float`, *optional*): divides the number of random features, floor(D ln D / factor); 1 for
            bidirectional hosts and 8 for causal ones if not given. More features: a better estimate, more cost.
        num_features (`int`, *optional*): the number of random features itself; overrides `feature_factor`.
        feature_redraw_interval (`int`, defaults to 1000): optimizer steps between redraws in training; 0 for never.
        max_positions (`int`, *optional*): rows of the causal estimator's position table, the longest text in tokens; the
            host's `max_position_embeddings` if not given.
        softmax_layers (`list` of `int`, *optional*): layers that keep the host's softmax attention (counted from 0).
        official (`bool`, defaults to `False`): the published layer with its quirks (padding changes results, the average is
            not normalised, gates start half closed, a random first estimate, no limit of keys per cell). For comparisons
            with published numbers.
        backend (`str`, defaults to `"auto"`): form of the sparse attention: `"dense"` (reference, T x T), `"chunked"` (linear
            memory), or `"auto"`: chunked where it is a GPU kernel, else dense for few keys. Results are equal.
            (Whether a GPU kernel runs is up to the device and to `use_backend`.)
        min_sparse_length (`int` or `"auto"`, defaults to 0): a query that sees fewer keys than this attends to all of them, as in
            the host: exact, and faster up to where sparse attention begins to pay. A token of a causal host sees the tokens up to
            itself, one of a bidirectional host all of its row; padding does not count. `"auto"` takes a measured
            length, which depends on the device. 0: sparse at every length. Distillation is sparse at every length anyway.
        use_cache (`bool`, defaults to `True`): whether a causal model returns its cache.
    """

    model_type = "sea"
    keys_to_ignore_at_inference = ["cache", "past_key_values", *SEA_FIELDS]
    sub_configs = {"host_config": AutoConfig}

    host_config: dict | PreTrainedConfig | None = None
    k: int = 64
    predictor_length: int = 128
    topk_group: str = "causal_batch"
    max_keys_per_cell: int | None = None
    feature_factor: float | int | None = None
    num_features: int | None = None
    feature_redraw_interval: int = 1000
    max_positions: int | None = None
    softmax_layers: list[int] | None = None
    official: bool = False
    backend: str = "auto"
    min_sparse_length: int | str = 0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    vocab_size: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        check_format(self, kwargs)
        foreign = sorted(OF_HOST & set(kwargs))
        if foreign:
            raise ValueError(
                f"`{foreign[0]}` belongs to the host: SeaConfig(host_config=BertConfig({foreign[0]}=...)), or that of "
                "another host"
            )
        host = self.host_config
        if host is None:
            host = BertConfig()
        elif isinstance(host, dict):
            fields = dict(host)
            if "model_type" not in fields:
                raise ValueError('`host_config` must name its `model_type`, such as "bert" or "llama"')
            host = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            host = copy.deepcopy(host)  # the teacher's configuration must not change with ours
        self.host_config = host
        host.base_model_fsdp_plan = find_host(host).fsdp_plan  # of this object alone, and not saved
        if kwargs.get("num_labels") is not None and self.id2label is None:
            host.num_labels = kwargs["num_labels"]
        for name in SHARED_WITH_HOST:
            if getattr(self, name) is None:
                setattr(self, name, getattr(host, name, None))
        if self.max_positions is None:
            self.max_positions = host.max_position_embeddings
        self.softmax_layers = sorted(set(self.softmax_layers or []))
        check_sizes(host, "host_config.", *SIZES_OF_HOSTS)  # before lists are made of that length
        self.layer_types = [SEA_LAYER_TYPE] * host.num_hidden_layers
        super().__post_init__(**kwargs)
        for name in SHARED_WITH_HOST:
            self._share(name, getattr(self, name))
        self.validate_architecture()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        # Until `__post_init__` sets the layer types, `host_config` is still the caller's own object.
        if name in SHARED_WITH_HOST and self.__dict__.get("layer_types") is not None:
            self._share(name, value)

    def follow_host(self) -> None:
        """Take over what was changed in the host's configuration alone, as `host_model.resize_token_embeddings` does.

        Ours hands its own changes on at once, so where the two differ the host's is the newer one.
        """
        for name in SHARED_WITH_HOST:
            value = getattr(self.host_config, name, None)
            if getattr(self, name) != value:
                setattr(self, name, value)

    def _share(self, name, value) -> None:
        if isinstance(self.host_config, PreTrainedConfig) and getattr(self.host_config, name, None) != value:
            setattr(self.host_config, name, value)

    @property
    def hidden_size(self) -> int:
        """Width of the host."""
        return self.host_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the host."""
        return self.host_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the host."""
        return self.host_config.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """The longest text in tokens: the host's limit, or that of the estimator's position table."""
        host = self.host_config.max_position_embeddings
        return min(host, self.max_positions) if find_host(self.host_config).causal else host

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """What FSDP2 shards of a SEA body: the host's embeddings, layers and last norm, which lie one name deeper."""
        host = find_host(self.host_config)
        return {f"{host.base_name}.{name}": style for name, style in host.fsdp_plan.items()}

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only earlier ones."""
        return find_host(self.host_config).causal

    @property
    def modeling_file(self) -> str:
        """The file that reaches all code of a checkpoint of this configuration; an encoder generates nothing."""
        return "modeling_sea_causal" if self.is_causal else "modeling_sea"

    def core_options(self) -> SeaOptions:
        """What each SEA layer is built from."""
        return SeaOptions(
            num_heads=self.num_attention_heads,
            head_dim=head_size(self.host_config),
            causal=self.is_causal,
            k=self.k,
            predictor_length=self.predictor_length,
            feature_factor=self.feature_factor,
            num_features=self.num_features,
            topk_group=self.topk_group,
            max_keys_per_cell=self.max_keys_per_cell,
            max_positions=self.max_positions,
            official=self.official,
            backend=self.backend,
            min_sparse_length=self.min_sparse_length,
        )

    def state_tensors(self, length: int) -> list[dict[str, StateTensor]]:
        """What each layer of a causal model keeps of a text, by name, after `length` columns."""
        kernel, value_sum, *rows = self.core_options().state_shapes
        state = numbered(
            *(StateTensor(shape, SUM_DTYPES) for shape in (kernel, value_sum)),
            *(StateTensor(shape, INPUT_DTYPES) for shape in rows),
        )
        if self.min_sparse_length:  # a text that was short until now has left none
            state = {name: tensor._replace(optional=True) for name, tensor in state.items()}
        cached = keys_and_values(key_heads(self.host_config), head_size(self.host_config), length)
        cached["key_mask"] = StateTensor((length,), (torch.bool,), optional=True, shared="mask of the keys")
        layers = [cached if i in self.softmax_layers else state | cached for i in range(self.num_hidden_layers)]
        layers[0] = layers[0] | noted_columns()
        return layers

    def to_dict(self) -> dict:
        """Every field that a configuration is built from; the host's dtype is ours."""
        if self.__dict__.get("layer_types") is not None:
            self.follow_host()
        fields = super().to_dict()  # a copy, the host's included
        if isinstance(fields.get("host_config"), dict):
            fields["host_config"]["dtype"] = None
        return fields

    def validate_architecture(self):
        """Refuse values that no model can be built from."""
        host = self.host_config
        check_sizes(host, "host_config.", *SIZES_OF_HOSTS)
        heads, of_keys = host.num_attention_heads, getattr(host, "num_key_value_heads", None)
        if of_keys is not None and heads % of_keys:
            raise ValueError(
                f"`host_config.num_attention_heads` {heads} is not a multiple of `host_config.num_key_value_heads` {of_keys}"
            )
        self.core_options()
        wrong = [i for i in self.softmax_layers if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"`softmax_layers` names {wrong}, but the host has layers 0 to {self.num_hidden_layers - 1}"
            )
        if not 0 <= self.feature_redraw_interval <= LARGEST_SIZE:
            raise ValueError(
                f"`feature_redraw_interval` is {self.feature_redraw_interval}, expected 0 (never) to {LARGEST_SIZE:,} steps"
            )

    def validate_layer_type(self):
        """Our layer type is not one of Transformers' own, which is all that the base class would accept."""


__all__ = ["SeaConfig"]
