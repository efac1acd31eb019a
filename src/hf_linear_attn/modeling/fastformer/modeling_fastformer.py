"""Fastformer: additive attention, causal with a fixed-size state, or as the original encoder.

Causal (LEAP specification, section 3). With x' = (x - mean) / (std + 1e-5) over a head's features,

    pool(x, u)_i = sum_{j in W_i} a_j x'_j / (sum_{j in W_i} a_j + 1e-5),     a_j = exp(rescale <x'_j, u'> / D)
    Q = pool(q, u_q);   p = Q k;   G = pool(p, u_k);   out = G v              products feature by feature

Encoder (Wu et al. 2021, equations 2 to 7): Q = sum_i softmax_i(<q_i, u_q> / sqrt(D)) q_i over the whole text, likewise G from
p_i = Q k_i, and out_i = W (G v_i) + q_i.

Notation: B batch, T time, d hidden size, H heads, D = d / H head size, W window.
"""

import functools

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN

from ..shared.body import (
    RecurrentModelOutput,
    add_positions,
    asks_for_attentions,
    begin,
    embed_inputs,
    position_bound,
    without_cache_in_training,
)
from ..shared.call import Call, takes_call
from ..shared.causal_lm import RecurrentForCausalLM, mask_for_generate
from ..shared.compat import (
    CACHE_NAME,
    CACHE_NAMES,
    GradientCheckpointingLayer,
    OutputRecorder,
    cache_keyword,
    capture_outputs,
    either_cache_name,
    init,
    merge_with_config_defaults,
)
from ..shared.files.checkpoint import PortableCheckpointMixin
from ..shared.heads import QuestionAnsweringMixin, SequenceClassificationMixin, TokenClassificationMixin
from ..shared.layer_output import LayerOutput, check_state, refuse_maps_after, shown_weights
from ..shared.precision import accumulation_dtype
from ..shared.sequence import DOCUMENT_KEYWORDS, passes_on, prepare_sequence
from ..shared.windowed_mean import EPS, attention_rows, state_shapes, windowed_mean
from .configuration_fastformer import LARGEST_PLAIN_LOGIT, FastformerConfig


