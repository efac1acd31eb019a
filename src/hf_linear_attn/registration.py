"""One table of the families, entered into Transformers' Auto classes and name tables when the package is imported."""

import transformers

from .modeling import (
    configuration_danet,
    configuration_fastformer,
    configuration_leap,
    configuration_sea,
    modeling_danet,
    modeling_fastformer,
    modeling_leap,
    modeling_sea,
)
from .modeling.compat import modeling_auto

AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
}

# family -> (configuration, {Auto class -> our class})
FAMILIES: dict[str, tuple[type, dict[str, type]]] = {
    "leap": (
        configuration_leap.LeapConfig,
        {
            "AutoModel": modeling_leap.LeapModel,
            "AutoModelForCausalLM": modeling_leap.LeapForCausalLM,
            "AutoModelForSequenceClassification": modeling_leap.LeapForSequenceClassification,
            "AutoModelForTokenClassification": modeling_leap.LeapForTokenClassification,
            "AutoModelForQuestionAnswering": modeling_leap.LeapForQuestionAnswering,
        },
    ),
    "fastformer": (
        configuration_fastformer.FastformerConfig,
        {
            "AutoModel": modeling_fastformer.FastformerModel,
            "AutoModelForCausalLM": modeling_fastformer.FastformerForCausalLM,
            "AutoModelForSequenceClassification": modeling_fastformer.FastformerForSequenceClassification,
            "AutoModelForTokenClassification": modeling_fastformer.FastformerForTokenClassification,
            "AutoModelForQuestionAnswering": modeling_fastformer.FastformerForQuestionAnswering,
        },
    ),
    "danet": (
        configuration_danet.DanetConfig,
        {
            "AutoModel": modeling_danet.DanetModel,
            "AutoModelForCausalLM": modeling_danet.DanetForCausalLM,
            "AutoModelForMaskedLM": modeling_danet.DanetForMaskedLM,
            "AutoModelForPreTraining": modeling_danet.DanetForPreTraining,
            "AutoModelForSequenceClassification": modeling_danet.DanetForSequenceClassification,
            "AutoModelForTokenClassification": modeling_danet.DanetForTokenClassification,
            "AutoModelForQuestionAnswering": modeling_danet.DanetForQuestionAnswering,
            "AutoModelForMultipleChoice": modeling_danet.DanetForMultipleChoice,
        },
    ),
    "sea": (
        configuration_sea.SeaConfig,
        {
            "AutoModel": modeling_sea.SeaModel,
            "AutoModelForCausalLM": modeling_sea.SeaForCausalLM,
            "AutoModelForMaskedLM": modeling_sea.SeaForMaskedLM,
            "AutoModelForSequenceClassification": modeling_sea.SeaForSequenceClassification,
            "AutoModelForTokenClassification": modeling_sea.SeaForTokenClassification,
            "AutoModelForQuestionAnswering": modeling_sea.SeaForQuestionAnswering,
        },
    ),
}

# Where PEFT puts adapters when the user names no target: family -> names of linear layers.
LORA_TARGETS = {
    "leap": ["qfkv_proj"],
    "fastformer": ["qkv_proj"],
    "danet": ["query_proj", "q_proj", "v_proj"],
    "sea": ["query", "value", "q_proj", "v_proj", "c_attn"],  # of whichever host
}


def register_all() -> None:
    """Make AutoConfig, the Auto models and the name tables know every family; harmless when repeated."""
    for family, (config_class, heads) in FAMILIES.items():
        if family in modeling_auto.CONFIG_MAPPING_NAMES:
            raise ImportError(
                f"transformers {transformers.__version__} has a model type {family!r} of its own, which this package would "
                "hide: update hf-linear-attn"
            )
        transformers.AutoConfig.register(family, config_class, exist_ok=True)
        _publish(config_class)
        for auto_name, model_class in heads.items():
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
            # Trainer (label smoothing), pipelines and `transformers serve` look classes up by name in these tables.
            getattr(modeling_auto, AUTO_CLASSES[auto_name]).setdefault(family, model_class.__name__)
            _publish(model_class)
    _register_lora_targets()


def _publish(our_class: type) -> None:
    """Make a class an attribute of the `transformers` module, where its server looks `architectures[0]` up."""
    name = our_class.__name__
    if name in transformers.__all__:
        raise ImportError(
            f"transformers {transformers.__version__} has a class {name} of its own, which this package would "
            "hide: update hf-linear-attn"
        )
    setattr(transformers, name, our_class)


def _register_lora_targets() -> None:
    try:
        from peft.utils import constants
    except ImportError:
        return
    for family, targets in LORA_TARGETS.items():
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(family, list(targets))
