"""Checkpoints that carry their own code, replace an earlier one at one stroke, and hold no pickle.

Transformers copies the code of a custom model only for classes that were registered one by one, and then names only the class
that is saved in `auto_map`. Here every save writes the family's files into the folder `code`, and names all its heads, so that
a folder or a Hub repository loads with `trust_remote_code=True` where this package is not installed. Where it is installed,
that copy is never run.
"""

import copy
import importlib
import inspect
import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import create_repo, upload_folder
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..compat import create_and_tag_model_card
from ..configuration import FORMAT_FIELD, fields_read, format_of, saved_fields
from .exporter import export_code
from .whole_files import (
    CODE_FOLDER,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PREFIX,
    OnlyPartlyInPlace,
    files_in,
    put_in_place,
    staging_folder,
    write_whole,
)

if TYPE_CHECKING:  # a mixin's `super()` is what it is placed before
    from transformers import PreTrainedModel as Base
else:
    Base = object

ATTEMPTS = 10  # at loading a checkpoint that others save over meanwhile


def entry_module(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> types.ModuleType:
    """The module of the family that has, or imports, the body and every head that `config` allows (its `modeling_file`).

    `model_class` may derive from one of the family's classes (FSDP wraps classes like this). Its module is looked at, not the
    configuration's: code that was loaded with a checkpoint lies in one folder for the model, and in another for the latter.

    Raises:
        ValueError: the class is of no family of this package.
    """
    file = model_class.config_class.__module__.rpartition(".")[2].replace("configuration_", "modeling_")
    for ancestor in model_class.__mro__:
        package, _, name = ancestor.__module__.rpartition(".")
        if name.startswith(file):
            return importlib.import_module(f"{package}.{getattr(config, 'modeling_file', file)}")
    raise ValueError(f"{model_class.__name__} does not come from a file {file}.py of one of our families")


def auto_map(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """Auto class -> `code/file.Class` for the configuration, the body and every head of the family.

    All heads are looked for in one file, the one that reaches all code: what Transformers' loader has fetched for one of them
    can then be saved again with all.
    """
    config_class, module = model_class.config_class, entry_module(model_class, config)
    family, entry = config_class.__name__.removesuffix("Config"), module.__name__.rpartition(".")[2]
    found = {"AutoConfig": f"{CODE_FOLDER}/{config_class.__module__.rpartition('.')[2]}.{config_class.__name__}"}
    for name, value in vars(module).items():
        if not (isinstance(value, type) and issubclass(value, PreTrainedModel) and name.startswith(family)):
            continue
        auto_class = "Auto" + ("Model" if name == f"{family}Model" else "Model" + name.removeprefix(family))
        if auto_class != "AutoModelPreTrainedModel" and hasattr(transformers, auto_class):
            found[auto_class] = f"{CODE_FOLDER}/{entry}.{name}"
    return found


def copy_code(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: str | os.PathLike) -> None:
    """Write the code of the model's family, as far as models with this configuration use it, into `folder/code`."""
    code = Path(folder) / CODE_FOLDER
    code.mkdir(parents=True, exist_ok=True)
    export_code(Path(inspect.getfile(entry_module(model_class, config))), code)


class PortableCheckpointMixin(Base):
    """Placed before `PreTrainedModel`: `save_pretrained`, `push_to_hub` and `from_pretrained` as the module describes."""

    config: Any
    model_tags: Any
    should_save_on_this_rank: Callable[[bool], bool]
    barrier_after_gathered_checkpoint_save: Callable[[Any], None]

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

        An earlier checkpoint in the folder is replaced at one stroke: whenever this process is killed, or the machine
        loses power, the folder loads as the earlier one or as the new one, with its own weights, generation settings and
        code. `from_pretrained` in another process meanwhile gives one of the two, or an OSError that says to load again.
        Weights, code and generation settings of the earlier one are removed, other files in the folder stay; what a killed
        save left is tidied up by the next save into the folder. This needs room for both checkpoints at once.

        Not so: `distributed_checkpoint=True`, where all processes write in place; the two files of an adapter (PEFT's
        format has nothing that could name one from the other), each of which is replaced whole; and whoever reads
        `model.safetensors` without `from_pretrained` in the moment between the two.

        Args:
            save_directory: the folder.
            include_code (`bool`, defaults to `True`): whether the folder gets the family's files and an `auto_map`.

        Raises:
            OSError: the checkpoint could not be written, for instance because the disk is full. The message says which
                one is in the folder.
        """
        arguments = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        in_place = kwargs.get("distributed_checkpoint", False) or os.path.isfile(save_directory)
        saves = self.should_save_on_this_rank(is_main_process)
        include_code = include_code and saves and not getattr(self, "_hf_peft_config_loaded", False)
        before = dict(self.config.__dict__)
        try:
            if include_code:
                self.config.auto_map = auto_map(type(self), self.config)
                setattr(self.config, FORMAT_FIELD, format_of(self.config))
            if in_place or not saves:
                if include_code and not os.path.isfile(save_directory):
                    os.makedirs(save_directory, exist_ok=True)
                    copy_code(type(self), self.config, save_directory)
                super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)
            else:
                self._save_then_replace(Path(save_directory), include_code, push_to_hub, arguments)
        finally:
            for name in ("auto_map", FORMAT_FIELD):
                if name in before:
                    setattr(self.config, name, before[name])
                else:
                    self.config.__dict__.pop(name, None)
        # The others were let go when the weights were written, not when they came into their place.
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))

    def _save_then_replace(self, folder: Path, include_code: bool, push_to_hub: bool, arguments: dict) -> None:
        known = inspect.signature(PreTrainedModel.save_pretrained).parameters
        for_hub = {name: arguments.pop(name) for name in list(arguments) if push_to_hub and name not in known}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with staging_folder(folder) as staging:
                if include_code:
                    copy_code(type(self), self.config, staging)
                super().save_pretrained(staging, **arguments)
                written = sorted(files_in(staging))
                put_in_place(staging, folder)
        except OnlyPartlyInPlace as error:
            raise OSError(str(error)) from error
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the checkpoint could not be written to {folder}: {error}. An earlier one in this folder is unchanged"
            ) from error
        if push_to_hub:
            self._upload(folder, written, token=arguments.get("token"), **for_hub)

    def _upload(self, folder, written, token, repo_id=None, commit_message=None, create_pr=False, **kwargs) -> None:
        repo_id = repo_id or os.path.basename(os.path.abspath(folder))
        repo_id = create_repo(repo_id, exist_ok=True, token=token, **kwargs).repo_id
        card = create_and_tag_model_card(repo_id, self.model_tags, token=token)
        write_whole(folder / "README.md", card.save)
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*written, "README.md"],
            commit_message=commit_message or "Upload model",
            token=token,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = None, **kwargs):
        """Load a checkpoint as in Transformers, from safetensors alone: pickle files are never opened.

        A folder that another process saves over meanwhile is loaded again, until configuration and weights belong together.

        Raises:
            ValueError: `use_safetensors=False`.
            OSError: no safetensors weights, or damaged ones; or the checkpoint was saved over after the Auto class (or
                you, with `AutoConfig`) had read another configuration from it: load it again.
        """
        if use_safetensors is False:
            raise ValueError(
                "`use_safetensors=False` asks for pickled weights, which can run code when opened and are never loaded: "
                "save them again as safetensors with the library that wrote them"
            )
        name = pretrained_model_name_or_path

        def load(**changed):
            try:
                return super(PortableCheckpointMixin, cls).from_pretrained(
                    name, *args, use_safetensors=True, **{**kwargs, **changed}
                )
            except SafetensorError as error:
                raise OSError(
                    f"the weights of {name} are damaged or cut short ({error}): download or copy them again"
                ) from error

        if name is None or not os.path.isdir(name):
            return load()
        folder = Path(name) / kwargs.get("subfolder", "")
        _refuse_pickle_alone(folder)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return load()  # one process alone cannot begin again
        return _load_unchanged(folder, load, name, kwargs)


def _load_unchanged(folder: Path, load: Callable, name, kwargs: dict):
    """`load()` once more whenever the checkpoint in `folder` was replaced meanwhile, be it an error or garbage that came."""
    for _ in range(ATTEMPTS):
        before = _identity(folder)
        changed = _as_it_is_now(folder, name, kwargs)
        loaded, error = None, None
        try:
            loaded = load(**changed)
        except Exception as caught:
            error = caught
        if _identity(folder) == before:
            if error is not None:
                raise error
            return loaded
    raise OSError(
        f"the checkpoint in {folder} was saved over {ATTEMPTS} times while it was loaded: load it again"
    ) from error


def _identity(folder: Path) -> list[tuple]:
    """Which files a checkpoint consists of at this moment; saving gives it others, and never writes into one."""
    with os.scandir(folder) as entries:
        named = [each for each in entries if each.name.endswith((".safetensors", ".index.json", "config.json"))]
        found = []
        for entry in named:
            try:
                state = entry.stat()
            except FileNotFoundError:
                continue
            found.append((entry.name, state.st_ino, state.st_mtime_ns, state.st_size))
    return sorted(found)


def _as_it_is_now(folder: Path, name, kwargs: dict) -> dict:
    """Arguments that fit the `config.json` of this moment, which may be that of a save in progress (`whole_files`)."""
    try:
        fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # for Transformers to report
    changed: dict[str, Any] = {}
    config, weights = kwargs.get("config"), fields.get("transformers_weights")
    read = fields_read(config)
    if config is not None and read not in (None, saved_fields(fields)) and str(config.name_or_path) == str(name):
        raise OSError(
            f"the checkpoint in {folder} was saved over after its configuration was read, and has another one now: load "
            "both again"
        )
    named = getattr(config, "transformers_weights", None)
    if isinstance(config, PreTrainedConfig) and weights != named and (_of_a_save(weights) or _of_a_save(named)):
        changed["config"] = copy.deepcopy(config)
        changed["config"].transformers_weights = weights
    if _of_a_save(weights) and "generation_config" not in kwargs:
        settings = folder / Path(weights).with_name(GENERATION_CONFIG_NAME)
        if settings.is_file():
            changed["generation_config"] = GenerationConfig.from_pretrained(settings.parent)
    return changed


def _of_a_save(weights: str | None) -> bool:
    return weights is not None and weights.startswith(PREFIX)


def _refuse_pickle_alone(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened and are never loaded: "
            "save them again as safetensors with the library that wrote them"
        )