def normalize_features(x: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (std + 1e-5) over the last dimension, with the unbiased standard deviation."""
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=1)
    # A row of equal numbers (padding) gives 0; the root of 0 has no derivatives, a constant's are 0.
    std = variance.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return (x - mean) / (std + EPS)


class FastformerAttention(nn.Module):
    """Causal additive attention on `(B, T, d)` tensors; usable in any network. O(T) time and memory.

    Args:
        config (`FastformerConfig`): sizes, rescaling, dropout.
        layer_idx (`int`, defaults to 0): which of `config.layer_windows` applies, and the place in a cache.
    """

    def __init__(self, config: FastformerConfig, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.window = config.layer_windows[layer_idx]
        self.width = config.hidden_size
        self.rescale = config.rescale
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.query_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.key_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.dropout = nn.Dropout(config.attention_dropout)

    @takes_call(
        "attention_mask", "segment_ids", "cache", "state", "return_state", "output_attentions", "output_focus_weights"
    )
    def forward(self, hidden_states: torch.Tensor, call: Call) -> LayerOutput:
        """Mix tokens causally.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`).
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 keeps; padding may stand anywhere.
            segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): non-decreasing document numbers, to restart at each.
            cache (`Cache`, *optional*): read and updated at `layer_idx`; instead of `state`.
            state, return_state: the tensors an earlier call returned, and whether to return them.
            output_attentions (`bool`): also build the (B, H, T, T) rows with which keys are pooled; O(T^2).
            output_focus_weights (`bool` or `"log"`): also return the weights (B, H, T) with which keys are pooled, or their
                logarithms, which no rescaling overflows.
            call (`Call`, *optional*): all of these but `hidden_states`, as a model hands them to its layers.

        Returns:
            [`LayerOutput`].
        """
        query, key, value = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        dtype = accumulation_dtype(hidden_states.dtype)
        state = self._state_before(hidden_states, call)
        vectors = self.query_vector, self.key_vector
        inputs = (query.to(dtype), key.to(dtype), call.mask, call.segment_ids)
        pooled_key, logits, state = self._pool_twice(vectors, state, *inputs, layout=self._layout(hidden_states, call))
        mixed = (self.dropout(pooled_key) * value.to(dtype)).flatten(2).to(hidden_states.dtype)
        layer_cache = call.layer_cache(self.layer_idx)
        if layer_cache is not None:
            replay = (functools.partial(self._advance, vectors), inputs)  # elsewhere offloaded vectors are not there
            layer_cache.update_state(state, hidden_states.shape[1], call.mask, replay, call.segment_ids)
        rows = weights = None
        if call.output_attentions:
            rows = attention_rows(logits, self.window, log_weights=True, mask=call.mask, segment_ids=call.segment_ids)
        if call.output_focus_weights:
            weights = shown_weights(logits, True, call.mask, call.output_focus_weights)
        return LayerOutput(mixed, rows, weights, state if call.return_state else None)

    def _state_before(self, hidden_states, call):
        """What earlier tokens left; None at the beginning of a text."""
        state = call.state_of(self.layer_idx)
        if state is not None:
            log_weights = self.rescale > LARGEST_PLAIN_LOGIT
            shapes = 2 * state_shapes((self.num_heads, self.head_dim), self.window, log_weights)  # of queries, of keys
            check_state(state, self.layer_idx, len(shapes), (hidden_states.shape[0], *shapes[0]))
        if call.output_attentions:
            refuse_maps_after(state)
        return state

    def _layout(self, hidden_states, call):
        """Where the real tokens stand, if that matters: a window counts them."""
        if call.mask is None or self.window is None:
            return None
        return call.layout(*hidden_states.shape[:2], hidden_states.device)

    def _pool_twice(self, vectors, state, query, key, mask, segment_ids, layout=None):
        """Pooled keys (B, T, H, D), the logits (B, T, H) they were pooled with, and the states of both poolings in one tuple."""
        split = None if state is None else len(state) // 2
        past_query, past_key = (None, None) if state is None else (state[:split], state[split:])
        pooled_query, _, new_query = self._pool(query, vectors[0], past_query, mask, segment_ids, layout)
        pooled_key, logits, new_key = self._pool(
            self.dropout(pooled_query) * key, vectors[1], past_key, mask, segment_ids, layout
        )
        return pooled_key, logits, new_query + new_key

    def _pool(self, x, vector, state, mask, segment_ids, layout):
        x, vector = normalize_features(x), normalize_features(vector.to(x.dtype))
        logits = (x * vector).sum(-1) * (self.rescale / self.head_dim)  # (B, T, H)
        plain = self.rescale <= LARGEST_PLAIN_LOGIT
        mean, state = windowed_mean(
            x,
            logits.exp() if plain else logits,
            self.window,
            log_weights=not plain,
            mask=mask,
            segment_ids=segment_ids,
            initial_state=state,
            return_state=True,
            layout=layout,
        )
        return mean, logits, state

    def _advance(self, vectors, state, *inputs):
        """The state after more inputs alone: how a cache undoes tokens (it runs the ones that stay again)."""
        return self._pool_twice(vectors, state, *inputs)[2]


class FastformerEncoderAttention(nn.Module):
    """Bidirectional additive attention on `(B, T, d)` tensors (Wu et al. 2021). O(T) time and memory.

    `layer_idx`, and what tells of states and documents, are taken for the same signature as the causal layer; all encoder layers
    are alike.
    """

    def __init__(self, config: FastformerConfig, layer_idx: int = 0):
        super().__init__()
        self.width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.query_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.key_vector = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)

    @takes_call(
        "attention_mask", "output_attentions", "output_focus_weights", "cache", "return_state", "segment_ids", "state"
    )
    def forward(self, hidden_states: torch.Tensor, call: Call) -> LayerOutput:
        """Mix tokens over the whole text; the attention (the same for every query) is that of the keys' pooling."""
        query, key, value = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        dtype = accumulation_dtype(hidden_states.dtype)
        pooled_query, _ = self._pool(query.to(dtype), self.query_vector, call.mask)
        pooled_key, weights = self._pool(self.dropout(pooled_query) * key.to(dtype), self.key_vector, call.mask)
        mixed = (self.dropout(pooled_key) * value.to(dtype)).flatten(2).to(hidden_states.dtype)
        mixed = self.out_proj(mixed) + query.flatten(2)
        weights = weights.transpose(1, 2)  # (B, H, T)
        rows = weights[:, :, None].expand(-1, -1, weights.shape[-1], -1) if call.output_attentions else None
        shown = weights.log() if call.output_focus_weights == "log" else weights if call.output_focus_weights else None
        return LayerOutput(mixed, rows, shown)

    def _pool(self, x, vector, mask):
        logits = (x * vector.to(x.dtype)).sum(-1) * self.head_dim**-0.5  # (B, T, H)
        if mask is not None:
            logits = logits.masked_fill(~mask.bool()[..., None], torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=1)
        if mask is not None:
            weights = weights * mask[..., None].to(weights.dtype)  # a row of padding alone gives 0
        return (weights[..., None] * x).sum(1, keepdim=True), weights


class FastformerMLP(nn.Module):
    """d -> intermediate -> d without biases; exact GELU by default."""

    def __init__(self, config: FastformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.dropout(self.down_proj(self.activation(self.up_proj(hidden_states))))


class FastformerBlock(GradientCheckpointingLayer):
    """Pre-norm block: h + attention(LN(h)), then h + MLP(LN(h)). Usable in any network.

    Returns the hidden states (B, T, d), or `(hidden_states, state)` with `return_state=True` (causal only).
    """

    def __init__(self, config: FastformerConfig, layer_idx: int = 0):
        super().__init__()
        attention_class = FastformerAttention if config.is_causal else FastformerEncoderAttention
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = attention_class(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FastformerMLP(config)
        self.width = config.hidden_size

    @takes_call(
        "attention_mask", "cache", "return_state", "segment_ids", "state", "output_attentions", "output_focus_weights"
    )
    def forward(self, hidden_states: torch.Tensor, call: Call):
        """See the class; other arguments as for the attention layer."""
        mixed = self.attention(self.attention_norm(hidden_states), call=call)
        hidden_states = hidden_states + mixed.hidden_states
        hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return (hidden_states, mixed.state) if call.return_state else hidden_states


class FastformerPreTrainedModel(PortableCheckpointMixin, PreTrainedModel):
    """Weights' initialisation and what Transformers needs to know of the family."""

    config: FastformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FastformerBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": FastformerBlock,
        "attentions": [
            OutputRecorder(FastformerAttention, index=1),
            OutputRecorder(FastformerEncoderAttention, index=1),
        ],
        "focus_weights": [
            OutputRecorder(FastformerAttention, index=2),
            OutputRecorder(FastformerEncoderAttention, index=2),
        ],
    }
    create_masks_for_generate = staticmethod(mask_for_generate)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (FastformerAttention, FastformerEncoderAttention)):
            init.normal_(module.query_vector, mean=0.0, std=std)
            init.normal_(module.key_vector, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)


class FastformerModel(FastformerPreTrainedModel):
    """The body: embeddings, blocks, final norm. Returns hidden states (B, T, d)."""

    def __init__(self, config: FastformerConfig):
        super().__init__(config)
        self.is_causal = config.is_causal  # Transformers changes the configuration's field during a call that names it
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(FastformerBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        output_focus_weights: bool | str = False,
        **kwargs,
    ) -> RecurrentModelOutput:
        """Run the body: arguments and results as for `LeapModel`. The encoder keeps no state and takes no packed rows."""
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        begin_call = begin if self.is_causal else begin_encoder
        call = begin_call(
            self, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_focus_weights, **kwargs
        )
        hidden_states = self.dropout(add_positions(inputs_embeds, self.embed_positions, call))
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while `assistant_early_exit` drafts
            hidden_states = layer(hidden_states, call=call)
        return RecurrentModelOutput(last_hidden_state=self.norm(hidden_states), **cache_keyword(call.cache))


def begin_encoder(
    model, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_focus_weights=False, **kwargs
) -> Call:
    """Check the encoder's inputs: what its layers share."""
    if use_cache or cache is not None:
        raise ValueError(
            f"`use_cache` and `{CACHE_NAME}` mean nothing to an encoder (`is_causal=False`): each token sees the whole text"
        )
    if kwargs.get("is_causal"):
        raise ValueError(
            "`is_causal=True` cannot be honoured: this model was built as an encoder (`config.is_causal=False`), in which "
            "every token sees the whole text"
        )
    sequence = prepare_sequence(
        inputs_embeds, attention_mask, position_ids, max_positions=position_bound(model), **kwargs
    )
    if sequence.segment_ids is not None:
        raise ValueError(
            "the Fastformer encoder pools over the whole row, so documents packed into one row would leak into each other: "
            "give each document a row of its own, with padding"
        )
    return Call(
        sequence.mask,
        sequence.position_ids,
        output_attentions=asks_for_attentions(model, kwargs),
        output_focus_weights=output_focus_weights,
    )


class FastformerForCausalLM(RecurrentForCausalLM, FastformerPreTrainedModel, GenerationMixin):
    """Fastformer language model; logits come from the tied embedding matrix and a bias (specification, section 3)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FastformerConfig):
        if not config.is_causal:
            raise ValueError(
                "`FastformerForCausalLM` needs `is_causal=True`: with False every token sees the ones to predict"
            )
        super().__init__(config)
        self.model = FastformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()


class FastformerForSequenceClassification(SequenceClassificationMixin, FastformerPreTrainedModel):
    """Fastformer with a label for a whole text: from the last real token if causal, from the mean if an encoder."""

    def __init__(self, config: FastformerConfig):
        super().__init__(config)
        self.model = FastformerModel(config)
        self._build_head(config)
        self.post_init()


class FastformerForTokenClassification(TokenClassificationMixin, FastformerPreTrainedModel):
    """Fastformer with a label for each token."""

    def __init__(self, config: FastformerConfig):
        super().__init__(config)
        self.model = FastformerModel(config)
        self._build_head(config)
        self.post_init()


class FastformerForQuestionAnswering(QuestionAnsweringMixin, FastformerPreTrainedModel):
    """Fastformer that marks the start and end of an answer in the text."""

    def __init__(self, config: FastformerConfig):
        super().__init__(config)
        self.model = FastformerModel(config)
        self._build_head(config)
        self.post_init()


__all__ = [
    "FastformerAttention",
    "FastformerBlock",
    "FastformerEncoderAttention",
    "FastformerForCausalLM",
    "FastformerForQuestionAnswering",
    "FastformerForSequenceClassification",
    "FastformerForTokenClassification",
    "FastformerModel",
    "FastformerPreTrainedModel",
]
