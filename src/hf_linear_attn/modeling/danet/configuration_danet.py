"""Configuration of the DANet family. Source: DANet specification, sections 5 and 10."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..shared.configuration import (
    DerivedLayerTypes,
    LayerKind,
    apply_aliases,
    check_choice,
    check_format,
    check_half_lives,
    check_head_size,
    check_probabilities,
    check_size,
    check_taps,
    check_window,
    softmax_heads,
)
from ..shared.files.state_file import (
    COUNTS,
    INPUT_DTYPES,
    SUM_DTYPES,
    StateTensor,
    keys_and_values,
    noted_columns,
    numbered,
)
from ..shared.layers.softmax_attention import window_state_shapes
from ..shared.states.state_layer import LAYER_TYPE
from .dense_attention import MODES, PATTERNS, check_dense_arguments
from .norms import ACTIVATIONS, NORM_NAMES
from .presets import DECODERS, PRESETS, with_heads
from .state import memory_shape

# Layers of ordinary attention and the layer type whose cache holds what they look at: everything, or the last w tokens.
SOFTMAX_PATTERNS = {
    "softmax": "full_attention",
    "swa@softmax": "sliding_attention",
    "l@softmax": "sliding_attention",
    "sl@softmax": "sliding_attention",
}
WITH_A_WIDTH = ("l", "sl", "sw", "softmax")  # codes that may be followed by `:W`, a window of their own
OF_DECODERS = ("conv_kernel", "output_gate", "head_norm", "output_projection")
# Fields of format 2, with the values under which a model computes what format 1 says.
OF_FORMAT_2 = {
    **dict.fromkeys(("half_lives", "conv_kernel", "softmax_key_value_heads")),
    **dict.fromkeys(("output_gate", "head_norm", "output_projection"), False),
    "softmax_positions": "rotary",
}
NORM_FIELDS = ("pre_norm", "post_norm", "embedding_norm", "final_norm", "lm_head_norm", "pooler_norm")
RELATIVE_POSITIONS = ("rotary", "cosine", "cos_minus_sin")
POSITIONS = ("learned", "sinusoidal", *RELATIVE_POSITIONS, "none")
POOLERS = ("first", "mean", "max", "last")


@strict
class DanetConfig(DerivedLayerTypes, PreTrainedConfig):
    """Configuration of DANet: softmax-free attention made of matrix products, as an encoder or a causal decoder.

    Args:
        vocab_size (`int`, defaults to 30528): size of the vocabulary.
        hidden_size (`int`, defaults to 1024): width d of the residual stream; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 32): number of blocks L.
        num_attention_heads (`int`, defaults to 1): heads H. One head is best for language; more heads are cheaper.
        is_causal (`bool`, defaults to `False`): `False` is an encoder, `True` a decoder that sees earlier tokens alone.
        layer_pattern (`str`, defaults to `"g"`): codes joined by `_` and repeated over the layers: `g` global, `l`
            local, `sl` shifted local, `sw` sliding window (causal only); `softmax` is ordinary attention,
            `swa@softmax` (causal only), `l@softmax` and `sl@softmax` are ordinary attention in the windows of `sw`,
            `l` and `sl`. Decoders have `decay`, too, a global sum whose terms fade (see `half_lives`), and `softmax:128`,
            ordinary attention over the last 128 tokens (at least 2) with a state of fixed size. `l:32`, `sl:32` and `sw:16`
            have windows of their own.
        window_size (`int`, defaults to 1024): tokens w in a window of every code without one of its own, but `g`, `decay`
            and `softmax`; positive and even.
        attention_mode (`str`, defaults to `"auto"`): order of the products in global encoder layers: `"linear"`,
            `"quadratic"`, or linear when the head size is at most the length, and in a torch.export program of dynamic
            length. Results are equal; windows always choose by themselves.
        chunk_size (`int`, *optional*): tokens of a causal chunk; near the head size if not given. Results are equal.
        ffn_type (`str`, defaults to `"relu"`): `"relu"` (also fit for float16) or `"swiglu"` (needs bfloat16 or
            float32).
        ffn_expansion (`float`, defaults to 4): f. The feed-forward layer is f d wide, for SwiGLU 2 f d / 3.
        intermediate_size (`int`, *optional*): its width; from `ffn_expansion` if not given (SwiGLU: rounded up to 128).
        position_embedding_type (`str`, defaults to `"rotary"`): `"learned"` (bounded) or `"sinusoidal"`, added to the
            embeddings; `"rotary"`, `"cosine"`, `"cos_minus_sin"`, applied in each layer; or `"none"`.
        max_position_embeddings (`int`, defaults to 512): longest text with learned positions; no limit for the others.
        relpe_scheme (`str`, defaults to `"q,k"`): what the layers' positions multiply: `"qkv"` (the input of the
            layer), or any of `q`, `k`, `v` joined by commas.
        rope_theta (`float`, defaults to 10000.0): base of the wavelengths.
        local_relpe (`bool`, defaults to `True`): whether positions in `l` and `sl` layers count from the window's
            start.
        half_lives (`list` of `float`, *optional*): of `decay` layers, for each head the number of tokens after which half of a
            term is left, at first: each layer learns its own. If not given, from 2 to 512 in equal ratios (32 for one head).
        conv_kernel (`int`, *optional*): of decoders, taps (1 to 64, 4 is usual) of a causal convolution of each feature in
            front of DenseAttention; none if not given.
        output_gate, head_norm, output_projection (`bool`, default to `False`): of decoders, a sigmoid gate on what
            DenseAttention gives, an RMSNorm of each head before it, a matrix behind it.
        pre_norm, post_norm (`str`, default to `"max_norm"`): norm before the attention and after the feed-forward
            layer; `"rmsnorm"` is one of the others.
        embedding_norm, final_norm, lm_head_norm, pooler_norm (`str`, *optional*): the other norms; `None` is none.
        maxnorm_eps (`float`, defaults to 1e-3): epsilon of `max_norm`.
        scaled_norm_eps (`float`, defaults to 1e-12): epsilon of the other norms.
        scale_mode (`str`, *optional*): the factor n^(-1/3) of global layers has n = the real tokens of the text
            (`"valid_length"`, for encoders) or n = `scale_length` (`"fixed"`, for decoders: a prefix does not depend
            on the rest).
        scale_length (`int`, defaults to 2048): n of `"fixed"`; the length that the model is trained at.
        hidden_dropout_prob, attention_dropout, embedding_dropout (`float`, default to 0.0): dropout in the
            feed-forward layers, on the layers' inputs and after the embeddings.
        classifier_dropout (`float`, *optional*): dropout before a classifier, `hidden_dropout_prob` if not given.
        initializer_range (`float`, defaults to 0.02): embeddings N(0, r), linear layers uniform(-r, r).
        query_initializer_range (`float`, *optional*): deviation of the query matrices, r / sqrt(2 L d) if not given.
        pooler (`str`, *optional*): token(s) that stand for the text: `"first"`, `"mean"`, `"max"`, `"last"`; mean for
            encoders, last for decoders if not given.
        pooler_mask_padding (`bool`, defaults to `True`): whether padding is left out; `False` is the published
            behaviour.
        pooler_dense (`bool`, defaults to `True`), pooler_act (`str`, defaults to `"gelu"`): what follows.
        lm_head_act (`str`, defaults to `"gelu"`), classifier_bias (`bool`, defaults to `False`): the heads.
        use_token_type (`bool`, defaults to `False`), type_vocab_size (`int`, defaults to 2): embeddings of text A and
            text B.
        softmax_attention_heads, softmax_key_value_heads (`int`, *optional*): heads of queries in softmax layers, which need
            it; and of keys and values, which groups of queries share: if not given as many.
        softmax_positions (`str`, defaults to `"rotary"`): positions within softmax layers, `"rotary"` or `"none"`.
        attention_bias (`bool`, defaults to `False`): whether projections of softmax layers have a bias.
        use_cache (`bool`, *optional*): whether a decoder returns its state; needs `scale_mode="fixed"`.
        tie_word_embeddings (`bool`, defaults to `True`): whether logits use the embedding matrix.
        fused_linear_cross_entropy (`bool`, defaults to `False`): train a causal language model without ever holding all logits:
            the loss goes through the vocabulary a block of tokens at a time, and the output has no `logits` while training.
    """

    model_type = "danet"
    newest_format = 2
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 30528
    hidden_size: int = 1024
    num_hidden_layers: int = 32
    num_attention_heads: int = 1
    is_causal: bool = False
    layer_pattern: str = "g"
    window_size: int = 1024
    attention_mode: str = "auto"
    chunk_size: int | None = None
    ffn_type: str = "relu"
    ffn_expansion: float | int = 4
    intermediate_size: int | None = None
    position_embedding_type: str = "rotary"
    max_position_embeddings: int = 512
    relpe_scheme: str = "q,k"
    rope_theta: float | int = 10000.0
    local_relpe: bool = True
    half_lives: list[float | int] | None = None
    conv_kernel: int | None = None
    output_gate: bool = False
    head_norm: bool = False
    output_projection: bool = False
    pre_norm: str = "max_norm"
    post_norm: str = "max_norm"
    embedding_norm: str | None = "max_norm"
    final_norm: str | None = "max_norm"
    lm_head_norm: str | None = "standard_ln"
    maxnorm_eps: float = 1e-3
    scaled_norm_eps: float = 1e-12
    scale_mode: str | None = None
    scale_length: int = 2048
    hidden_dropout_prob: float | int = 0.0
    attention_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    initializer_range: float = 0.02
    query_initializer_range: float | None = None
    pooler: str | None = None
    pooler_mask_padding: bool = True
    pooler_dense: bool = True
    pooler_act: str = "gelu"
    pooler_norm: str | None = None
    lm_head_act: str = "gelu"
    classifier_bias: bool = False
    use_token_type: bool = False
    type_vocab_size: int = 2
    softmax_attention_heads: int | None = None
    softmax_key_value_heads: int | None = None
    softmax_positions: str = "rotary"
    attention_bias: bool = False
    use_cache: bool | None = None
    tie_word_embeddings: bool = True
    fused_linear_cross_entropy: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        check_format(self, kwargs)
        apply_aliases(self, kwargs)
        check_head_size(self)  # before anything is derived from the sizes
        if self.scale_mode is None:
            self.scale_mode = "fixed" if self.is_causal else "valid_length"
        if self.pooler is None:
            self.pooler = "last" if self.is_causal else "mean"
        if self.use_cache is None:
            self.use_cache = self.is_causal and self.scale_mode == "fixed"
        if self.intermediate_size is None:
            self.intermediate_size = self._default_intermediate_size()
        if self.query_initializer_range is None:
            self.query_initializer_range = (
                self.initializer_range / (2 * self.num_hidden_layers * self.hidden_size) ** 0.5
            )
        if self.classifier_dropout is None:
            self.classifier_dropout = self.hidden_dropout_prob
        check_half_lives(self, "decay" in self.layer_codes)
        self.layer_types = [SOFTMAX_PATTERNS.get(code, LAYER_TYPE) for code in self.layer_codes]
        if "sliding_attention" in self.layer_types:
            self.sliding_window = self.window_size  # the name under which Transformers' caches and masks look for it
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here, so that a ValueError arrives as such
        self.validate_pattern()
        if set(self.layer_types) & set(SOFTMAX_PATTERNS.values()):
            # The names under which Transformers' static caches look for the shape of keys.
            heads, self.num_key_value_heads = softmax_heads(self)
            self.head_dim = self.hidden_size // heads

    def _default_intermediate_size(self) -> int:
        width = self.ffn_expansion * self.hidden_size
        return int(width) if self.ffn_type == "relu" else -(-int(2 * width / 3) // 128) * 128

    @property
    def layer_codes(self) -> list[str]:
        """The code of each layer: `"l_sl_g"` over four layers is `["l", "sl", "g", "l"]`."""
        codes = self.layer_pattern.split("_")
        return [codes[i % len(codes)] for i in range(self.num_hidden_layers)]

    @property
    def layer_kinds(self) -> list[LayerKind]:
        """What each layer does: its code without a width, and the tokens of its window, None for all."""
        return [self.kind_of(code) for code in self.layer_codes]

    def kind_of(self, code: str) -> LayerKind:
        """`"sw:16"` is `("sw", 16)`, `"sw"` is `("sw", window_size)`, `"g"` is `("g", None)`.

        Raises:
            ValueError: a code that names no kind of layer, or a width that is none.
        """
        name, colon, width = code.partition(":")
        wrong = f"`layer_pattern` {self.layer_pattern!r} has the code {code!r}"
        if name not in (*PATTERNS, "decay", *SOFTMAX_PATTERNS):
            known = (*PATTERNS, "decay", *SOFTMAX_PATTERNS)
            raise ValueError(f"{wrong}, expected codes of {known} joined by '_', such as 'sw_g' or 'sw:16_g'")
        if not colon:
            return LayerKind(name, None if name in ("g", "decay", "softmax") else self.window_size)
        if name not in WITH_A_WIDTH:
            way_out = "'softmax:128'" if name == "swa@softmax" else "`window_size`"
            raise ValueError(f"{wrong}, but only {WITH_A_WIDTH} have a width of their own: use {way_out}")
        if not (width.isdecimal() and width.isascii() and len(width) <= 10):
            raise ValueError(f"{wrong}, expected a number of tokens behind the colon, such as '{name}:128'")
        return LayerKind(name, int(width))

    @property
    def needs_format(self) -> int:
        """1 for what every release computes, 2 where an option is used that the first of them would not know."""
        known = all(getattr(self, name) == value for name, value in OF_FORMAT_2.items())
        known = known and "rmsnorm" not in [getattr(self, name) for name in NORM_FIELDS]
        return 1 if known and "decay" not in self.layer_codes and ":" not in self.layer_pattern else 2

    @property
    def modeling_file(self) -> str:
        """The file that reaches all code of a checkpoint of this configuration; an encoder generates nothing."""
        return "modeling_danet_causal" if self.is_causal else "modeling_danet"

    @classmethod
    def preset(cls, name: str, **overrides) -> "DanetConfig":
        """A configuration by name, with fields replaced by `overrides`: a published one, such as `"gpt-360m"`; or a decoder
        of any size, `"published"` (layers of the published decoder), `"fixed-state"` (its state does not grow) or `"hybrid"`
        (one layer in four is softmax over the whole text).

        Raises ValueError for an unknown name.
        """
        known = DECODERS | PRESETS
        if name not in known:
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(known)}")
        fields = with_heads(known[name], overrides.get("hidden_size", cls.hidden_size))
        return cls(**{**fields, **overrides})

    def validate_architecture(self):
        """Refuse sizes and names that no model can be built from."""
        relative = self.position_embedding_type in RELATIVE_POSITIONS
        check_head_size(self, even=self.position_embedding_type == "rotary")
        check_choice("position_embedding_type", self.position_embedding_type, POSITIONS)
        check_choice("ffn_type", self.ffn_type, ("relu", "swiglu"))
        check_choice("attention_mode", self.attention_mode, MODES)
        check_choice("scale_mode", self.scale_mode, ("valid_length", "fixed"))
        check_choice("pooler", self.pooler, POOLERS)
        for name in NORM_FIELDS:
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), NORM_NAMES)
        for name in ("pooler_act", "lm_head_act"):
            check_choice(name, getattr(self, name), tuple(ACTIVATIONS))
        for name in ("scale_length", "chunk_size", "type_vocab_size"):
            check_size(name, getattr(self, name))
        check_probabilities(self, "hidden_dropout_prob", "attention_dropout", "embedding_dropout", "classifier_dropout")
        for name in ("maxnorm_eps", "scaled_norm_eps", "initializer_range", "query_initializer_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 or more")
        if not self.rope_theta > 0:
            raise ValueError(f"`rope_theta` is {self.rope_theta}, expected a positive number, such as 10000.0")
        if self.pooler_norm is not None and not self.pooler_dense:
            raise ValueError(
                f"`pooler_norm` is {self.pooler_norm!r}, but it follows the dense layer that `pooler_dense`=False leaves out: "
                "set one of `pooler_norm`=None and `pooler_dense`=True"
            )
        parts = self.relpe_scheme.split(",")
        if relative and (parts != ["qkv"] and (len(set(parts)) != len(parts) or not set(parts) <= {"q", "k", "v"})):
            raise ValueError(f"`relpe_scheme` is {self.relpe_scheme!r}, expected 'qkv' or some of 'q,k,v'")
        if self.use_cache and self.is_causal and self.scale_mode == "valid_length":
            raise ValueError(
                "`use_cache` needs `scale_mode`='fixed': with 'valid_length' each new token rescales all earlier ones, and no "
                "state can be kept"
            )

    def validate_pattern(self):
        """Refuse codes that are no pattern (a misspelt one must not become global), windows that they cannot use, and options
        of other layers.
        """
        for code in self.layer_pattern.split("_"):
            self._check_code(code, *self.kind_of(code))
        if all(self.kind_of(code).name in SOFTMAX_PATTERNS for code in self.layer_codes):
            raise ValueError(f"`layer_pattern` {self.layer_pattern!r} is all softmax: use a Transformer")
        if any(kind.name in SOFTMAX_PATTERNS for kind in self.layer_kinds):
            softmax_heads(self)
        check_choice("softmax_positions", self.softmax_positions, ("rotary", "none"))
        check_taps(self)
        for name in OF_DECODERS:
            if getattr(self, name) and not self.is_causal:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but an encoder has no such part: set `is_causal`=True"
                )

    def _check_code(self, code: str, name: str, window: int | None) -> None:
        """Refuse a code of this kind whose window or direction is not what it can use."""
        width = "window_size" if ":" not in code else f"layer_pattern: {code}"
        if name in (*PATTERNS, "l@softmax", "sl@softmax"):
            check_dense_arguments(name.removesuffix("@softmax"), self.is_causal, window, name=width)
        if window is not None:
            check_window(width, window)
        if name in ("softmax", "swa@softmax") and window is not None:
            if window < 2:
                raise ValueError(
                    f"`{width}` is {window}, expected at least 2 for {code!r}: a token and the one before it"
                )
            if not self.is_causal:
                raise ValueError(
                    f"{code!r} is a causal window; an encoder takes 'l@softmax', 'sl@softmax' or 'softmax'"
                )
        if name == "decay" and not self.is_causal:
            raise ValueError("'decay' sums earlier tokens, which fade; an encoder takes 'g', or set `is_causal`=True")

    def state_tensors(self, length: int) -> list[dict[str, StateTensor]]:
        """What each layer of a decoder keeps of a text, by name, after `length` columns."""
        sizes = self.num_attention_heads, self.hidden_size // self.num_attention_heads
        count = COUNTS._replace(shared="tokens of the open document")
        layers = []
        for name, window in self.layer_kinds:
            if name in SOFTMAX_PATTERNS:
                layers.append(self._of_softmax(name, window, length))
                continue
            dtypes = INPUT_DTYPES if name == "sw" else SUM_DTYPES
            tensors = [StateTensor(memory_shape(name, window, *sizes), dtypes), count]
            if self.conv_kernel is not None:
                tensors.append(StateTensor((self.conv_kernel - 1, self.hidden_size)))
            layers.append(numbered(*tensors))
        ours = [kind == LAYER_TYPE for kind in self.layer_types]
        layers[ours.index(True)] |= noted_columns(None if all(ours) else length)
        return layers

    def _of_softmax(self, name: str, window: int | None, length: int) -> dict[str, StateTensor]:
        heads, groups = softmax_heads(self)
        head_dim = self.hidden_size // heads
        if name != "softmax" or window is None:
            return keys_and_values(groups, head_dim, length, window)
        keys, there = window_state_shapes(groups, head_dim, window)
        return numbered(StateTensor(keys, INPUT_DTYPES), StateTensor(there))

    def validate_layer_type(self):
        """Our layer type is not one of Transformers' own, which is all that the base class would accept."""
