"""Linear-time attention families for Hugging Face Transformers. Importing this package registers all of them.

    >>> import hf_linear_attn
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("path/or/hub-id")

The code of a family is imported when one of its classes is first used, here or through Transformers.

Notation in all docstrings: B batch, T time (tokens), H heads, D or E head size, C chunk, W window, M compressed width.
"""

import sys
from typing import TYPE_CHECKING

from .families import FAMILIES
from .quiet_imports import drop_torchao_talk
from .registration import load, register_all
from .version import __version__

# ruff: noqa: F401  (imported for others)
if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from .explain.paths import explain_paths
    from .modeling.danet.block import DanetBlock, DenseAttention
    from .modeling.danet.configuration_danet import DanetConfig
    from .modeling.danet.modeling_danet import (
        DanetForMaskedLM,
        DanetForMultipleChoice,
        DanetForPreTraining,
        DanetForQuestionAnswering,
        DanetForSequenceClassification,
        DanetForTokenClassification,
        DanetModel,
    )
    from .modeling.danet.modeling_danet_causal import DanetForCausalLM
    from .modeling.fastformer.configuration_fastformer import FastformerConfig
    from .modeling.fastformer.modeling_fastformer import (
        FastformerAttention,
        FastformerBlock,
        FastformerForCausalLM,
        FastformerForQuestionAnswering,
        FastformerForSequenceClassification,
        FastformerForTokenClassification,
        FastformerModel,
    )
    from .modeling.hedgehog.configuration_hedgehog import HedgehogConfig
    from .modeling.hedgehog.modeling_hedgehog import (
        HedgehogForCausalLM,
        HedgehogForSequenceClassification,
        HedgehogModel,
    )
    from .modeling.kernels.dispatch import use_backend
    from .modeling.leap.configuration_leap import LeapConfig
    from .modeling.leap.modeling_leap import (
        LeapAttention,
        LeapBlock,
        LeapForCausalLM,
        LeapForQuestionAnswering,
        LeapForSequenceClassification,
        LeapForTokenClassification,
        LeapModel,
    )
    from .modeling.sea.configuration_sea import SeaConfig
    from .modeling.sea.modeling_sea import (
        SeaForMaskedLM,
        SeaForQuestionAnswering,
        SeaForSequenceClassification,
        SeaForTokenClassification,
        SeaModel,
    )
    from .modeling.sea.modeling_sea_causal import SeaForCausalLM
    from .modeling.shared.states.cache import RecurrentCache
    from .packaged import PACKAGED_MODEL

# Public name -> module that holds it: the classes of the families, and what belongs to none.
_PLACES = {name: place for family in FAMILIES.values() for name, place in family.places().items()} | {
    "PACKAGED_MODEL": f"{__name__}.packaged",
    "RecurrentCache": f"{__name__}.modeling.shared.states.cache",
    "explain_paths": f"{__name__}.explain.paths",
    "use_backend": f"{__name__}.modeling.kernels.dispatch",
}

__all__ = sorted([*_PLACES, "__version__"])


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_all()
    found = globals()[name] = load(_PLACES[name], name)
    return found


def __dir__():
    return sorted({*globals(), *__all__})


drop_torchao_talk()
# `hf-linear-attn --help` does not wait for Transformers: a command registers when it begins to work (`cli.quiet.begin_work`).
if not getattr(sys.modules.get("hf_linear_attn_cli"), "reads_words_first", False):
    register_all()
