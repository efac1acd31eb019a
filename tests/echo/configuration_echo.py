"""Configuration of the Echo family, a toy: what a fifth family needs, and no more."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..shared.configuration import DerivedLayerTypes, apply_aliases, check_format, check_head_size
from ..shared.files.state_file import StateTensor, noted_columns, numbered
from ..shared.states.state_layer import LAYER_TYPE
from ..shared.windowed_mean import state_shapes


@strict
class EchoConfig(DerivedLayerTypes, PreTrainedConfig):
    """Sizes of an Echo: width d, layers, heads. It has no positions, so its texts have no end."""

    model_type = "echo"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    is_causal: bool = True
    position_embedding_type: str = "none"
    hidden_dropout_prob: float | int = 0.1
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
        check_head_size(self)
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.layer_types = [LAYER_TYPE] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse sizes that no model can be built from."""
        check_head_size(self)

    def state_tensors(self, length: int) -> list[dict[str, StateTensor]]:
        """What each layer keeps of a text, by name, after `length` columns."""
        features = (self.num_attention_heads, self.hidden_size // self.num_attention_heads)
        layers = [
            numbered(*map(StateTensor, state_shapes(features, None, False))) for _ in range(self.num_hidden_layers)
        ]
        layers[0] |= noted_columns()
        return layers

    def validate_layer_type(self):
        """Our layer type is not one of Transformers' own, which is all that the base class would accept."""
