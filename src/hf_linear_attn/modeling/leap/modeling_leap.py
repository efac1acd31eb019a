"""LEAP: linear explainable attention in parallel (LEAP specification, section 2).

A layer averages keys and values over a window with one positive weight a token and head, and lets each query gate the mean:

    [q, f, k, v] = x P^T                                  four projections
    a_j   = elu(<f_j, k_j> / sqrt(D)) + 1                 focus weight: how much token j counts for all that follow
    K_i, V_i = weighted means of k, v over the window     focused key and value
    g_i   = sigmoid(<q_i, K_i> / sqrt(D))                 alignment: how much token i wants of what it sees
    out_i = g_i V_i

A configuration may choose more, layer by layer or for all of them: weights that fade (`half_lives`), a short convolution in front
of the projections, a norm, a gate and a projection behind the heads, and layers of softmax attention in between.

Notation: B batch, T time, d hidden size, H heads, D = d / H head size, W window.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN

from ..kernels.fast_paths import fast_paths
from ..kernels.tracing import is_traced, making_buffers, records_gradients
from ..shared.body import RecurrentModelOutput, add_positions, begin, embed_inputs, without_cache_in_training
from ..shared.call import Call, takes_call
from ..shared.causal_lm import RecurrentForCausalLM, mask_for_generate
from ..shared.compat import (
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
from ..shared.layers.gated_output import GatedOutput
from ..shared.layers.short_convolution import ShortConvolution
from ..shared.layers.softmax_attention import SoftmaxAttention
from ..shared.layers.swiglu import SwiGLU
from ..shared.positions import apply_position_factors
from ..shared.precision import accumulation_dtype
from ..shared.sequence import DOCUMENT_KEYWORDS, passes_on
from ..shared.windowed_mean import attention_rows, state_shapes, windowed_mean
from .configuration_leap import LeapConfig
from .fast_paths import BLOCK, FEED_FORWARD
from .formula import averaged, focus_weights
from .mechanism import leap_mechanism

SHORTEST_HALF_LIFE = -6.0  # in octaves of a token: exp(-44) a token


class LeapAttention(nn.Module):
    """The LEAP mechanism as a layer on `(B, T, d)` tensors; usable in any network.

    Args:
        config (`LeapConfig`): sizes, focus function, dropout, positions.
        layer_idx (`int`, defaults to 0): which of `config.layer_windows` applies, and the place in a cache.

    O(T) time and memory. No output projection, unless `config.output_projection` (specification, section 2).
    """

    def __init__(self, config: LeapConfig, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        kind = config.layer_kinds[layer_idx]
        self.window = kind.window
        self.width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = config.rope_theta if config.position_embedding_type == "rotary" else None
        self.exponential = config.focus_function == "exp"
        self.qfkv_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.half_lives = self.half_life_shift = self.convolution = self.output = None
        if kind.name == "decay":
            self.half_lives = tuple(config.half_lives)
            self.half_life_shift = nn.Parameter(torch.zeros(self.num_heads))
        if config.conv_kernel is not None:
            self.convolution = ShortConvolution(config.hidden_size, config.conv_kernel)
        parts = config.head_norm, config.output_gate, config.output_projection
        if any(parts):
            self.output = GatedOutput(config.hidden_size, self.num_heads, *parts, eps=config.layer_norm_eps)
        more = {
            "weights that fade": self.half_lives,
            "short convolution": self.convolution,
            "norm, gate or projection behind the heads": self.output,
        }
        self.options = tuple(name for name, part in more.items() if part is not None)  # beyond the published layer's
        self._held_octaves: torch.Tensor | None = None

    def decay(self) -> torch.Tensor | None:
        """The rates (H,) at which weights fade, ln 2 / half-life, in float32 at least; None where they do not.

        The half-life of head h is `half_lives[h] * 2 ** half_life_shift[h]` tokens: what is learned begins at 0, so that weight
        decay draws it back to where it began.
        """
        if self.half_life_shift is None:
            return None
        shift = self.half_life_shift.to(accumulation_dtype(self.half_life_shift.dtype))
        octaves = shift + self._octaves(shift.device, shift.dtype)
        return math.log(2) * torch.exp2(-octaves.clamp(min=SHORTEST_HALF_LIFE))

    def _octaves(self, device, dtype):
        """log2 of `half_lives` (H,), copied to a device once: a CUDA graph of a decoding step could not copy it."""
        held = self._held_octaves
        if held is None or held.device != device or held.dtype != dtype:
            with making_buffers():
                held = torch.tensor([math.log2(life) for life in self.half_lives], device=device, dtype=dtype)
            if not is_traced():
                self._held_octaves = held
        return held

    @takes_call(
        "attention_mask",
        "position_ids",
        "segment_ids",
        "cache",
        "state",
        "return_state",
        "output_attentions",
        "output_focus_weights",
    )
    def forward(self, hidden_states: torch.Tensor, call: Call) -> LayerOutput:
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
            call (`Call`, *optional*): all of these but `hidden_states`, as a model hands them to its layers.

        Returns:
            [`LayerOutput`].
        """
        if self.convolution is None:
            output = self.mix(self.qfkv_proj(hidden_states), call)
        else:
            hidden_states, inputs = self.convolved(hidden_states, call), hidden_states
            output = self.mix(self.qfkv_proj(hidden_states), call, inputs)
        if self.output is None:
            return output
        mixed = output.hidden_states.unflatten(-1, (self.num_heads, self.head_dim))
        return output._replace(hidden_states=self.output(mixed, hidden_states))

    def mix(self, projected: torch.Tensor, call: Call, inputs: torch.Tensor | None = None) -> LayerOutput:
        """`forward` from the projections (B, T, 4 d) to the heads' outputs; `inputs` (B, T, d) are those of the convolution."""
        projected = projected.unflatten(-1, (4, self.num_heads, self.head_dim))  # queries, focus, keys, values
        before = self._state_before(projected, call)
        state = before if before is None or inputs is None else before[:-1]
        rotated = self.rotated(projected, call)
        mixed, state = leap_mechanism(
            projected,
            self.window,
            rotated=rotated,
            exponential=self.exponential,
            dropout=self.dropout.p if self.training else 0.0,
            mask=call.mask,
            segment_ids=call.segment_ids,
            initial_state=state,
            return_state=call.wants_state,
            layout=self._layout(projected, call),
            decay=self.decay(),
        )
        if inputs is not None and call.wants_state:
            state = *state, self._taps(inputs, call, before)
        layer_cache, weights = call.layer_cache(self.layer_idx), None
        if call.wants_maps or (layer_cache is not None and layer_cache.record_past):
            weights = focus_weights(projected[:, :, 1], projected[:, :, 2], self.exponential)  # (B, T, H)
        if layer_cache is not None:
            replay = self._advance, (averaged(projected, rotated), weights, call.mask, call.segment_ids, inputs)
            layer_cache.update_state(state, projected.shape[1], call.mask, replay, call.segment_ids)
        rows, shown = self._maps(weights, call) if call.wants_maps else (None, None)
        return LayerOutput(mixed.flatten(2), rows, shown, state if call.return_state else None)

    def _state_before(self, inputs, call):
        """What tokens before `inputs` (B, ...) left; None at the beginning of a text."""
        state = call.state_of(self.layer_idx)
        if state is not None:
            shapes = state_shapes((2, self.num_heads, self.head_dim), self.window, self.exponential)
            count = len(shapes) + (self.convolution is not None)
            check_state(state, self.layer_idx, count, (inputs.shape[0], *shapes[0]))
        if call.output_attentions:
            refuse_maps_after(state)
        return state

    def convolved(self, hidden_states, call):
        """The layer's input (B, T, d) after the short convolution, if it has one."""
        if self.convolution is None:
            return hidden_states
        state = self._state_before(hidden_states, call)
        layout = call.layout(*hidden_states.shape[:2], hidden_states.device)
        return self.convolution(hidden_states, layout, None if state is None else state[-1])

    def _taps(self, inputs, call, state):
        """The convolution's part of the state: its last inputs."""
        layout = call.layout(*inputs.shape[:2], inputs.device)
        return self.convolution.state_after(inputs, layout, None if state is None else state[-1])

    def rotated(self, projected, call):
        """Queries and keys (B, T, H, D) turned by their positions, or None."""
        if self.rope_theta is None:
            return None
        at = call.positioned(projected)
        factors = at.position_factors("rotary", self.head_dim, self.rope_theta, projected.dtype)
        return tuple(apply_position_factors(projected[:, :, i], factors) for i in (0, 2))

    def _layout(self, projected, call):
        """Where the real tokens stand, if that matters: a window counts them."""
        if call.mask is None or self.window is None:
            return None
        return call.layout(*projected.shape[:2], projected.device)

    def _maps(self, weights, call):
        """Attention rows (B, H, T, T) and focus weights (B, H, T), each None unless it was asked for."""
        rows = shown = None
        if call.output_attentions:
            rows = attention_rows(
                weights,
                self.window,
                log_weights=self.exponential,
                mask=call.mask,
                segment_ids=call.segment_ids,
                decay=self.decay(),
            )
        if call.output_focus_weights:
            shown = shown_weights(weights, self.exponential, call.mask, call.output_focus_weights)
        return rows, shown

    def _advance(self, before, key_value, weights, mask, segment_ids, inputs):
        """The state after more inputs alone: how a cache undoes tokens (it runs the ones that stay again)."""
        state = windowed_mean(
            key_value.to(weights.dtype),
            weights,
            self.window,
            log_weights=self.exponential,
            mask=mask,
            segment_ids=segment_ids,
            initial_state=before if before is None or inputs is None else before[:-1],
            return_state=True,
            decay=self.decay(),
        )[1]
        return state if inputs is None else (*state, self._taps(inputs, Call(mask, None, segment_ids), before))


