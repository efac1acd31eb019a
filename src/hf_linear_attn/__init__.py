"""Linear-time attention families for Hugging Face Transformers. Importing this package registers all of them.

    >>> import hf_linear_attn
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("path/or/hub-id")

Notation in all docstrings: B batch, T time (tokens), H heads, D or E head size, C chunk, W window, M compressed width.
"""

from .modeling import releases  # noqa: F401  # isort: skip  (before anything that a release may lack)
from . import quiet_imports  # noqa: F401  # isort: skip  (before any other import of Transformers)
from .modeling.configuration_danet import DanetConfig
from .modeling.configuration_fastformer import FastformerConfig
from .modeling.configuration_leap import LeapConfig
from .modeling.configuration_sea import SeaConfig
from .modeling.danet_block import DanetBlock, DenseAttention
from .modeling.modeling_danet import (
    DanetForCausalLM,
    DanetForMaskedLM,
    DanetForMultipleChoice,
    DanetForPreTraining,
    DanetForQuestionAnswering,
    DanetForSequenceClassification,
    DanetForTokenClassification,
    DanetModel,
)
from .modeling.modeling_fastformer import (
    FastformerAttention,
    FastformerBlock,
    FastformerForCausalLM,
    FastformerForQuestionAnswering,
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
    FastformerModel,
)
from .modeling.modeling_leap import (
    LeapAttention,
    LeapBlock,
    LeapForCausalLM,
    LeapForQuestionAnswering,
    LeapForSequenceClassification,
    LeapForTokenClassification,
    LeapModel,
)
from .modeling.modeling_sea import (
    SeaForCausalLM,
    SeaForMaskedLM,
    SeaForQuestionAnswering,
    SeaForSequenceClassification,
    SeaForTokenClassification,
    SeaModel,
)
from .modeling.recurrent_cache import RecurrentCache
from .registration import register_all
from .version import __version__

register_all()

__all__ = [
    "DanetBlock",
    "DanetConfig",
    "DanetForCausalLM",
    "DanetForMaskedLM",
    "DanetForMultipleChoice",
    "DanetForPreTraining",
    "DanetForQuestionAnswering",
    "DanetForSequenceClassification",
    "DanetForTokenClassification",
    "DanetModel",
    "DenseAttention",
    "FastformerAttention",
    "FastformerBlock",
    "FastformerConfig",
    "FastformerForCausalLM",
    "FastformerForQuestionAnswering",
    "FastformerForSequenceClassification",
    "FastformerForTokenClassification",
    "FastformerModel",
    "LeapAttention",
    "LeapBlock",
    "LeapConfig",
    "LeapForCausalLM",
    "LeapForQuestionAnswering",
    "LeapForSequenceClassification",
    "LeapForTokenClassification",
    "LeapModel",
    "RecurrentCache",
    "SeaConfig",
    "SeaForCausalLM",
    "SeaForMaskedLM",
    "SeaForQuestionAnswering",
    "SeaForSequenceClassification",
    "SeaForTokenClassification",
    "SeaModel",
    "__version__",
]
