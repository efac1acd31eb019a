"""Configuration of the LEAP family."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..shared.configuration import (
    DerivedLayerTypes,
    apply_aliases,
    check_choice,
    check_format,
    check_head_size,
    check_numbers,
    check_windows,
)
from ..shared.files.state_file import StateTensor, noted_columns, numbered
from ..shared.states.state_layer import LAYER_TYPE
from ..shared.windowed_mean import state_shapes

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
        intermediate_size (`int`, *optional*): width of the feed-forward layer, 4 d if not given.
        max_position_embeddings (`int`, defaults to 2048): longest document with learned positions; without meaning for rotary.
        layer_windows (`list` of `int` or `None`, *optional*): for each layer the number of tokens it averages, the token
            itself included (any positive number); `None` for all tokens so far. If not given, see `use_local_attention`.
        use_local_attention (`bool`, defaults to `True`): without `layer_windows`, repeat (global, 4, 8, 16) over the layers;
            `False` makes all layers global.
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"` (published, bounded) or `"rotary"` (unbounded).
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
    layer_windows: list[int | None] | None = None
    use_local_attention: bool = True
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
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_dropout is None:
            self.attention_dropout = self.hidden_dropout_prob
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        self.layer_types = [LAYER_TYPE] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here, so that a ValueError arrives as such

    def validate_architecture(self):
        """Refuse sizes and names that no model can be built from."""
        check_head_size(self, even=self.position_embedding_type == "rotary")
        check_windows(self)
        check_numbers(self, "rope_theta")
        check_choice("position_embedding_type", self.position_embedding_type, ("learned", "rotary"))
        check_choice("focus_function", self.focus_function, ("elu", "exp"))
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
        layers = [
            numbered(*(StateTensor(shape, is_log=logs) for shape in state_shapes(features, window, logs)))
            for window in self.layer_windows
        ]
        layers[0] |= noted_columns()
        return layers

    def validate_layer_type(self):
        """Our layer type is not one of Transformers' own, which is all that the base class would accept."""