class LeapMLP(nn.Module):
    """d -> intermediate -> d with biases; exact GELU by default."""

    def __init__(self, config: LeapConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    @fast_paths(*FEED_FORWARD)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)."""
        return self.dropout(self.down_proj(self.activation(self.up_proj(hidden_states))))


def build_norm(config: LeapConfig) -> nn.Module:
    """A norm of hidden states."""
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


def build_feed_forward(config: LeapConfig) -> nn.Module:
    """The feed-forward layer of a block."""
    if config.ffn_type == "swiglu":
        return SwiGLU(config.hidden_size, config.intermediate_size, config.hidden_dropout_prob)
    return LeapMLP(config)


def softmax_attention(config: LeapConfig, layer_idx: int) -> SoftmaxAttention:
    """The softmax layer of a hybrid."""
    return SoftmaxAttention(
        config,
        layer_idx,
        config.softmax_attention_heads,
        config.softmax_key_value_heads,
        window=config.layer_kinds[layer_idx].window,
        rope_theta=config.rope_theta if config.softmax_positions == "rotary" else None,
        dropout=config.attention_dropout,
    )


class LeapBlock(GradientCheckpointingLayer):
    """Pre-norm block: h + LEAP(LN(h)), then h + MLP(LN(h)). Usable in any network, arguments as for `LeapAttention`.

    Returns the hidden states (B, T, d), or `(hidden_states, state)` with `return_state=True`.
    """

    def __init__(self, config: LeapConfig, layer_idx: int = 0):
        super().__init__()
        self.attention_norm = build_norm(config)
        is_softmax = config.layer_kinds[layer_idx].name == "softmax"
        self.attention = (softmax_attention if is_softmax else LeapAttention)(config, layer_idx)
        self.mlp_norm = build_norm(config)
        self.mlp = build_feed_forward(config)
        self.width = config.hidden_size
        self.recomputes_mlp = layer_idx < config.num_recomputed_mlps

    @takes_call(
        "attention_mask",
        "cache",
        "return_state",
        "position_ids",
        "segment_ids",
        "state",
        "output_attentions",
        "output_focus_weights",
    )
    @fast_paths(*BLOCK)
    def forward(self, hidden_states: torch.Tensor, call: Call):
        """See the class."""
        mixed = self.attention(self.attention_norm(hidden_states), call=call)
        hidden_states = hidden_states + mixed.hidden_states
        hidden_states = self.formed_again(self.feed_forward, hidden_states)
        return (hidden_states, mixed.state) if call.return_state else hidden_states

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The second half: h + MLP(LN(h))."""
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))

    def formed_again(self, feed_forward: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
        """`feed_forward(hidden_states)`, once more in backward in the first `config.num_recomputed_mlps` blocks."""
        if self.recomputes_mlp and records_gradients():
            return checkpoint(feed_forward, hidden_states, use_reentrant=False)
        return feed_forward(hidden_states)


class LeapPreTrainedModel(PortableCheckpointMixin, PreTrainedModel):
    """Weights' initialisation and what Transformers needs to know of the family."""

    config: LeapConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LeapBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": LeapBlock,
        "attentions": [OutputRecorder(LeapAttention, index=1), OutputRecorder(SoftmaxAttention, index=1)],
        "focus_weights": OutputRecorder(LeapAttention, index=2),
    }
    create_masks_for_generate = staticmethod(mask_for_generate)

    @torch.no_grad()
    def _init_weights(self, module):
        # The base class would zero the embedding of the padding id; the published model draws all of them.
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, ShortConvolution):
            init.zeros_(module.weight)
        elif isinstance(module, LeapAttention) and module.half_life_shift is not None:
            init.zeros_(module.half_life_shift)


