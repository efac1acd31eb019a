"""Configuration of the Fastformer family."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..shared.configuration import (
    LONGEST_WINDOW,
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

# exp of logits up to this size, summed over a million tokens, stays inside float32; beyond, sums are kept in log form.
LARGEST_PLAIN_LOGIT = 60.0


@strict
class FastformerConfig(DerivedLayerTypes, PreTrainedConfig):
    """Configuration of Fastformer: additive attention as a causal language model, or as the original encoder.

    Args:
        vocab_size (`int`, defaults to 32000): size of the vocabulary.
        hidden_size (`int`, defaults to 768): width d of the residual stream; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): number of blocks.
        num_attention_heads (`int`, defaults to 12): heads H.
        intermediate_size (`int`, *optional*): width of the feed-forward layer, 4 d if not given.
        max_position_embeddings (`int`, defaults to 2048): longest document with learned positions.
        is_causal (`bool`, defaults to `True`): `True` is the published causal form (a window of earlier tokens, a fixed-size
            state); `False` the encoder of the original paper, in which every token sees the whole text.
        layer_windows (`list` of `int` or `None`, *optional*): tokens that each causal layer averages, `None` for all so far.
            If not given, see `use_local_attention`. Without meaning for the encoder.
        use_local_attention (`bool`, defaults to `True`): without `layer_windows`, layer i (from 0) gets 2 * 2^i, the first
            and last layer global; `False` makes all layers global.
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"` (published, bounded) or `"none"`.
        rescale (`float`, defaults to 15.0): largest size of a causal layer's logits; the weights are exp of these.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward layer.
        hidden_dropout_prob (`float`, defaults to 0.1): dropout on embeddings and after the feed-forward layer.
        attention_dropout (`float`, *optional*): dropout on the pooled queries and keys; `hidden_dropout_prob` if not given.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norms.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        use_cache (`bool`, defaults to `True`): whether the causal model returns its state; always `False` for the encoder.
        tie_word_embeddings (`bool`, defaults to `True`): whether logits use the embedding matrix.
        fused_linear_cross_entropy (`bool`, defaults to `False`): train a causal language model without ever holding all logits:
            the loss goes through the vocabulary a block of tokens at a time, and the output has no `logits` while training.

    The published names `n_layer`, `n_head`, `n_heads`, `n_positions`, `window_sizes` and `use_local_att` are accepted, too.
    """

    model_type = "fastformer"
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
    is_causal: bool = True
    layer_windows: list[int | None] | None = None
    use_local_attention: bool = True
    position_embedding_type: str = "learned"
    rescale: float | int = 15.0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    fused_linear_cross_entropy: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        check_format(self, kwargs)
        apply_aliases(self, kwargs)
        check_head_size(self)  # before anything is derived from the sizes
        layers = self.num_hidden_layers
        if self.layer_windows is None:
            ends = (0, layers - 1) if self.use_local_attention else range(layers)
            doubled = [2 * 2**i for i in range(layers)]
            self.layer_windows = [None if i in ends or w > LONGEST_WINDOW else w for i, w in enumerate(doubled)]
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_dropout is None:
            self.attention_dropout = self.hidden_dropout_prob
        self.use_cache = self.use_cache and self.is_causal
        self.layer_types = [LAYER_TYPE] * layers
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here, so that a ValueError arrives as such

    def validate_architecture(self):
        """Refuse sizes and names that no model can be built from."""
        check_head_size(self)
        check_windows(self)
        check_numbers(self, "rescale")
        check_choice("position_embedding_type", self.position_embedding_type, ("learned", "none"))
        if self.hidden_size // self.num_attention_heads < 2:
            raise ValueError(
                f"the head size {self.hidden_size} / {self.num_attention_heads} is 1, but Fastformer divides by the standard "
                "deviation of a head's features, which needs at least 2"
            )

    def state_tensors(self, length: int) -> list[dict[str, StateTensor]]:
        """What each causal layer keeps of a text, by name, after `length` columns."""
        features = (self.num_attention_heads, self.hidden_size // self.num_attention_heads)
        logs = self.rescale > LARGEST_PLAIN_LOGIT
        layers = []
        for window in self.layer_windows:
            pooling = [StateTensor(shape, is_log=logs) for shape in state_shapes(features, window, logs)]
            layers.append(numbered(*pooling, *pooling))
        layers[0] |= noted_columns()
        return layers

    def validate_layer_type(self):
        """Our layer type is not one of Transformers' own, which is all that the base class would accept."""
