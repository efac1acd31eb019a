"""Configuration of the LEAP family."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..shared.configuration import (
    DerivedLayerTypes,
    LayerKind,
    apply_aliases,
    check_choice,
    check_format,
    check_half_lives,
    check_head_size,
    check_kinds,
    check_numbers,
    check_taps,
    layer_kind,
    softmax_heads,
)
from ..shared.files.state_file import INPUT_DTYPES, StateTensor, keys_and_values, noted_columns, numbered
from ..shared.layers.softmax_attention import window_state_shapes
from ..shared.states.state_layer import LAYER_TYPE
from ..shared.windowed_mean import state_shapes
from .presets import PRESETS

# Fields of format 2, with the values under which a model computes what format 1 says.
OF_FORMAT_2 = {
    "half_lives": None,
    "conv_kernel": None,
    "output_gate": False,
    "head_norm": False,
    "output_projection": False,
    "norm_type": "layernorm",
    "ffn_type": "mlp",
}

logger = logging.get_logger(__name__)


@strict
class LeapConfig(DerivedLayerTypes, PreTrainedConfig):
    """Configuration of LEAP, a causal language model whose layers are gated, focus-weighted running means.

    Args:
        vocab_size (`int`, defaults to 32000): size of the vocabulary.
        hidden_size (`int`, defaults to 768): width d of the residual stream; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): number of blocks.
        num_attention_heads (`int`, defaults to 12): heads H. A head size d/H of about 64 is recommended; a warning is given
            below 32 and above 128.
        intermediate_size (`int`, *optional*): width of the feed-forward layer; if not given 4 d, or for `"swiglu"` 8/3 d rounded
            up to a multiple of 64.
        max_position_embeddings (`int`, defaults to 2048): longest document with learned positions; without meaning for rotary.
        layer_windows (`list` of `int`, `str` or `None`, *optional*): for each layer what it does. A positive number: it averages
            so many tokens, the token itself included; `None` or `"global"`: all tokens so far. `"decay"`: all tokens so far,
            their weights fading (see `half_lives`). `"softmax"`: softmax attention over all tokens so far, whose keys and values
            are kept; `"softmax:128"`: over the last 128 (at least 2), a state of fixed size. If not given, see
            `use_local_attention`.
        use_local_attention (`bool`, defaults to `True`): without `layer_windows`, repeat (global, 4, 8, 16) over the layers;
            `False` makes all layers global.
        half_lives (`list` of `float`, *optional*): of `"decay"` layers, for each head the number of tokens after which half of a
            weight is left, at first: each layer learns its own. If not given, from 2 to 512 in equal ratios.
        conv_kernel (`int`, *optional*): taps (1 to 64, 4 is usual) of a causal convolution of each feature in front of the
            projections of layers that average; none if not given.
        output_gate, head_norm, output_projection (`bool`, default to `False`): of layers that average, a sigmoid gate on what
            they give, an RMSNorm of each head before it, a matrix behind it.
        norm_type (`str`, defaults to `"layernorm"`): `"layernorm"` (published) or `"rmsnorm"` around layers.
        ffn_type (`str`, defaults to `"mlp"`): the feed-forward layer, `"mlp"` (published: two matrices with biases, `hidden_act`
            between them) or `"swiglu"` (three without).
        softmax_attention_heads, softmax_key_value_heads (`int`, *optional*): heads of queries in softmax layers, if not given
            `num_attention_heads`; and of keys and values, which groups of queries share: if not given as many.
        softmax_positions (`str`, defaults to `"rotary"`): positions within softmax layers, `"rotary"` or `"none"`.
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"` (published, bounded), `"rotary"` (unbounded) or
            `"none"`; of layers that average.
        rope_theta (`float`, defaults to 10000.0): base of the rotary wavelengths.
        focus_function (`str`, defaults to `"elu"`): weight of focus logit l, `"elu"` for elu(l) + 1 (published), `"exp"` for
            exp(l).
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward layer.
        hidden_dropout_prob (`float`, defaults to 0.1): dropout on embeddings and after the feed-forward layer.
        attention_dropout (`float`, *optional*): dropout on q, f, v and the focus logits; `hidden_dropout_prob` if not given.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norms.
        initializer_range (`float`, *optional*): standard deviation of the initial weights, 1/sqrt(d) if not given.
        use_cache (`bool`, defaults to `True`): whether the model returns its state.
        tie_word_embeddings (`bool`, defaults to `True`): whether logits use the embedding matrix.
        fused_linear_cross_entropy (`bool`, defaults to `False`): train a causal language model without ever holding all logits:
            the loss goes through the vocabulary a block of tokens at a time, and the output has no `logits` while training.
        num_recomputed_mlps (`int`, defaults to 0): in training, the first so many layers form the inner activation of their
            feed-forward layer again instead of keeping it: less memory for long rows, and less time than gradient checkpointing.

    The published names `n_layer`, `n_head`, `n_heads`, `n_positions`, `window_sizes` and `use_local_att` are accepted, too.
    """

    model_type = "leap"
    newest_format = 2
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_heads": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "window_sizes": "layer_windows",
        "use_local_att": "use_local_attention",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    layer_windows: list[int | str | None] | None = None
    use_local_attention: bool = True
    half_lives: list[float | int] | None = None
    conv_kernel: int | None = None
    output_gate: bool = False
    head_norm: bool = False
    output_projection: bool = False
    norm_type: str = "layernorm"
    ffn_type: str = "mlp"
    softmax_attention_heads: int | None = None
    softmax_key_value_heads: int | None = None
    softmax_positions: str = "rotary"
    position_embedding_type: str = "learned"
    rope_theta: float | int = 10000.0
    focus_function: str = "elu"
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    fused_linear_cross_entropy: bool = False
    num_recomputed_mlps: int = 0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        check_format(self, kwargs)
        apply_aliases(self, kwargs)
        check_head_size(self)  # before anything is derived from the sizes
        if self.layer_windows is None:
            cycle = [None, 4, 8, 16] if self.use_local_attention else [None]
            self.layer_windows = [cycle[i % len(cycle)] for i in range(self.num_hidden_layers)]
        self.layer_windows = [None if entry == "global" else entry for entry in self.layer_windows]
        self.validate_layers()
        if self.intermediate_size is None:
            swiglu = -(-8 * self.hidden_size // 192) * 64
            self.intermediate_size = swiglu if self.ffn_type == "swiglu" else 4 * self.hidden_size
        if self.attention_dropout is None:
            self.attention_dropout = self.hidden_dropout_prob
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        full = LayerKind("softmax")
        self.layer_types = ["full_attention" if kind == full else LAYER_TYPE for kind in self.layer_kinds]
        super().__post_init__(**kwargs)
        if full in self.layer_kinds:  # the names under which Transformers' static caches look for the shape of keys
            self.num_key_value_heads = self.softmax_key_value_heads
            self.head_dim = self.hidden_size // self.softmax_attention_heads
        self.validate_architecture()  # here, so that a ValueError arrives as such

    @property
    def layer_kinds(self) -> list[LayerKind]:
        """What each layer does, as `layer_windows` says it."""
        return [layer_kind(entry) for entry in self.layer_windows]

    @property
    def needs_format(self) -> int:
        """1 for what every release computes, 2 where an option is used that the first of them would not know."""
        plain = all(getattr(self, name) == value for name, value in OF_FORMAT_2.items())
        return 1 if plain and all(kind.name == "mean" for kind in self.layer_kinds) else 2

    @classmethod
    def preset(cls, name: str, **overrides) -> "LeapConfig":
        """A configuration by name, with fields replaced by `overrides`: `"published"` (the defaults), `"fixed-state"` (its state
        does not grow) or `"hybrid"` (one layer in three is softmax over the whole text).

        Raises ValueError for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(map(repr, PRESETS))}")
        fields = dict(PRESETS[name])
        cycle = fields.pop("layer_cycle", None)
        if cycle is not None:
            layers = overrides.get("num_hidden_layers", overrides.get("n_layer", cls.num_hidden_layers))
            fields["layer_windows"] = [cycle[i % len(cycle)] for i in range(layers)]
        group = fields.pop("softmax_group", 1)
        heads = overrides.get(
            "num_attention_heads", overrides.get("n_head", overrides.get("n_heads", cls.num_attention_heads))
        )
        if group > 1 and heads % group == 0 and "softmax_attention_heads" not in overrides:
            fields["softmax_key_value_heads"] = heads // group
        return cls(**{**fields, **overrides})

    def validate_layers(self):
        """Refuse kinds of layer that there are none of, and fill in what these need."""
        kinds = check_kinds(self)
        check_half_lives(self, any(kind.name == "decay" for kind in kinds))
        check_choice("softmax_positions", self.softmax_positions, ("rotary", "none"))
        if all(kind.name != "softmax" for kind in kinds):
            return
        if self.softmax_attention_heads is None:
            self.softmax_attention_heads = self.num_attention_heads
        self.softmax_attention_heads, self.softmax_key_value_heads = softmax_heads(self)

    def validate_architecture(self):
        """Refuse sizes and names that no model can be built from."""
        check_head_size(self, even=self.position_embedding_type == "rotary")
        check_numbers(self, "rope_theta")
        check_choice("position_embedding_type", self.position_embedding_type, ("learned", "rotary", "none"))
        check_choice("focus_function", self.focus_function, ("elu", "exp"))
        check_choice("norm_type", self.norm_type, ("layernorm", "rmsnorm"))
        check_choice("ffn_type", self.ffn_type, ("mlp", "swiglu"))
        check_taps(self)
        if not 0 <= self.num_recomputed_mlps <= self.num_hidden_layers:
            raise ValueError(
                f"`num_recomputed_mlps` is {self.num_recomputed_mlps}, expected 0 to `num_hidden_layers`={self.num_hidden_layers}"
            )
        head_size = self.hidden_size // self.num_attention_heads
        if not 32 <= head_size <= 128:
            logger.warning_once(
                f"the head size is {head_size} (`hidden_size`={self.hidden_size} / `num_attention_heads`="
                f"{self.num_attention_heads}); between 32 and 128, best about 64, is recommended"
            )

    def state_tensors(self, length: int) -> list[dict[str, StateTensor]]:
        """What each layer keeps of a text, by name, after `length` columns."""
        features = (2, self.num_attention_heads, self.hidden_size // self.num_attention_heads)
        logs = self.focus_function == "exp"
        layers = []
        for name, window in self.layer_kinds:
            if name == "softmax":
                layers.append(self._of_softmax(window, length))
                continue
            tensors = [StateTensor(shape, is_log=logs) for shape in state_shapes(features, window, logs)]
            if self.conv_kernel is not None:
                tensors.append(StateTensor((self.conv_kernel - 1, self.hidden_size)))
            layers.append(numbered(*tensors))
        full = LayerKind("softmax")
        first = next(i for i, kind in enumerate(self.layer_kinds) if kind != full)
        layers[first] |= noted_columns(length if full in self.layer_kinds else None)
        return layers

    def _of_softmax(self, window: int | None, length: int) -> dict[str, StateTensor]:
        heads = self.softmax_key_value_heads or self.num_attention_heads
        head_dim = self.hidden_size // (self.softmax_attention_heads or self.num_attention_heads)
        if window is None:
            return keys_and_values(heads, head_dim, length)
        keys, there = window_state_shapes(heads, head_dim, window)
        return numbered(StateTensor(keys, INPUT_DTYPES), StateTensor(there))

    def validate_layer_type(self):
        """Our layer type is not one of Transformers' own, which is all that the base class would accept."""
