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

from .causal_lm import Backbone, RecurrentForCausalLM, next_token_labels, refuse_two_labels
from .compat import can_return_tuple, either_cache_name
from .configuration_sea import SeaConfig
from .recurrent_cache import RecurrentGenerationMixin
from .sea_host_attention import Distillation
from .sea_hosts import find_host
from .sea_inputs import check_task_labels
from .sea_pretrained import SeaPreTrainedModel
from .sequence_inputs import DOCUMENT_KEYWORDS, passes_on


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
                the same shape, one a SEA layer; with `output_attentions` also `kept_keys`, bool (B, H, T, S).
            distillation (`Distillation`, *optional*): targets of a teacher; the output then has `attention_losses`, a
                dict of weighted terms a layer, and `fidelity` if it asks for that.
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
    """The forward of the heads that take `labels`, in the host's form: one a token, or (`labels_of`) one a text."""

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
        return self._run_host(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            output_sea=output_sea,
            distillation=distillation,
            token_type_ids=token_type_ids,
            labels=labels,
            **kwargs,
        )[0]


class SeaForMaskedLM(_SeaWithLabels):
    """The host's masked language model with SEA."""

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForMaskedLM)
        self.post_init()


class SeaForSequenceClassification(_SeaWithLabels):
    """The host's classifier of texts with SEA."""

    labels_of = "texts"

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForSequenceClassification)
        self.num_labels = config.num_labels
        self.post_init()


class SeaForTokenClassification(_SeaWithLabels):
    """The host's classifier of tokens with SEA."""

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForTokenClassification)
        self.num_labels = config.num_labels
        self.post_init()


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
        return self._run_host(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            output_sea=output_sea,
            distillation=distillation,
            token_type_ids=token_type_ids,
            start_positions=start_positions,
            end_positions=end_positions,
            **kwargs,
        )[0]


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
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The host; called, its body with SEA, whose last hidden states the output matrix is applied to.

        So losses formed of `base_model(...)` and `get_output_embeddings()`, as TRL forms them, are this model's own.
        """
        return Backbone(self.host_model, self._run_body)

    def _run_body(self, *args, **kwargs) -> BaseModelOutputWithPast:
        return SeaModel.forward(self, *args, **kwargs, of_body=True)

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
        `shift_labels` gives them already shifted instead.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # not in the signature, see RecurrentForCausalLM
        refuse_two_labels(labels, shift_labels)
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
        if labels is not None or shift_labels is not None:
            if shift_labels is None and (sequence.mask is not None or sequence.segment_ids is not None):
                shift_labels = next_token_labels(labels, sequence)
            # Their loss, without their forward: it is written for a body and an output matrix of our own.
            arguments = (output["logits"], labels, shift_labels, num_items_in_batch)
            output["loss"] = RecurrentForCausalLM._loss(self, *arguments)
        return output


__all__ = [
    "SeaForCausalLM",
    "SeaForMaskedLM",
    "SeaForQuestionAnswering",
    "SeaForSequenceClassification",
    "SeaForTokenClassification",
    "SeaModel",
    "SeaPreTrainedModel",
]
