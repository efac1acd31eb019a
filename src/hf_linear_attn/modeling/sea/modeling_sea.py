"""SEA models: a host of Transformers whose attention is sparse, chosen by an estimate of linear cost.

`SeaModel` holds the host's body, `SeaFor...` the host's model for that task; both keep the host's parameter names, so that a
host's weights load unchanged. What SEA adds is called `sea` in each attention layer. The causal language model is in a file of
its own.
"""

import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from ..shared.compat import cache_keyword, cache_of, can_return_tuple, either_cache_name
from ..shared.heads import TextClassifierOutput, answer_loss, last_real_token, masked_lm_loss, text_loss, token_loss
from ..shared.sequence import DOCUMENT_KEYWORDS, passes_on
from .configuration_sea import SeaConfig
from .host_attention import Distillation
from .hosts import find_host
from .pretrained import SeaPreTrainedModel, check_task_labels, with_loss


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
            input_ids (`(B, T)`): the tokens, or `inputs_embeds` of shape `(B, T, d)`.
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


def head(output_class: type[ModelOutput], *targets: str):
    """The forward of a head that returns `output_class`, and whose targets, in the host's form, are called `targets`.

    The host predicts; the loss is that of the other families' heads, because not every host heeds `num_items_in_batch`.
    """

    @can_return_tuple
    @passes_on(*targets, *DOCUMENT_KEYWORDS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_sea: bool = False,
        distillation: Distillation | None = None,
        **kwargs,
    ) -> output_class:  # type: ignore[valid-type]
        """Predict; arguments as for `SeaModel`, targets and output class as those of the host's model for this task."""
        given = {name: kwargs.pop(name, None) for name in targets}
        self._check_targets(input_ids if inputs_embeds is None else inputs_embeds, **given)
        count = kwargs.pop("num_items_in_batch", None)
        output, call = self._run_host(
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            output_sea=output_sea,
            distillation=distillation,
            token_type_ids=token_type_ids,
            **kwargs,
        )
        if given[targets[0]] is None:
            return output
        return with_loss(output, self.loss_of(output, call, **given, count=count))

    return forward


class SeaForMaskedLM(SeaPreTrainedModel):
    """The host's masked language model with SEA."""

    forward = head(MaskedLMOutput, "labels")

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForMaskedLM)
        self.post_init()

    def _check_targets(self, tokens, labels) -> None:
        check_task_labels("tokens", labels, tokens, self.config.vocab_size)

    def loss_of(self, output, sequence, labels, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        return masked_lm_loss(output["logits"], labels, count)


class SeaForSequenceClassification(SeaPreTrainedModel):
    """The host's classifier of texts with SEA.

    A causal host's would look for the last token by the padding id alone, and not at all in embeddings: its body and its
    `score` are called here, and the mask decides.
    """

    labels_of = "texts"
    forward = head(TextClassifierOutput, "labels")

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForSequenceClassification)
        self.num_labels = config.num_labels
        self.post_init()

    def _check_targets(self, tokens, labels) -> None:
        check_task_labels("texts", labels, tokens, self.config.num_labels)

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


class SeaForTokenClassification(SeaPreTrainedModel):
    """The host's classifier of tokens with SEA."""

    forward = head(TokenClassifierOutput, "labels")

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForTokenClassification)
        self.num_labels = config.num_labels
        self.post_init()

    def _check_targets(self, tokens, labels) -> None:
        check_task_labels("tokens", labels, tokens, self.config.num_labels)

    def loss_of(self, output, sequence, labels, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        return token_loss(self, output["logits"], labels, count)


class SeaForQuestionAnswering(SeaPreTrainedModel):
    """The host's question answering model with SEA: scores of where an answer starts and ends."""

    forward = head(QuestionAnsweringModelOutput, "start_positions", "end_positions")

    def __init__(self, config: SeaConfig):
        super().__init__(config)
        self._build(config, AutoModelForQuestionAnswering)
        self.post_init()

    def _check_targets(self, tokens, start_positions, end_positions) -> None:
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give `start_positions` and `end_positions` together: an answer has a start and an end")

    def loss_of(self, output, sequence, start_positions, end_positions, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        return answer_loss(self, output["start_logits"], output["end_logits"], start_positions, end_positions, count)


__all__ = [
    "SeaForMaskedLM",
    "SeaForQuestionAnswering",
    "SeaForSequenceClassification",
    "SeaForTokenClassification",
    "SeaModel",
    "SeaPreTrainedModel",
]
