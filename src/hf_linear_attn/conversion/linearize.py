"""A pretrained Transformer into a SEA model that keeps its weights."""

import copy
import json
import os
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from ..families import FAMILIES
from ..hub.loading import load_config, load_model, saved_class
from ..modeling.sea.configuration_sea import SeaConfig
from ..modeling.sea.hosts import find_host
from ..modeling.sea.pretrained import SeaPreTrainedModel
from ..modeling.shared.compat import modeling_auto
from ..registration import AUTO_CLASSES

TASKS = tuple(FAMILIES["sea"].heads)  # the Auto classes of what SEA can be put into
SEA_MARK = ".sea."


def linearize(
    model: PreTrainedModel | str | os.PathLike, family: str = "sea", *, task: str | None = None, dtype=None, **options
) -> SeaPreTrainedModel:
    """Put linear-time attention into a pretrained model; every weight it has is carried over exactly.

    The new model predicts about what the old one does where `k` covers its texts, and badly elsewhere until it is
    distilled (`SeaDistillationTrainer`), because the estimator that SEA adds starts from random weights.

    Args:
        model: a BERT, Llama, OPT or GPT-2 in memory (it is not changed), or the path or Hub id of one.
        family: `"sea"`, the only family that can be put into a pretrained model.
        task (*optional*): the Auto class to load a path with, such as `"AutoModelForCausalLM"`; from the
            `architectures` of its configuration if not given. For a model in memory its class decides.
        dtype (*optional*): dtype to load a path in; float32 if not given.
        **options: fields of `SeaConfig`, such as `k`, `predictor_length`, `softmax_layers`.

    Returns:
        `SeaForCausalLM`, `SeaForMaskedLM`, ... on the device and in the dtype and mode of the given model.

    Raises:
        ValueError: another family, an unsupported host, a class of the host that has no SEA counterpart, an unknown
            option, weights that are missing in the path or do not fit, a `generation_config` that Transformers refuses to
            save.
    """
    if family not in (able := [name for name, each in FAMILIES.items() if each.linearizes]):
        raise ValueError(f"`family` is {family!r}; a pretrained model can be turned into {', '.join(able)} only")
    known = set(SeaConfig.__dataclass_fields__) - {"host_config"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"unknown option(s) {unknown}: `linearize` takes the fields of SeaConfig, such as k, predictor_length"
        )
    if isinstance(model, PreTrainedModel):
        if task is not None or dtype is not None:
            raise ValueError(
                "`task` and `dtype` say how to load a path; a model in memory has both: leave them out, or use "
                "`model.to(dtype)` first"
            )
        teacher = model
    elif isinstance(model, (str, os.PathLike)):
        teacher = _load(model, task, dtype)
    else:
        raise ValueError(
            f"`model` is a {type(model).__name__}, expected a pretrained model of Transformers, or the path or Hub id of one"
        )
    find_host(teacher.config)
    sea_class = _sea_class(teacher)
    config = SeaConfig(host_config=teacher.config, **options)
    config.tie_word_embeddings = bool(getattr(teacher.config, "tie_word_embeddings", False))
    pooler = {}
    if sea_class.__name__ == "SeaModel" and hasattr(teacher, "pooler"):
        pooler["add_pooling_layer"] = teacher.pooler is not None
    student = sea_class(config, **pooler)
    torch.nn.Module.to(student, dtype=teacher.dtype, device=teacher.device)
    _carry_over(teacher, student)
    if getattr(teacher, "generation_config", None) is not None and student.can_generate():
        student.generation_config = copy.deepcopy(
            teacher.generation_config
        )  # with what it knows of where it comes from
    check_can_be_saved(student)
    return student.train(teacher.training)


def check_can_be_saved(model: PreTrainedModel) -> None:
    """Write a model's configurations, as saving it will, so that what is wrong with them shows before it is trained.

    Raises:
        ValueError: one that Transformers refuses to save, with the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config", "generation_config"):
            made = getattr(model, name, None)
            try:
                if made is not None:
                    made.save_pretrained(folder)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"a model with this `{name}` could not be saved, so its training is not begun: change it in the model "
                    f"that it comes from. {error}"
                ) from error


def _load(path, task: str | None, dtype) -> PreTrainedModel:
    config = load_config(path)
    find_host(config)
    new_head = task is not None  # whoever names a task may want a head that is yet to be trained
    if task is None:
        architecture = saved_class(config)
        names = {name: task_name for task_name in TASKS for name in [_class_name(task_name, config.model_type)] if name}
        if architecture not in names:
            raise ValueError(
                f"cannot tell from {_shown(path)} for which task to load it (architectures: {config.architectures}): pass "
                f"`task`, one of {', '.join(TASKS)}"
            )
        task = names[architecture]
    if task not in TASKS:
        raise ValueError(f"`task` is {task!r}, expected one of {', '.join(TASKS)}")
    if _class_name(task, config.model_type) is None:
        raise ValueError(f"a {config.model_type} has no {task}: `task` must be one that the host has")
    return load_model(getattr(transformers, task), path, new_head=new_head, dtype=dtype or torch.float32)


def _shown(path) -> str:
    return json.dumps(str(path if not Path(str(path)).is_absolute() else Path(str(path)).name))


def _class_name(task: str, model_type: str) -> str | None:
    return getattr(modeling_auto, AUTO_CLASSES[task]).get(model_type)


def _sea_class(teacher: PreTrainedModel) -> type[SeaPreTrainedModel]:
    name = type(teacher).__name__
    for task in TASKS:
        if _class_name(task, teacher.config.model_type) == name:
            return FAMILIES["sea"].head(task)
    supported = [c for c in (_class_name(task, teacher.config.model_type) for task in TASKS) if c]
    raise ValueError(f"{name} has no SEA counterpart; classes of this host that have one: {', '.join(supported)}")


@torch.no_grad()
def _carry_over(teacher: PreTrainedModel, student: SeaPreTrainedModel) -> None:
    """Copy every weight under its own name; only SEA's may be left over."""
    target: torch.nn.Module = student.host_model
    missing, unexpected = target.load_state_dict(teacher.state_dict(), strict=False)
    foreign = [name for name in missing if SEA_MARK not in name]
    if foreign or unexpected:
        raise ValueError(
            f"the host's weights do not fit the model built from its configuration: missing {foreign[:5]}, unexpected "
            f"{unexpected[:5]}"
        )
    student.tie_weights()


__all__ = ["linearize"]
