"""DANet: a softmax-free model made of matrix products. The body and the heads of encoders; also the body of decoders.

    h_0 = Norm_e(embedding)         h <- h + Norm_post(FFN(DenseAttention(Norm_pre(h) n^(-1/3))))         Norm_f(h_L)

The mechanism is in `dense_attention.py`, the layers are in `block.py`, the causal language model in `modeling_danet_causal.py`.
Source: DANet specification, sections 0 to 5.
Notation: B batch, T time, d hidden size, H heads, D = d / H head size, w window, C chunk.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput, MultipleChoiceModelOutput, SequenceClassifierOutputWithPast
from transformers.utils import ModelOutput

from ..kernels.fast_paths import fast_paths
from ..shared.body import (
    RecurrentModelOutput,
    begin,
    embed_inputs,
    without_cache_in_training,
)
from ..shared.compat import (
    CACHE_NAME,
    CACHE_NAMES,
    OutputRecorder,
    cache_keyword,
    cache_of,
    can_return_tuple,
    capture_outputs,
    either_cache_name,
    init,
    merge_with_config_defaults,
)
from ..shared.cross_entropy import batch_share, cross_entropy
from ..shared.files.checkpoint import PortableCheckpointMixin
from ..shared.heads import (
    QuestionAnsweringMixin,
    TextClassifierOutput,
    TokenClassificationMixin,
    check_classes,
    check_labels,
    masked_lm_loss,
    text_loss,
)
from ..shared.layers.short_convolution import ShortConvolution
from ..shared.layers.softmax_attention import SoftmaxAttention
from ..shared.positions import sinusoidal_embeddings
from ..shared.sequence import DOCUMENT_KEYWORDS, blank_padding, check_token_types, passes_on, refuse_documents
from .block import DanetBlock, DenseAttention
from .call import danet_call
from .configuration_danet import SOFTMAX_PATTERNS, DanetConfig
from .fast_paths import BODY
from .heads import DanetLMHead, DanetPooler, TiedHeadMixin
from .norms import ScaledLayerNorm, VectorNorm, build_norm
from .softmax_layers import (
    DanetSoftmaxAttention,
    DanetSoftmaxBlock,
    maps_in_their_places,
    with_softmax_layers,
)


class DanetPreTrainedModel(PortableCheckpointMixin, PreTrainedModel):
    """Weights' initialisation and what Transformers needs to know of the family."""

    config: DanetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DanetBlock", "DanetSoftmaxBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": [OutputRecorder(DanetBlock, index=0), OutputRecorder(DanetSoftmaxBlock, index=0)],
        "attentions": [
            OutputRecorder(layer, index=1) for layer in (DenseAttention, DanetSoftmaxAttention, SoftmaxAttention)
        ],
    }

    def post_init(self):
        """Name as whole blocks only classes that are there: Accelerate's FSDP refuses a name that it does not find."""
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}

    @torch.no_grad()
    def _init_weights(self, module):
        """Specification 1.7: uniform linear layers, normal embeddings (all rows), small query matrices, norms at 1."""
        super()._init_weights(module)
        bound = self.config.initializer_range
        if isinstance(module, (VectorNorm, ScaledLayerNorm)):
            for weight in module.parameters():
                init.ones_(weight)
        elif isinstance(module, ShortConvolution):
            init.zeros_(module.weight)
        elif isinstance(module, DenseAttention) and module.half_life_shift is not None:
            init.zeros_(module.half_life_shift)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=bound)
        elif isinstance(module, nn.Linear):
            std = getattr(module, "initial_std", None)
            if std is not None:
                init.normal_(module.weight, mean=0.0, std=std)
            else:
                init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)


