"""Checkpoints that carry their own code, replace an earlier one only when complete, and hold no pickle.

Transformers copies the code of a custom model only for classes that were registered one by one, and then names only the class
that is saved in `auto_map`. Here every save writes the family's files and all its heads, so that a folder or a Hub repository
loads with `trust_remote_code=True` where this package is not installed. Where it is installed, that copy is never run.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .compat import custom_object_save
from .configuration_common import FORMAT_FIELD, FORMAT_VERSION

SHARD = re.compile(r"-\d{5}-of-\d{5}")


def family_class(model_class: type[PreTrainedModel]) -> type:
    """The class of the family's modeling file behind a class that may derive from it (FSDP wraps classes like this)."""
    config_module = model_class.config_class.__module__.rpartition(".")[2]
    wanted = config_module.replace("configuration_", "modeling_")
    for ancestor in model_class.__mro__:
        if ancestor.__module__.rpartition(".")[2] == wanted:
            return ancestor
    raise ValueError(f"{model_class.__name__} does not come from a file {wanted}.py beside {config_module}.py")


def auto_map(model_class: type[PreTrainedModel]) -> dict[str, str]:
    """Auto class -> `file.Class` for the configuration, the body and every head in the family's modeling file."""
    module = sys.modules[family_class(model_class).__module__]
    config_class = model_class.config_class
    family, file = config_class.__name__.removesuffix("Config"), module.__name__.rpartition(".")[2]
    found = {"AutoConfig": f"{config_class.__module__.rpartition('.')[2]}.{config_class.__name__}"}
    for name, value in vars(module).items():
        if not (isinstance(value, type) and issubclass(value, PreTrainedModel) and name.startswith(family)):
            continue
        auto_class = "Auto" + ("Model" if name == f"{family}Model" else "Model" + name.removeprefix(family))
        if auto_class != "AutoModelPreTrainedModel" and hasattr(transformers, auto_class):
            found[auto_class] = f"{file}.{name}"
    return found


def copy_code(model_class: type, folder: str | os.PathLike) -> None:
    """Write the family's modeling file, and all siblings that it imports, into `folder`, side by side."""
    custom_object_save(family_class(model_class), folder)


class PortableCheckpointMixin:
    """Placed before `PreTrainedModel`: `save_pretrained`, `push_to_hub` and `from_pretrained` as the module describes."""

    config: Any

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        include_code: bool = True,
        **kwargs,
    ) -> None:
        """Save weights, configuration and code; other arguments as in Transformers.

        Args:
            save_directory: the folder. An earlier checkpoint in it stays whole until the new one is complete.
            include_code (`bool`, defaults to `True`): whether the folder gets the family's files and an `auto_map`.

        Raises:
            OSError: the checkpoint could not be written, for instance because the disk is full.
        """
        arguments = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        # With several processes all take part in writing, and an upload looks at the folder itself: both write in place.
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        in_place = push_to_hub or several or not is_main_process or os.path.isfile(save_directory)
        include_code = include_code and is_main_process and not getattr(self, "_hf_peft_config_loaded", False)
        before = dict(self.config.__dict__)
        try:
            if include_code:
                self.config.auto_map = auto_map(type(self))
                setattr(self.config, FORMAT_FIELD, FORMAT_VERSION)
            if in_place:
                if include_code and not os.path.isfile(save_directory):
                    os.makedirs(save_directory, exist_ok=True)
                    copy_code(type(self), save_directory)
                super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
            else:
                self._save_then_replace(Path(save_directory), include_code, arguments)
        finally:
            for name in ("auto_map", FORMAT_FIELD):
                if name in before:
                    setattr(self.config, name, before[name])
                else:
                    self.config.__dict__.pop(name, None)

    def _save_then_replace(self, folder: Path, include_code: bool, arguments: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            if include_code:
                copy_code(type(self), staging)
            super().save_pretrained(staging, **arguments)
            written = sorted(staging.iterdir())
            _remove_replaced_weights(folder, {path.name for path in written})
            for path in written:
                os.replace(path, folder / path.name)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the checkpoint could not be written to {folder}: {error}. An earlier one in this folder is unchanged"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = None, **kwargs):
        """Load a checkpoint as in Transformers, from safetensors alone: pickle files are never opened.

        Raises:
            ValueError: `use_safetensors=False`.
            OSError: no safetensors weights, or damaged ones.
        """
        if use_safetensors is False:
            raise ValueError(
                "`use_safetensors=False` asks for pickled weights, which can run code when opened and are never loaded: "
                "save them again as safetensors with the library that wrote them"
            )
        name = pretrained_model_name_or_path
        if name is not None and os.path.isdir(name):
            _refuse_pickle_alone(Path(name) / kwargs.get("subfolder", ""))
        try:
            return super().from_pretrained(name, *args, use_safetensors=True, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {name} are damaged or cut short ({error}): download or copy them again"
            ) from error


def _remove_replaced_weights(folder: Path, written: set[str]) -> None:
    """Delete weights in `folder` that the new ones replace under other names: a whole file would hide new shards."""
    replaced = {SHARD.sub("", name) for name in written if name.endswith(".safetensors")}
    for path in folder.iterdir():
        weights = SHARD.sub("", path.name.removesuffix(".index.json"))
        if weights in replaced and path.name not in written and path.is_file():
            path.unlink()


def _refuse_pickle_alone(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened and are never loaded: "
            "save them again as safetensors with the library that wrote them"
        )
