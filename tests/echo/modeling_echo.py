"""Echo, a toy family: every head hears the mean of all values so far, each as loud as it says itself."""

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel

from ..shared.body import RecurrentModelOutput, add_positions, begin, embed_inputs, without_cache_in_training
from ..shared.call import Call, takes_call
from ..shared.causal_lm import RecurrentForCausalLM, mask_for_generate
from ..shared.compat import (
    CACHE_NAMES,
    GradientCheckpointingLayer,
    cache_keyword,
    capture_outputs,
    either_cache_name,
    merge_with_config_defaults,
)
from ..shared.files.checkpoint import PortableCheckpointMixin
from ..shared.heads import SequenceClassificationMixin
from ..shared.layer_output import LayerOutput, check_state
from ..shared.precision import accumulation_dtype
from ..shared.sequence import DOCUMENT_KEYWORDS, passes_on
from ..shared.windowed_mean import state_shapes, windowed_mean
from .configuration_echo import EchoConfig


class EchoAttention(nn.Module):
    """m_t = sum over s <= t of w_s v_s / sum of w_s, with w = sigmoid(loudness); O(T) time, a state of D + 1 numbers a head."""

    def __init__(self, config: EchoConfig, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.loudness = nn.Linear(config.hidden_size, self.num_heads)

    @takes_call("attention_mask", "segment_ids", "cache", "state", "return_state")
    def forward(self, hidden_states: torch.Tensor, call: Call) -> LayerOutput:
        """(B, T, d) -> (B, T, d); masks, documents and states as in every family."""
        state, layer_cache = call.state_of(self.layer_idx), call.layer_cache(self.layer_idx)
        if state is not None:
            shapes = state_shapes((self.num_heads, self.head_dim), None, False)
            check_state(state, self.layer_idx, len(shapes), (hidden_states.shape[0], *shapes[0]))
        dtype = accumulation_dtype(hidden_states.dtype)
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).to(dtype)
        inputs = (value, self.loudness(hidden_states).to(dtype).sigmoid(), call.mask, call.segment_ids)
        mean, state = _heard(state, *inputs)
        if layer_cache is not None:
            layer_cache.update_state(state, hidden_states.shape[1], call.mask, (_advance, inputs), call.segment_ids)
        mixed = mean.flatten(2).to(hidden_states.dtype)
        return LayerOutput(mixed, None, None, state if call.return_state else None)


def _heard(state, value, weight, mask, segment_ids):
    """Mean (B, T, H, D) and the new state."""
    return windowed_mean(
        value, weight, None, mask=mask, segment_ids=segment_ids, initial_state=state, return_state=True
    )


def _advance(state, *inputs):
    """The state after more inputs: how a cache undoes tokens."""
    return _heard(state, *inputs)[1]


class EchoBlock(GradientCheckpointingLayer):
    """h + attention(LN(h)), then h + MLP(LN(h))."""

    def __init__(self, config: EchoConfig, layer_idx: int = 0):
        super().__init__()
        self.width = config.hidden_size
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = EchoAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
            nn.Dropout(config.hidden_dropout_prob),
        )

    @takes_call("attention_mask", "cache", "return_state", "segment_ids", "state")
    def forward(self, hidden_states: torch.Tensor, call: Call):
        """Hidden states (B, T, d), with `return_state` also the state."""
        mixed = self.attention(self.attention_norm(hidden_states), call=call)
        hidden_states = hidden_states + mixed.hidden_states
        hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return (hidden_states, mixed.state) if call.return_state else hidden_states


class EchoPreTrainedModel(PortableCheckpointMixin, PreTrainedModel):
    """What Transformers needs to know of the family."""

    config: EchoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EchoBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EchoBlock}
    create_masks_for_generate = staticmethod(mask_for_generate)


class EchoModel(EchoPreTrainedModel):
    """Embeddings, blocks, norm."""

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.is_causal = True
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None  # a sum does not ask where a token stands
        self.layers = nn.ModuleList(EchoBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @either_cache_name
    @without_cache_in_training
    @merge_with_config_defaults
    @capture_outputs
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> RecurrentModelOutput:
        """Token ids (B, T) to hidden states (B, T, d)."""
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        call = begin(self, inputs_embeds, attention_mask, position_ids, cache, use_cache, **kwargs)
        hidden_states = add_positions(
            inputs_embeds, self.embed_positions, call
        )  # and what stands at padding is blanked
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, call=call)
        return RecurrentModelOutput(last_hidden_state=self.norm(hidden_states), **cache_keyword(call.cache))


class EchoForCausalLM(RecurrentForCausalLM, EchoPreTrainedModel, GenerationMixin):
    """Echo that writes."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.model = EchoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()


class EchoForSequenceClassification(SequenceClassificationMixin, EchoPreTrainedModel):
    """Echo with a label for a whole text."""

    def __init__(self, config: EchoConfig):
        super().__init__(config)
        self.model = EchoModel(config)
        self._build_head(config)
        self.post_init()


__all__ = ["EchoForCausalLM", "EchoForSequenceClassification", "EchoModel", "EchoPreTrainedModel"]
