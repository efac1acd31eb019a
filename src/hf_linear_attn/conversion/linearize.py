"""A pretrained Transformer into a model of linear attention that keeps its weights."""

import copy
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from ..families import FAMILIES
from ..hub.loading import load_config, load_model, saved_class
from ..modeling.hedgehog.hosts import check_host
from ..modeling.sea.configuration_sea import SeaConfig
from ..modeling.sea.hosts import find_host
from ..modeling.sea.pretrained import SeaPreTrainedModel
from ..modeling.shared.compat import modeling_auto
from ..registration import AUTO_CLASSES
from .hedgehog import into_hedgehog

TASKS = tuple(FAMILIES["sea"].heads)  # the Auto classes of what SEA can be put into
SEA_MARK = ".sea."


def linearize(
    model: PreTrainedModel | str | os.PathLike,
    family: str = "sea",
    *,
    task: str | None = None,
    dtype=None,
    calibration: torch.Tensor | Sequence[str] | None = None,
    **options,
) -> PreTrainedModel:
    """Put linear-time attention into a pretrained model; every weight it has is carried over exactly.

    A SEA model predicts about what the old one does where `k` covers its texts, a Hedgehog model exactly that inside its
    `window`. Elsewhere both are bad until they are distilled, because what they add is not trained.

    Args:
        model: a pretrained model in memory (it is not changed), or the path or Hub id of one: a BERT, Llama, OPT or GPT-2 for
            SEA; a causal model like Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma, GPT-2 or OPT for Hedgehog.
        family: `"sea"` or `"hedgehog"`.
        task (*optional*): the Auto class to load a path with, such as `"AutoModelForCausalLM"`; from the
            `architectures` of its configuration if not given. For a model in memory its class decides.
        dtype (*optional*): dtype to load a path in; float32 if not given.
        calibration (*optional*): Hedgehog with `softmax_layers="auto:25%"`, which keeps softmax attention in that share of the
            layers, chosen by how much the predictions suffer when a layer alone is linear: text to see that on, as token ids (N,
            T) or texts; some speeches that come with the package if not given. The table is printed.
        **options: fields of `SeaConfig` or `HedgehogConfig`, such as `k`, `predictor_length`, or `window`; and `softmax_layers`.

    Returns:
        `SeaForCausalLM`, `HedgehogForCausalLM`, ... on the device and in the dtype and mode of the given model.

    Raises:
        ValueError: another family, an unsupported host, a class of the host that has no counterpart, an unknown option, weights
            that are missing in the path or do not fit, too little text for calibration, a `generation_config` that Transformers
            refuses to save.
    """
    if family not in (able := [name for name, each in FAMILIES.items() if each.linearizes]):
        raise ValueError(f"`family` is {family!r}; a pretrained model can be turned into {', '.join(able)} only")
    config_class = FAMILIES[family].config_class()
    unknown = sorted(set(options) - (set(config_class.__dataclass_fields__) - {"host_config"}))
    if unknown:
        such = "k, predictor_length" if family == "sea" else "window, softmax_layers"
        raise ValueError(
            f"unknown option(s) {unknown}: `linearize` takes the fields of {config_class.__name__}, such as {such}"
        )
    if calibration is not None and family != "hedgehog":
        raise ValueError(
            '`calibration` belongs to `linearize(..., "hedgehog", softmax_layers="auto:25%")`: leave it out'
        )
    if isinstance(model, PreTrainedModel):
        if task is not None or dtype is not None:
            raise ValueError(
                "`task` and `dtype` say how to load a path; a model in memory has both: leave them out, or use "
                "`model.to(dtype)` first"
            )
        teacher = model
    elif isinstance(model, (str, os.PathLike)):
        teacher = _load(model, family, task, dtype)
    else:
        raise ValueError(
            f"`model` is a {type(model).__name__}, expected a pretrained model of Transformers, or the path or Hub id of one"
        )
    _check_host(family, teacher.config)
    student_class = _counterpart(teacher, family)
    if family == "hedgehog":
        student = into_hedgehog(teacher, student_class, options, calibration, source=model)
    else:
        student = _into_sea(teacher, student_class, options)
    if getattr(teacher, "generation_config", None) is not None and student.can_generate():
        student.generation_config = copy.deepcopy(
            teacher.generation_config
        )  # with what it knows of where it comes from
    check_can_be_saved(student)
    return student.train(teacher.training)


def _into_sea(teacher: PreTrainedModel, sea_class, options: dict) -> SeaPreTrainedModel:
    config = SeaConfig(host_config=teacher.config, **options)
    config.tie_word_embeddings = bool(getattr(teacher.config, "tie_word_embeddings", False))
    pooler = {}
    if sea_class.__name__ == "SeaModel" and hasattr(teacher, "pooler"):
        pooler["add_pooling_layer"] = teacher.pooler is not None
    student = sea_class(config, **pooler)
    torch.nn.Module.to(student, dtype=teacher.dtype, device=teacher.device)
    _carry_over(teacher, student)
    return student


def _check_host(family: str, config) -> None:
    check_host(config) if family == "hedgehog" else find_host(config)


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


def _load(path, family: str, task: str | None, dtype) -> PreTrainedModel:
    config = load_config(path)
    _check_host(family, config)
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


def _counterpart(teacher: PreTrainedModel, family: str) -> type[PreTrainedModel]:
    name, shown = type(teacher).__name__, "SEA" if family == "sea" else family.capitalize()
    tasks = tuple(FAMILIES[family].heads)
    for task in tasks:
        if _class_name(task, teacher.config.model_type) == name:
            return FAMILIES[family].head(task)
    supported = [c for c in (_class_name(task, teacher.config.model_type) for task in tasks) if c]
    raise ValueError(f"{name} has no {shown} counterpart; classes of this host that have one: {', '.join(supported)}")


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
