"""LEAP: linear explainable attention in parallel (LEAP specification, section 2).

A layer averages keys and values over a window with one positive weight a token and head, and lets each query gate the mean:

    [q, f, k, v] = x P^T                                  four projections
    a_j   = elu(<f_j, k_j> / sqrt(E)) + 1                 focus weight: how much token j counts for all that follow
    K_i, V_i = weighted means of k, v over the window     focused key and value
    g_i   = sigmoid(<q_i, K_i> / sqrt(E))                 alignment: how much token i wants of what it sees
    out_i = g_i V_i

Notation: B batch, T time, d hidden size, H heads, E = d / H head size, W window.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN

from .causal_lm import (
    RecurrentForCausalLM,
    RecurrentModelOutput,
    add_positions,
    begin,
    embed_inputs,
    mask_for_generate,
    without_cache_in_training,
)
from .compat import (
    CACHE_NAMES,
    GELUActivation,
    GradientCheckpointingLayer,
    OutputRecorder,
    cache_keyword,
    capture_outputs,
    either_cache_name,
    init,
    merge_with_config_defaults,
)
from .configuration_leap import LeapConfig
from .gelu_linear import gelu_feed_forward
from .layer_output import LayerOutput, check_state, refuse_maps_after, shown_weights
from .leap_block_training import leap_block_rest
from .leap_mechanism import leap_mechanism
from .leap_mechanism_torch import averaged, focus_weights
from .leap_step import leap_block_step
from .normed_linear import normed_linear
from .plain_layers import has_hooks
from .portable_checkpoint import PortableCheckpointMixin
from .rotary_embedding import rotate
from .sequence_inputs import DOCUMENT_KEYWORDS, check_layer_inputs, passes_on, prepare_sequence
from .task_heads import QuestionAnsweringMixin, SequenceClassificationMixin, TokenClassificationMixin
from .windowed_mean import attention_rows, state_shapes, windowed_mean


class LeapAttention(nn.Module):
    """The LEAP mechanism as a layer on `(B, T, d)` tensors; usable in any network.

    Args:
        config (`LeapConfig`): sizes, focus function, dropout, positions.
        layer_idx (`int`, defaults to 0): which of `config.layer_windows` applies, and the place in a cache.

    O(T) time and memory. No output projection (specification, section 2).
    """

    def __init__(self, config: LeapConfig, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.window = config.layer_windows[layer_idx]
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta if config.position_embedding_type == "rotary" else None
        self.exponential = config.focus_function == "exp"
        self.qfkv_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.attention_dropout)

    @either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        state: tuple[torch.Tensor, ...] | None = None,
        return_state: bool = False,
        output_attentions: bool = False,
        output_focus_weights: bool | str = False,
        projected: torch.Tensor | None = None,
    ) -> LayerOutput:
        """Mix tokens causally.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, d)`).
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 keeps; padding may stand anywhere.
            position_ids (`torch.Tensor` of shape `(B, T)` or `(1, T)`, *optional*): for rotary positions; counted if not given.
            segment_ids (`torch.Tensor` of shape `(B, T)`, *optional*): non-decreasing document numbers, to restart at each.
            cache (`Cache`, *optional*): read and updated at `layer_idx`; instead of `state`.
            state, return_state: the tensors an earlier call returned, and whether to return them (see `windowed_mean`).
            output_attentions (`bool`): also build the (B, H, T, T) rows behind the means; O(T^2).
            output_focus_weights (`bool` or `"log"`): also return the focus weights (B, H, T), or their logarithms, which no exp
                focus overflows.
            projected (`torch.Tensor` of shape `(B, T, 4 d)`, *optional*): what `qfkv_proj` gives, where it is formed already.

        Returns:
            [`LayerOutput`].
        """
        attention_mask = check_layer_inputs(hidden_states, self.num_heads * self.head_dim, attention_mask, segment_ids)
        layer_cache = None if cache is None else cache.layers[self.layer_idx]
        if layer_cache is not None:
            state = layer_cache.get_state()
        self._check_state(state, hidden_states)
        if output_attentions:
            refuse_maps_after(state)
        if self.rope_theta is not None and position_ids is None:
            if state is not None:
                raise ValueError("`position_ids` are needed to go on from a state with rotary positions")
            sequence = prepare_sequence(hidden_states, attention_mask, seq_idx=segment_ids)
            attention_mask, position_ids = sequence.mask, sequence.position_ids

        # queries, focus, keys, values: (B, T, 4, H, E)
        projected = self.qfkv_proj(hidden_states) if projected is None else projected
        projected = projected.unflatten(-1, (4, self.num_heads, self.head_dim))
        rotated = None
        if self.rope_theta is not None:
            rotated = tuple(rotate(projected[:, :, i], position_ids, self.rope_theta) for i in (0, 2))
        mixed, state = leap_mechanism(
            projected,
            self.window,
            rotated=rotated,
            exponential=self.exponential,
            dropout=self.dropout.p if self.training else 0.0,
            mask=attention_mask,
            segment_ids=segment_ids,
            initial_state=state,
            return_state=return_state or layer_cache is not None,
        )
        weights = rows = seen_weights = None
        if output_attentions or output_focus_weights or (layer_cache is not None and layer_cache.record_past):
            weights = focus_weights(projected[:, :, 1], projected[:, :, 2], self.exponential)  # (B, T, H)
        if layer_cache is not None:
            inputs = (
                averaged(projected, rotated),
                weights,
                attention_mask,
                segment_ids,
            )
            replay = (self._advance, inputs)
            layer_cache.update_state(state, hidden_states.shape[1], attention_mask, replay, segment_ids)
        if output_attentions:
            rows = attention_rows(
                weights, self.window, log_weights=self.exponential, mask=attention_mask, segment_ids=segment_ids
            )
        if output_focus_weights:
            seen_weights = shown_weights(weights, self.exponential, attention_mask, output_focus_weights)
        return LayerOutput(mixed.flatten(2), rows, seen_weights, state if return_state else None)

    def _advance(self, state, key_value, weights, mask, segment_ids):
        """The state after more inputs alone: how a cache undoes tokens (it runs the ones that stay again)."""
        return windowed_mean(
            key_value.to(weights.dtype),
            weights,
            self.window,
            log_weights=self.exponential,
            mask=mask,
            segment_ids=segment_ids,
            initial_state=state,
            return_state=True,
        )[1]

    def _check_state(self, state, hidden_states) -> None:
        if state is None:
            return
        shapes = state_shapes((2, self.num_heads, self.head_dim), self.window, self.exponential)
        check_state(state, self.layer_idx, len(shapes), (hidden_states.shape[0], *shapes[0]))


class LeapMLP(nn.Module):
    """d -> intermediate -> d with biases; exact GELU by default."""

    def __init__(self, config: LeapConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, inner: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, d) -> (B, T, d). `inner`: the first product without its bias, where it has been formed already."""
        out = None
        if type(self.activation) is GELUActivation and not has_hooks(self.activation):
            out = gelu_feed_forward(self.up_proj, self.down_proj, hidden_states, inner)
        if out is None:
            inner = self.up_proj(hidden_states) if inner is None else inner + self.up_proj.bias
            out = self.down_proj(self.activation(inner))
        return self.dropout(out)


class LeapBlock(GradientCheckpointingLayer):
    """Pre-norm block: h + LEAP(LN(h)), then h + MLP(LN(h)). Usable in any network, arguments as for `LeapAttention`.

    Returns the hidden states (B, T, d), or `(hidden_states, state)` with `return_state=True`.
    """

    def __init__(self, config: LeapConfig, layer_idx: int = 0):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = LeapAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LeapMLP(config)
        self.width = config.hidden_size
        self.recomputes_mlp = layer_idx < config.num_recomputed_mlps

    @either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        return_state: bool = False,
        **kwargs,
    ):
        """See the class."""
        attention_mask = check_layer_inputs(hidden_states, self.width, attention_mask, kwargs.get("segment_ids"))
        own = type(self.attention) is LeapAttention and type(self.mlp) is LeapMLP  # and no wrapper or replacement
        step = leap_block_step(self, hidden_states, attention_mask, cache, return_state, kwargs) if own else None
        if step is not None:
            return step
        first = self.attention.qfkv_proj if own else None
        normed, hidden_states, projected = normed_linear(self.attention_norm, first, self.attention, hidden_states)
        if projected is not None:
            rest = leap_block_rest(self, hidden_states, projected, attention_mask, cache, return_state, kwargs)
            if rest is not None:
                hidden_states, added = rest
                return hidden_states + self.mlp.dropout(added)
        mixed = self.attention(
            normed,
            attention_mask,
            cache=cache,
            return_state=return_state,
            projected=projected,
            **kwargs,
        )
        hidden_states = hidden_states + mixed.hidden_states
        if self.recomputes_mlp and torch.is_grad_enabled():
            hidden_states = checkpoint(self._feed_forward, hidden_states, use_reentrant=False)
        else:
            hidden_states = self._feed_forward(hidden_states)
        return (hidden_states, mixed.state) if return_state else hidden_states

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first = self.mlp.up_proj if type(self.mlp) is LeapMLP else None
        normed, hidden_states, inner = normed_linear(self.mlp_norm, first, self.mlp, hidden_states, with_bias=False)
        return hidden_states + (self.mlp(normed) if inner is None else self.mlp(normed, inner))


class LeapPreTrainedModel(PortableCheckpointMixin, PreTrainedModel):
    """Weights' initialisation and what Transformers needs to know of the family."""

    config: LeapConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LeapBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": LeapBlock,
        "attentions": OutputRecorder(LeapAttention, index=1),
        "focus_weights": OutputRecorder(LeapAttention, index=2),
    }
    create_masks_for_generate = staticmethod(mask_for_generate)

    @torch.no_grad()
    def _init_weights(self, module):
        # The base class would zero the embedding of the padding id; the published model draws all of them.
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class LeapModel(LeapPreTrainedModel):
    """The body: embeddings, blocks, final norm. Returns hidden states (B, T, d)."""

    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(LeapBlock(config, i) for i in range(config.num_hidden_layers))
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
        """Run the body.

        Args:
            input_ids (`(B, T)`) or inputs_embeds (`(B, T, d)`): the tokens.
            attention_mask (`(B, T)`, or with a cache `(B, past + T)`, *optional*): 1 keeps, 0 is padding, on any side.
            position_ids (`(B, T)`, *optional*): restarting positions mark packed documents.
            cache (`Cache`, *optional*): the state to go on from; updated in place.
            use_cache (`bool`, *optional*): whether to make and return a state.
            output_focus_weights (`bool` or `"log"`): also return the focus weights, (B, H, T) a layer, or their logarithms.
            **kwargs: `seq_idx`, `cu_seq_lens_q` (packed documents), `output_hidden_states`, `output_attentions`.

        Returns:
            [`RecurrentModelOutput`].
        """
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)
        output_attentions = bool(kwargs.get("output_attentions", self.config.output_attentions))
        bound = None if self.embed_positions is None else self.config.max_position_embeddings
        sequence, cache = begin(self, inputs_embeds, attention_mask, position_ids, cache, use_cache, bound, kwargs)
        hidden_states = self.dropout(add_positions(inputs_embeds, self.embed_positions, sequence))
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while `assistant_early_exit` drafts
            hidden_states = layer(
                hidden_states,
                attention_mask=sequence.mask,
                position_ids=sequence.position_ids,
                segment_ids=sequence.segment_ids,
                output_attentions=output_attentions,
                output_focus_weights=output_focus_weights,
                **cache_keyword(cache),
            )
        return RecurrentModelOutput(last_hidden_state=self.norm(hidden_states), **cache_keyword(cache))


class LeapForCausalLM(RecurrentForCausalLM, LeapPreTrainedModel, GenerationMixin):
    """LEAP language model; logits come from the tied embedding matrix."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.model = LeapModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LeapForSequenceClassification(SequenceClassificationMixin, LeapPreTrainedModel):
    """LEAP with a label for a whole text, read from its last real token."""

    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.model = LeapModel(config)
        self._build_head(config)
        self.post_init()


class LeapForTokenClassification(TokenClassificationMixin, LeapPreTrainedModel):
    """LEAP with a label for each token."""

    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.model = LeapModel(config)
        self._build_head(config)
        self.post_init()


class LeapForQuestionAnswering(QuestionAnsweringMixin, LeapPreTrainedModel):
    """LEAP that marks the start and end of an answer in the text."""

    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.model = LeapModel(config)
        self._build_head(config)
        self.post_init()


__all__ = [
    "LeapAttention",
    "LeapBlock",
    "LeapForCausalLM",
    "LeapForQuestionAnswering",
    "LeapForSequenceClassification",
    "LeapForTokenClassification",
    "LeapModel",
    "LeapPreTrainedModel",
]
