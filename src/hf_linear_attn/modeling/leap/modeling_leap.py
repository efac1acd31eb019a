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
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN

from ..kernels.fast_paths import fast_paths
from ..kernels.tracing import records_gradients
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
from ..shared.layers.short_convolution import ShortConvolution
from ..shared.layers.softmax_attention import SoftmaxAttention
from ..shared.layers.swiglu import SwiGLU
from ..shared.sequence import DOCUMENT_KEYWORDS, passes_on
from .attention import LeapAttention
from .configuration_leap import LeapConfig
from .fast_paths import BLOCK, FEED_FORWARD


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
