"""Loading for commands: a model that is whole, or an error that names what is missing.

Transformers gives random values to tensors that a checkpoint lacks, and says so in a warning. A command that measures, writes or
converts must not go on with them, and its user does not see the warnings of libraries.
"""

import copy
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..checkpoint_names import no_such_folder
from ..modeling.shared.compat import find_adapter_config_file, modeling_auto
from ..registration import AUTO_CLASSES
from .safe_weights import from_safetensors

logger = logging.getLogger(__name__)

# What libraries raise when a JSON file is one, but not of the shape they read.
WRONG_SHAPE = (TypeError, KeyError, AttributeError, IndexError, RecursionError)
# Buffers that older releases of Transformers saved and that nothing reads any more.
OLD_BUFFERS = re.compile(r"(attn\.masked_bias|position_ids|rotary_emb\.inv_freq)$")
NAMES_SHOWN = 4


def refuse_missing(source: str | os.PathLike) -> None:
    """OSError at once for a folder that is not there, where the Hub would be asked several times for what it cannot have."""
    missing = no_such_folder(source)
    if missing is not None:
        raise OSError(missing)


def load_config(source: str | os.PathLike) -> Any:
    """The configuration of a checkpoint.

    Raises:
        OSError: no such folder or repository.
        ValueError: a `config.json` that is none.
    """
    refuse_missing(source)
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(f"{error}{_looked_up(source)}") from error
    except StrictDataclassError as error:
        raise ValueError(f"the config.json of {str(source)!r} cannot be used: {_cause(error)}") from error
    except WRONG_SHAPE as error:
        raise ValueError(f"the config.json of {str(source)!r} is damaged ({type(error).__name__}: {error})") from error


def saved_class(config) -> str | None:
    """Name of the class that a checkpoint was saved as; None where its configuration does not say."""
    names = config.architectures
    return str(names[0]) if isinstance(names, list) and names else None


def load_tokenizer(source: str | os.PathLike) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        OSError: no such folder or repository, or none in it.
        ValueError: files that are no tokenizer.
    """
    refuse_missing(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ImportError) as error:
        raise type(error)(f"{error}{_looked_up(source)}") from error
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"the tokenizer of {str(source)!r} cannot be loaded: {_cause(error)}") from error
    except Exception as error:
        # The library `tokenizers` raises Exception itself.
        if type(error) is not Exception and not isinstance(error, WRONG_SHAPE):
            raise
        raise ValueError(
            f"the tokenizer or the config.json of {str(source)!r} is damaged ({type(error).__name__}: {error}): copy the files "
            "again"
        ) from error


def load_model(
    auto_class: Any, source: str | os.PathLike, *, new_head: bool = False, **arguments: Any
) -> PreTrainedModel:
    """A pretrained model with every tensor out of its checkpoint, from safetensors files alone; of a PEFT adapter, with its base
    model.

    Args:
        auto_class: an Auto class of Transformers, or one of its models.
        source: folder or Hub name.
        new_head: whether a head that is yet to be trained may be new: tensors that the class saved there does not have, and a
            head for another number of classes. A warning names them.
        **arguments: for `from_pretrained`.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, each named.
        OSError: no such checkpoint, damaged weights, or weights that are pickled alone.
    """
    adapter = find_adapter_config_file(os.fspath(source)) if os.path.isdir(source) else None
    if adapter is not None and not os.path.isfile(os.path.join(source, "config.json")):
        base = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        model = load_model(auto_class, base, new_head=new_head, **arguments)
        _, found = from_safetensors(auto_class, source, output_loading_info=True, **arguments)
        _refuse(_problems(found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"]), source, model)
        model.load_adapter(str(source))
        return model
    config = load_config(source)
    saved = saved_class(config)
    try:
        # Wrong shapes are refused below, with their names; Transformers would leave these to a warning.
        model, found = from_safetensors(
            auto_class, source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except OSError as error:
        raise OSError(f"{error}{_looked_up(source)}") from error
    except SafetensorError as error:
        raise OSError(
            f"the weights of {str(source)!r} are damaged or cut short ({error}): download or copy them again"
        ) from error
    except (StrictDataclassError, *WRONG_SHAPE, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{str(source)!r}, saved as {saved}, cannot be loaded ({type(error).__name__}: {_cause(error)}): are its "
            "config.json and generation_config.json whole, and do they belong to the weights?"
        ) from error
    missing, unexpected = set(found["missing_keys"]), set(found["unexpected_keys"])
    prefix = model.base_model_prefix + "."
    mismatched = set(found["mismatched_keys"])
    if new_head and (missing or mismatched):
        expected = {name.removeprefix(prefix) for name in _tensor_names(saved, config)}
        new = {name for name in missing if name.removeprefix(prefix) not in expected}
        # The classifier of another number of classes.
        other = {each for each in mismatched if not each[0].startswith(prefix)}
        if new or other:
            names = _listed(new | {name for name, *_ in other})
            logger.warning("new, with random weights: %s (%s was saved as %s)", names, source, saved)
        missing, mismatched = missing - new, mismatched - other
    if unexpected:
        # Heads that this class does not have, and that another class of the same models does.
        classes = {getattr(modeling_auto, table).get(config.model_type) for table in AUTO_CLASSES.values()}
        known = {n.removeprefix(prefix) for name in classes | {saved} for n in _tensor_names(name, config)}
        unexpected = {n for n in unexpected if n.removeprefix(prefix) not in known and not OLD_BUFFERS.search(n)}
    _refuse(_problems(missing, unexpected, mismatched), source, model, saved)
    return model


def _problems(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple]) -> list[str]:
    shapes = [f"{name} {tuple(there)} instead of {tuple(here)}" for name, there, here in mismatched]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{kind} {_listed(names)}" for kind, names in kinds if names]


def _refuse(problems: list[str], source, model: PreTrainedModel, saved: str | None = None) -> None:
    if not problems:
        return
    name = type(model).__name__
    other = f" It was saved as {saved}: load it for what that does." if saved not in (None, name) else ""
    raise ValueError(
        f"the weights in {_weights_of(source)} do not fit {name}: {'; '.join(problems)}. The model would run with random "
        f"values there.{other} Copy or download the checkpoint again, or train it anew"
    )


def _weights_of(source) -> str:
    """The file that holds the weights, if it is one."""
    files = sorted(Path(source).glob("*.safetensors")) if os.path.isdir(source) else []
    return str(files[0]) if len(files) == 1 else str(source)


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else ""
    return ", ".join(ordered[:NAMES_SHOWN]) + more


def _tensor_names(class_name: str | None, config) -> set[str]:
    """Names of the tensors of a class of Transformers or of ours; none where it cannot be built from this configuration."""
    model_class = getattr(transformers, class_name, None) if class_name else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        return set()
    try:
        with torch.device("meta"):
            return set(model_class(copy.deepcopy(config)).state_dict())
    except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError):
        return set()


def _looked_up(source) -> str:
    """What a name stands for where there is no such folder: mostly it is a folder with a wrong name."""
    if os.path.exists(source):
        return ""
    return f"\nThere is no folder {str(source)!r} here, so the Hub was asked for it."


def _cause(error: BaseException) -> str:
    """The message of an error in one line; of Transformers' checks of a configuration, what the check said."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        found = " ".join(str(error).split())
        cause = " ".join(str(error.__cause__).split())
        return found if cause in found else cause
    return " ".join(str(error).split()) or type(error).__name__
