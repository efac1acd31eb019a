"""SEA models: a host of Transformers whose attention is sparse, chosen by an estimate of linear cost.

`SeaModel` holds the host's body, `SeaFor...` the host's model for that task; both keep the host's parameter names, so
that a host's weights load unchanged. What SEA adds is called `sea` in each attention layer.
"""

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
    GenerationMixin,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)

from .causal_lm import Backbone, RecurrentForCausalLM, targets_of
from .compat import cache_keyword, cache_of, can_return_tuple, either_cache_name
from .configuration_sea import SeaConfig
from .recurrent_cache import RecurrentGenerationMixin
from .sea_host_attention import Distillation
from .sea_hosts import find_host
from .sea_inputs import check_task_labels
from .sea_output import with_loss
from .sea_pretrained import SeaPreTrainedModel
from .sequence_inputs import DOCUMENT_KEYWORDS, passes_on
from .task_heads import TextClassifierOutput, answer_loss, last_real_token, masked_lm_loss, text_loss, token_loss


class SeaModel(SeaPreTrainedModel):
    """The host's body with SEA; returns what the host's body returns."""

    def __init__(self, config: SeaConfig, **kwargs):
        super().__init__(config)
        self._build(config, AutoModel, find_host(config.host_config).base_name, **kwargs)
        self.post_init()

    @either_cache_name
    @can_return_tuple
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_sea: bool = False,
        distillation: Distillation | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the model.

        Args:
            input_ids (`(B, T)`) or inputs_embeds (`(B, T, d)`): the tokens.
            attention_mask (`(B, T)`, or with a cache `(B, past + T)`, *optional*): 1 keeps, 0 is padding, on any side.
            token_type_ids (`(B, T)`, *optional*): for hosts that have them (BERT, GPT-2).
            position_ids (`(B, T)`, *optional*): positions for the host; ranks among the real tokens if not given.
            cache (`Cache`, *optional*): causal hosts: what to go on from; updated in place.
            use_cache (`bool`, *optional*): causal hosts: whether to make and return a cache.
            output_sea (`bool`): also return `estimated_attentions`, a tuple of (B, H, T, M), and `kept_cells`, bool of
                the same shape, one a layer, None for layers that keep softmax attention; with `output_attentions` also
                `kept_keys`, bool (B, H, T, S).
            distillation (`Distillation`, *optional*): targets of a teacher; the output then has `attention_losses`, a
                dict of weighted terms a layer (None likewise), and `fidelity` if it asks for that.
            **kwargs: what the host's forward takes, such as `output_hidden_states` and `output_attentions` (T x T:
                for small T).

        Returns:
            The host's output class, with the fields named above where asked for.
        """
        return self._run_host(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            use_cache,
            output_sea,
            distillation,
            token_type_ids=token_type_ids,
            **kwargs,
        )[0]


class _SeaWithLabels(SeaPreTrainedModel):
    """The forward of the heads that take `labels`, in the host's form: one a token, or (`labels_of`) one a text.

    The host predicts; the loss is that of the other families' heads, because not every host heeds `num_items_in_batch`.
    """

    @can_return_tuple
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_sea: bool = False,
        distillation: Distillation | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Predict; arguments as for `SeaModel`, labels and output class as those of the host's model for this task."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        classes = self.config.vocab_size if isinstance(self, SeaForMaskedLM) else self.config.num_labels
        check_task_labels(self.labels_of, labels, tokens, classes)
        count = kwargs.pop("num_items_in_batch", None)
        output, sequence = self._run_host(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            output_sea=output_sea,
            distillation=distillation,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        return output if labels is None else with_loss(output, self.loss_of(output, sequence, labels, count=count))


class SeaForMaskedLM(_SeaWithLabels):
    """The host's masked language model with SEA."""

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForMaskedLM)
        self.post_init()

    def loss_of(self, output, sequence, labels, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        return masked_lm_loss(output["logits"], labels, count)


class SeaForSequenceClassification(_SeaWithLabels):
    """The host's classifier of texts with SEA.

    A causal host's would look for the last token by the padding id alone, and not at all in embeddings: its body and its
    `score` are called here, and the mask decides.
    """

    labels_of = "texts"

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForSequenceClassification)
        self.num_labels = config.num_labels
        self.post_init()

    def _run_host(self, input_ids=None, inputs_embeds=None, attention_mask=None, *args, **kwargs):
        if not self.config.is_causal:
            return super()._run_host(input_ids, inputs_embeds, attention_mask, *args, **kwargs)

        def read(output, sequence):
            # With a mask the mask alone decides: `sequence.mask` is None where it shows no padding.
            pad = self.config.pad_token_id if attention_mask is None else None
            index = last_real_token(output.last_hidden_state, input_ids, sequence.mask, pad)
            rows = torch.arange(index.shape[0], device=index.device)
            return TextClassifierOutput(
                logits=self.host_model.score(output.last_hidden_state[rows, index]),
                **cache_keyword(cache_of(output)),
                hidden_states=output.hidden_states,
                attentions=output.attentions,
            )

        return super()._run_host(input_ids, inputs_embeds, attention_mask, *args, read=read, **kwargs)

    def loss_of(self, output, sequence, labels, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        return text_loss(self, output["logits"], labels, count)


class SeaForTokenClassification(_SeaWithLabels):
    """The host's classifier of tokens with SEA."""

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForTokenClassification)
        self.num_labels = config.num_labels
        self.post_init()

    def loss_of(self, output, sequence, labels, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        return token_loss(self, output["logits"], labels, count)


class SeaForQuestionAnswering(SeaPreTrainedModel):
    """The host's question answering model with SEA."""

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForQuestionAnswering)
        self.post_init()

    @can_return_tuple
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_sea: bool = False,
        distillation: Distillation | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Score where an answer starts and ends; arguments as for `SeaModel`."""
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give `start_positions` and `end_positions` together: an answer has a start and an end")
        count = kwargs.pop("num_items_in_batch", None)
        output, sequence = self._run_host(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            output_sea=output_sea,
            distillation=distillation,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        if start_positions is None:
            return output
        return with_loss(output, self.loss_of(output, sequence, start_positions, end_positions, count))

    def loss_of(self, output, sequence, start_positions, end_positions, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        return answer_loss(self, output["start_logits"], output["end_logits"], start_positions, end_positions, count)


class SeaForCausalLM(RecurrentGenerationMixin, SeaPreTrainedModel, GenerationMixin):
    """The host's causal language model with SEA."""

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                f"a {config.host_config.model_type} host is bidirectional and cannot generate: use SeaForMaskedLM, "
                "or a causal host"
            )
        self._build(config, AutoModelForCausalLM)
        self.exits_early = find_host(config.host_config).exits_early
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The host; called, its body with SEA, whose last hidden states the output matrix is applied to.

        So losses formed of `base_model(...)` and `get_output_embeddings()`, as TRL forms them, are this model's own.
        """
        return Backbone(self.host_model, self._run_body)

    def _run_body(self, *args, **kwargs) -> BaseModelOutputWithPast:
        return SeaModel.forward(self, *args, **kwargs, read=lambda output, sequence: output)

    @either_cache_name
    @can_return_tuple
    @passes_on(*DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_sea: bool = False,
        distillation: Distillation | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Predict each next token; arguments as for `SeaModel`.

        labels (`(B, T)`, *optional*) are shifted inside; -100 is ignored, and so is padding, wherever it stands. The keyword
        `shift_labels` gives them already shifted, and counts where both are given. The loss, and what it makes of
        `num_items_in_batch`, is that of the other families.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # not in the signature, see RecurrentForCausalLM
        if labels is not None and (isinstance(logits_to_keep, torch.Tensor) or logits_to_keep):
            raise ValueError("`labels` need all logits: leave `logits_to_keep` out, which drops some")
        output, sequence = self._run_host(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            use_cache,
            output_sea,
            distillation,
            token_type_ids=token_type_ids,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if labels is None and shift_labels is None:
            return output
        return with_loss(output, self.loss_of(output, sequence, labels, shift_labels, num_items_in_batch))

    def loss_of(self, output, sequence, labels=None, shift_labels=None, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        logits = output["logits"]
        if shift_labels is None:
            check_task_labels("tokens", labels, logits, self.config.vocab_size)
            shift_labels, count = targets_of(labels, sequence, count, logits.dtype)
        # Their loss, without their forward: it is written for a body and an output matrix of our own.
        return RecurrentForCausalLM._loss(self, logits, labels, shift_labels, count)


__all__ = [
    "SeaForCausalLM",
    "SeaForMaskedLM",
    "SeaForQuestionAnswering",
    "SeaForSequenceClassification",
    "SeaForTokenClassification",
    "SeaModel",
    "SeaPreTrainedModel",
]