def weights_in_their_places(forward):
    """A body's `forward` whose `focus_weights` have one entry a layer: None for a softmax layer, which has none.

    Transformers collects those that there are, which would shift those of later layers to other indices.
    """

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        as_output = kwargs.pop("return_dict", None)
        if as_output is None:
            as_output = self.config.return_dict
        output = forward(self, *args, return_dict=True, **kwargs)
        found = output.get("focus_weights")
        if found is not None:
            kinds, there = self.config.layer_kinds[: self.config.num_hidden_layers], iter(found)
            output.focus_weights = tuple(None if kind.name == "softmax" else next(there) for kind in kinds)
        return output if as_output else output.to_tuple()

    return wrapper


class LeapModel(LeapPreTrainedModel):
    """The body: embeddings, blocks, final norm. Returns hidden states (B, T, d)."""

    is_causal = True

    def __init__(self, config: LeapConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(LeapBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @either_cache_name
    @without_cache_in_training
    @weights_in_their_places
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
            input_ids (`(B, T)`): the tokens, or `inputs_embeds` of shape `(B, T, d)`.
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
        call = begin(
            self, inputs_embeds, attention_mask, position_ids, cache, use_cache, output_focus_weights, **kwargs
        )
        hidden_states = self.dropout(add_positions(inputs_embeds, self.embed_positions, call))
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer while `assistant_early_exit` drafts
            hidden_states = layer(hidden_states, call=call)
        return RecurrentModelOutput(last_hidden_state=self.norm(hidden_states), **cache_keyword(call.cache))


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