class DanetModel(DanetPreTrainedModel):
    """The body: embeddings, blocks, final norm. Returns hidden states (B, T, d)."""

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = self.embed_token_types = self.embedding_norm = self.norm = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.use_token_type:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        eps = (config.maxnorm_eps, config.scaled_norm_eps)
        if config.embedding_norm is not None:
            self.embedding_norm = build_norm(config.embedding_norm, config.hidden_size, *eps)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(
            (DanetSoftmaxBlock if kind.name in SOFTMAX_PATTERNS else DanetBlock)(config, i)
            for i, kind in enumerate(config.layer_kinds)
        )
        if config.final_norm is not None:
            self.norm = build_norm(config.final_norm, config.hidden_size, *eps)
        self.gradient_checkpointing = False
        # Kept here: Transformers lends the configuration an `is_causal` that a caller passes to forward.
        self.is_causal = config.is_causal
        self.post_init()

    @either_cache_name
    @without_cache_in_training
    @maps_in_their_places
    @merge_with_config_defaults
    @capture_outputs
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> RecurrentModelOutput:
        """Run the body.

        Args:
            input_ids (`(B, T)`): the tokens, or `inputs_embeds` of shape `(B, T, d)`.
            attention_mask (`(B, T)`, or with a cache `(B, past + T)`, *optional*): 1 keeps, 0 is padding, on any side.
            position_ids (`(B, T)`, *optional*): restarting positions mark packed documents.
            token_type_ids (`(B, T)`, *optional*): text A (0) or B (1), with `use_token_type`; all of text A if not given.
            cache (`Cache`, *optional*): the state to go on from; updated in place. Decoders only.
            use_cache (`bool`, *optional*): whether to make and return a state.
            **kwargs: `seq_idx`, `cu_seq_lens_q` (packed documents), `output_hidden_states`, `output_attentions` (raw scores, not
                normalised; one a layer, None for a softmax layer through a mask of Transformers' whose attention
                implementation makes no maps: only "eager" does).

        Returns:
            [`RecurrentModelOutput`].
        """
        inputs_embeds = embed_inputs(self, input_ids, inputs_embeds)  # (B, T, d)
        if self.embed_token_types is None:
            kwargs["token_type_ids"] = token_type_ids  # refused unless they are all 0
        if use_cache or cache is not None:
            self._check_that_states_serve()
        call = begin(self, inputs_embeds, attention_mask, position_ids, cache, use_cache, **kwargs)
        hidden_states = self._embed(inputs_embeds, call, token_type_ids)
        layers = self.layers[: self.config.num_hidden_layers]  # fewer while `assistant_early_exit` drafts
        call = danet_call(call, self.config, hidden_states, range(len(layers)))
        call = with_softmax_layers(call, self.config, hidden_states, attention_mask)
        hidden_states = self._run_layers(layers, hidden_states, call)
        return RecurrentModelOutput(last_hidden_state=hidden_states, **cache_keyword(call.cache))

    @fast_paths(*BODY)
    def _run_layers(self, layers, hidden_states, call) -> torch.Tensor:
        """All layers and the final norm: (B, T, d) -> (B, T, d)."""
        for layer in layers:
            hidden_states = layer(hidden_states, call=call)
        return hidden_states if self.norm is None else self.norm(hidden_states)

    def _embed(self, hidden_states, sequence, token_type_ids) -> torch.Tensor:
        """Token, position and type embeddings, normalised: (B, T, d)."""
        if self.config.pooler_mask_padding:  # else the published model's pooler looks at what stands at padding
            hidden_states = blank_padding(hidden_states, sequence.mask)
        positions = sequence.position_ids
        if sequence.mask is not None:
            # Any legal position would do for padding; its column is what the published model pools over.
            columns = torch.arange(positions.shape[1], device=positions.device)
            if self.embed_positions is not None:
                columns = columns.clamp(max=self.config.max_position_embeddings - 1)
            positions = torch.where(sequence.mask, positions, columns)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(positions)
        elif self.config.position_embedding_type == "sinusoidal":
            hidden_states = hidden_states + sinusoidal_embeddings(
                positions, self.config.hidden_size, self.config.rope_theta, hidden_states.dtype
            )
        if self.embed_token_types is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(positions)
            else:
                batch, length, _ = hidden_states.shape
                check_token_types(token_type_ids, batch, length, self.config.type_vocab_size)
            hidden_states = hidden_states + self.embed_token_types(token_type_ids)
        if self.embedding_norm is not None:
            hidden_states = self.embedding_norm(hidden_states)
        return self.dropout(hidden_states)

    def _check_that_states_serve(self) -> None:
        """Refuse a cache where a layer has to know the tokens that are still to come."""
        if not self.is_causal or self.config.scale_mode != "fixed":
            raise ValueError(
                f"a cache (`use_cache`, `{CACHE_NAME}`) needs a decoder with a fixed scale, but this model has `is_causal`="
                f"{self.is_causal} and `scale_mode`={self.config.scale_mode!r}: pass `use_cache=False`, or build it "
                "with `is_causal=True` and `scale_mode='fixed'`"
            )


@dataclass
class DanetForPreTrainingOutput(ModelOutput):
    """`prediction_logits` (B, T, vocab_size), `seq_relationship_logits` (B, 2), and `loss` with labels."""

    loss: torch.FloatTensor | None = None
    prediction_logits: torch.FloatTensor | None = None
    seq_relationship_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def _body_arguments(input_ids, attention_mask, inputs_embeds, kwargs) -> dict:
    return {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}


