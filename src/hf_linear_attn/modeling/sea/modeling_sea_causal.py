"""The causal language model of SEA: the host's own, with SEA in its attention, the losses and the generation of all families."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..shared.causal_lm import Backbone, causal_lm_loss, mask_for_generate, targets_of
from ..shared.compat import can_return_tuple, either_cache_name
from ..shared.sequence import DOCUMENT_KEYWORDS, passes_on
from ..shared.states.generation import RecurrentGenerationMixin
from .configuration_sea import SeaConfig
from .host_attention import Distillation
from .hosts import find_host
from .modeling_sea import (  # the heads that a causal host's checkpoint may be loaded with, too: `auto_map` names one file
    SeaForMaskedLM,
    SeaForQuestionAnswering,
    SeaForSequenceClassification,
    SeaForTokenClassification,
    SeaModel,
)
from .pretrained import SeaPreTrainedModel, check_task_labels, with_loss


class SeaForCausalLM(RecurrentGenerationMixin, SeaPreTrainedModel, GenerationMixin):
    """The host's causal language model with SEA."""

    create_masks_for_generate = staticmethod(mask_for_generate)

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
        output, call = self._run_host(
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
        return with_loss(output, self.loss_of(output, call, labels, shift_labels, num_items_in_batch))

    def loss_of(self, output, sequence, labels=None, shift_labels=None, count=None) -> torch.Tensor:
        """See `SeaPreTrainedModel`."""
        logits = output["logits"]
        if shift_labels is None:
            check_task_labels("tokens", labels, logits, self.config.vocab_size)
            shift_labels, count = targets_of(labels, sequence, count, logits.dtype)
        return causal_lm_loss(self, logits, labels, shift_labels, count)


__all__ = [
    "SeaForCausalLM",
    "SeaForMaskedLM",
    "SeaForQuestionAnswering",
    "SeaForSequenceClassification",
    "SeaForTokenClassification",
    "SeaModel",
]
