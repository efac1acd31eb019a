"""The families, entered where Transformers keeps its own, as names: a family's code is imported when it is asked for.

Transformers finds a model of its own by names. Tables of the Auto classes say that a configuration of type "llama" is a
`LlamaConfig` and its language model a `LlamaForCausalLM`, and the module `transformers.models.llama` gives both when they are
needed. Ours are entered in the same tables, and a module `transformers.models.leap` that loads our classes stands in
`sys.modules`. So importing this package costs little beside importing Transformers, and all that looks a class up by its name
(Auto classes, pipelines, Trainer, `transformers serve`) finds ours.

Like `modeling/shared/compat.py` this file touches names that Transformers does not document (checked on 5.17 to 5.24). It is a
file of its own because compat imports the model classes of Transformers, which takes longer than everything else.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from .families import FAMILIES, Family

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
MODELS = "transformers.models"


class FamilyModule(ModuleType):
    """Stands where Transformers looks for the module of a family, and loads its classes when they are asked for."""

    def __init__(self, family: Family):
        name = f"{MODELS}.{family.name}"
        super().__init__(name, f"Classes of the family {family.name!r}, of the package hf_linear_attn.")
        self.__spec__ = ModuleSpec(name, None)
        self.family = family

    def __getattr__(self, name: str):
        if name not in self.family.places():
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            found = self.__dict__[name] = load(self.family.places()[name], name)
        except AttributeError as error:  # Transformers would take it for "no such class"
            raise ImportError(f"{name} of the family {self.family.name!r} cannot be imported: {error}") from error
        return found

    def __dir__(self):
        return [*super().__dir__(), *self.family.places()]


class Published:
    """A class of a family as an attribute of the module `transformers`, where its server looks `architectures[0]` up.

    It is set on that module's type: Transformers makes the module anew when `transformers.processing_utils` is imported.
    """

    def __init__(self, family: str, name: str):
        self.family, self.name = family, name

    def __get__(self, module, owner=None):
        if module is None:
            return self
        if module.__name__ != "transformers":  # its parts are of the same type
            raise AttributeError(f"module {module.__name__!r} has no attribute {self.name!r}")
        return getattr(sys.modules[f"{MODELS}.{self.family}"], self.name)


def load(module: str, name: str):
    """A class or a value out of a module of this package. With a model comes what PEFT wants to know of it."""
    found = getattr(importlib.import_module(module), name)
    if any(name in family.heads.values() for family in FAMILIES.values()):
        register_lora_targets()
    return found


def register_all() -> None:
    """Make Transformers know every family; harmless when repeated.

    Raises:
        ImportError: a release of Transformers that is not supported, or that has a family or a class of that name itself.
    """
    from .modeling.shared import releases  # noqa: F401  # isort: skip  (before anything that a release may lack)

    for family in FAMILIES.values():
        register(family)
    if "peft" in sys.modules:
        register_lora_targets()


def register(family: Family) -> None:
    """Make AutoConfig, the Auto models, the name tables and the module `transformers` itself know one family."""
    import transformers
    from transformers.models.auto import modeling_auto

    if isinstance(sys.modules.get(f"{MODELS}.{family.name}"), FamilyModule):
        _refuse_hiding(transformers, family)
        return
    if family.name in modeling_auto.CONFIG_MAPPING_NAMES:
        raise _is_their_own(transformers, f"model type {family.name!r}")
    _refuse_hiding(transformers, family)
    sys.modules[f"{MODELS}.{family.name}"] = FamilyModule(family)
    modeling_auto.CONFIG_MAPPING_NAMES[family.name] = family.configuration
    for auto_class, name in family.heads.items():
        getattr(modeling_auto, AUTO_CLASSES[auto_class])[family.name] = name
    # The Auto classes have turned the names of configurations round when they were imported.
    for auto_class in AUTO_CLASSES:
        getattr(modeling_auto, auto_class)._model_mapping._reverse_config_mapping[family.configuration] = family.name
    for name in (family.configuration, *family.heads.values()):
        setattr(type(transformers), name, Published(family.name, name))


def _refuse_hiding(transformers, family: Family) -> None:
    for name in (family.configuration, *family.heads.values()):
        if name in transformers.__all__:
            raise _is_their_own(transformers, f"class {name}")


def _is_their_own(transformers, what: str) -> ImportError:
    return ImportError(
        f"transformers {transformers.__version__} has a {what} of its own, which this package would hide: update hf-linear-attn"
    )


def register_lora_targets() -> None:
    """Tell PEFT, where it is installed, which layers of each family take adapters when the user names none."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft.utils import constants

    for family in FAMILIES.values():
        if family.lora_targets:
            targets = list(family.lora_targets)
            constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(family.name, targets)