class DanetForPreTraining(TiedHeadMixin, DanetPreTrainedModel):
    """DANet with the two heads of pre-training: words in place, and whether text B follows text A."""

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        self.model = DanetModel(config)
        self.pooler = DanetPooler(config)
        self.lm_head = DanetLMHead(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.seq_relationship = nn.Linear(config.hidden_size, 2, bias=config.classifier_bias)
        self.post_init()

    @can_return_tuple
    @passes_on("position_ids", "token_type_ids", *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        next_sentence_label: torch.LongTensor | None = None,
        **kwargs,
    ) -> DanetForPreTrainingOutput:
        """Predict words and the relation of the texts.

        Args:
            input_ids, attention_mask, inputs_embeds, **kwargs: as for the body.
            labels (`(B, T)`, *optional*): the word at each place (not shifted, also for a decoder); -100 is ignored.
            next_sentence_label (`(B,)`, *optional*): 0 or 1.
        """
        count = kwargs.pop("num_items_in_batch", None)
        output = self.model(**_body_arguments(input_ids, attention_mask, inputs_embeds, kwargs))
        words = self.lm_head(output.last_hidden_state)
        relation = self.seq_relationship(self.dropout(self.pooler(output.last_hidden_state, attention_mask, input_ids)))
        loss = None if labels is None else masked_lm_loss(words, labels, count)
        if next_sentence_label is not None:
            check_labels("next_sentence_label", next_sentence_label, relation.shape[:1], "0 or 1 for each pair")
            check_classes("next_sentence_label", next_sentence_label, 2)
            pairs = next_sentence_label.to(relation.device)
            if labels is None:
                loss = cross_entropy(relation, pairs, count)
            else:  # `count` is one of words: a batch's pairs weigh in the mean over several batches as its words do
                loss = loss + batch_share(cross_entropy(relation, pairs), labels, count)
        return DanetForPreTrainingOutput(loss, words, relation, output.hidden_states, output.attentions)


class DanetForMaskedLM(TiedHeadMixin, DanetPreTrainedModel):
    """DANet encoder that predicts masked words."""

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        if config.is_causal:
            raise ValueError(
                "a masked language model is an encoder: build it with `is_causal=False`, or use DanetForCausalLM"
            )
        self.model = DanetModel(config)
        self.lm_head = DanetLMHead(config)
        self.post_init()

    @can_return_tuple
    @passes_on("position_ids", "token_type_ids", *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Predict words: `logits` (B, T, vocab_size); `labels` (B, T) hold the masked words and -100 elsewhere."""
        count = kwargs.pop("num_items_in_batch", None)
        output = self.model(**_body_arguments(input_ids, attention_mask, inputs_embeds, kwargs))
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else masked_lm_loss(logits, labels, count)
        return MaskedLMOutput(loss, logits, output.hidden_states, output.attentions)


class DanetForSequenceClassification(DanetPreTrainedModel):
    """DANet with a label, several labels or a number for each text."""

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DanetModel(config)
        self.pooler = DanetPooler(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)
        self.post_init()

    @can_return_tuple
    @passes_on("position_ids", "token_type_ids", *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Score texts: `logits` (B, num_labels); `labels` (B,), or (B, num_labels) for several labels or numbers."""
        count = kwargs.pop("num_items_in_batch", None)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        refuse_documents(tokens, attention_mask, **{"position_ids": None, **kwargs})
        output = self.model(**_body_arguments(input_ids, attention_mask, inputs_embeds, kwargs))
        pooled = self.pooler(output.last_hidden_state, attention_mask, input_ids)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else text_loss(self, logits, labels, count)
        return TextClassifierOutput(
            loss=loss,
            logits=logits,
            **cache_keyword(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class DanetForTokenClassification(TokenClassificationMixin, DanetPreTrainedModel):
    """DANet with a label for each token."""

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        self.model = DanetModel(config)
        self._build_head(config)
        self.post_init()


class DanetForQuestionAnswering(QuestionAnsweringMixin, DanetPreTrainedModel):
    """DANet that marks the start and end of an answer in the text."""

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        self.model = DanetModel(config)
        self._build_head(config)
        self.post_init()


class DanetForMultipleChoice(DanetPreTrainedModel):
    """DANet that scores alternatives: inputs are (B, choices, T), logits (B, choices)."""

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        self.model = DanetModel(config)
        self.pooler = DanetPooler(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1, bias=config.classifier_bias)
        self.post_init()

    @can_return_tuple
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Score `(B, choices, T)` texts; `labels` (B,) name the right choice."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or given.dim() != (3 if input_ids is not None else 4):
            shape = None if given is None else tuple(given.shape)
            raise ValueError(f"multiple choice takes inputs of shape (batch, choices, length), got {shape}")
        input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds)
        )
        count = kwargs.pop("num_items_in_batch", None)
        kwargs = {**kwargs, "position_ids": position_ids, "token_type_ids": token_type_ids}
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        refuse_documents(tokens, attention_mask, **{"position_ids": None, **kwargs})
        output = self.model(**_body_arguments(input_ids, attention_mask, inputs_embeds, kwargs))
        pooled = self.pooler(output.last_hidden_state, attention_mask, input_ids)
        logits = self.classifier(self.dropout(pooled)).view(given.shape[:2])
        loss = None
        if labels is not None:
            check_labels("labels", labels, logits.shape[:1], "the number of the right choice for each question")
            check_classes("labels", labels, logits.shape[1])
            loss = cross_entropy(logits, labels.to(logits.device), count)
        return MultipleChoiceModelOutput(loss, logits, output.hidden_states, output.attentions)


__all__ = [
    "DanetBlock",
    "DanetForMaskedLM",
    "DanetForMultipleChoice",
    "DanetForPreTraining",
    "DanetForQuestionAnswering",
    "DanetForSequenceClassification",
    "DanetForTokenClassification",
    "DanetModel",
    "DanetPreTrainedModel",
    "DenseAttention",
]
