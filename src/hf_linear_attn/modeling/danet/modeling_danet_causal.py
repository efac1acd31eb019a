"""DANet as a causal language model that generates from a state of fixed size. Body and other heads: `modeling_danet.py`."""

from torch import nn
from transformers import GenerationMixin

from ..shared.body import RecurrentModelOutput
from ..shared.causal_lm import Backbone, RecurrentForCausalLM, mask_for_generate
from ..shared.compat import can_return_tuple
from .configuration_danet import DanetConfig
from .heads import DanetLMHead, TiedHeadMixin
from .modeling_danet import (  # the heads that a decoder's checkpoint may be loaded with, too: `auto_map` names one file
    DanetForMaskedLM,
    DanetForMultipleChoice,
    DanetForPreTraining,
    DanetForQuestionAnswering,
    DanetForSequenceClassification,
    DanetForTokenClassification,
    DanetModel,
    DanetPreTrainedModel,
)


class DanetForCausalLM(TiedHeadMixin, RecurrentForCausalLM, DanetPreTrainedModel, GenerationMixin):
    """DANet decoder that predicts each next word; generates from a state of fixed size."""

    create_masks_for_generate = staticmethod(mask_for_generate)

    def __init__(self, config: DanetConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "a causal language model is a decoder: build it with `is_causal=True`, or use DanetForMaskedLM"
            )
        self.model = DanetModel(config)
        self.lm_head = DanetLMHead(config)
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """`model` with the head's dense layer, activation and norm after it: what the output matrix is applied to.

        So losses formed of `base_model(...)` and `get_output_embeddings()`, as TRL forms them, are this model's own. `model`
        itself ends before the head.
        """
        return Backbone(self.model, self._run_to_the_matrix)

    @can_return_tuple
    def _run_to_the_matrix(self, *args, **kwargs) -> RecurrentModelOutput:
        output = self.model(*args, **kwargs)
        hidden_states = self._hidden_states(output)
        output.last_hidden_state = (
            self._features(output.last_hidden_state) if hidden_states is None else hidden_states[-1]
        )
        output.hidden_states = hidden_states
        return output

    def _features(self, hidden_states):
        return self.lm_head(hidden_states, with_logits=False)


__all__ = [
    "DanetForCausalLM",
    "DanetForMaskedLM",
    "DanetForMultipleChoice",
    "DanetForPreTraining",
    "DanetForQuestionAnswering",
    "DanetForSequenceClassification",
    "DanetForTokenClassification",
    "DanetModel",
]
