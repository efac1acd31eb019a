"""What the trainers of all distilled families share: a frozen teacher, two learning rates, a loss logged by its terms."""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..conversion.linearize import check_can_be_saved
from .checkpoints import LossSinceLog

ADAPTER_MARK = "lora_"  # in the names of what PEFT adds


class SaveAsTheTeacher(TrainerCallback):
    """A student that could not be saved stops before its first step, not at its first checkpoint.

    Trainer writes a tokenizer's special tokens into the generation configuration. Transformers then takes it for one that a user
    wrote and refuses flags that it lets pass in a published one; as the teacher's was, the student's stays a published one.
    """

    published = False

    def look(self, student: PreTrainedModel) -> None:
        """Before Trainer writes to it: whether the generation configuration is as it was published."""
        made = getattr(student, "generation_config", None)
        self.student = student
        self.published = made is not None and getattr(made, "_original_object_hash", None) == hash(made)

    def on_train_begin(self, args, state, control, **kwargs):
        """Mark it, then try."""
        if self.published:
            self.student.generation_config._original_object_hash = hash(self.student.generation_config)
        check_can_be_saved(self.student)


class DistillationSinceLog(LossSinceLog):
    """Carries the terms of the loss since the last log through a checkpoint, as their sum."""

    def values(self) -> dict[str, Any]:
        """The sum of the losses, and each term of each batch."""
        terms = {} if self.trainer is None else self.trainer._terms
        return super().values() | {"terms": {name: [float(each) for each in found] for name, found in terms.items()}}

    def take_over(self, values: dict[str, Any]) -> None:
        """Begin with what the interrupted run had not logged."""
        super().take_over({name: value for name, value in values.items() if name != "terms"})
        if self.trainer is not None:
            for name, found in values.get("terms", {}).items():
                self.trainer._terms[name] = [torch.tensor(each, device=self.trainer.args.device) for each in found]


class DistillationTrainer(Trainer):
    """A Trainer with a frozen teacher. A family says what its student is, what it adds to the host, and what the loss is.

    The arguments have `train_host` (whether the teacher's weights are trained along), `learning_rate` for these, and the rate
    that `added_rate` returns for what the family adds.

    Args:
        model: a student from `linearize`, with or without PEFT adapters.
        teacher: the pretrained model; frozen here. It must be another object than the student's host.
        args: the family's arguments.
        **kwargs: as for `Trainer`.
    """

    mark: str  # in the names of the parameters that the family adds

    def __init__(self, model: nn.Module, teacher: PreTrainedModel, args, **kwargs):
        student = self.student_in(model)
        self.teacher = teacher.eval().requires_grad_(False)
        if not args.train_host:
            for name, parameter in student.named_parameters():
                if self.mark not in name and ADAPTER_MARK not in name:
                    parameter.requires_grad_(False)
        use_cache = student.config.use_cache
        super().__init__(model=model, args=args, **kwargs)
        student.config.use_cache = use_cache  # Trainer switches it off, and would save it so; this loss makes no cache
        # The loss is a mean over the batch: Trainer divides it by the accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.teacher.to(args.device)
        self._saving = SaveAsTheTeacher()
        self.add_callback(self._saving)
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.add_callback(DistillationSinceLog(self))

    def student_in(self, model: nn.Module) -> PreTrainedModel:
        """The family's model inside wrappers; ValueError if there is none."""
        raise NotImplementedError

    def added_rate(self) -> float:
        """Learning rate of what the family adds."""
        raise NotImplementedError

    def train(self, *args, **kwargs):
        """As Trainer's, after a look at what will be saved (ValueError if Transformers would refuse to)."""
        self._saving.look(self.student_in(self.model))
        return super().train(*args, **kwargs)

    def create_optimizer(self, model=None):
        """AdamW with two rates: the teacher's weights and what the family adds, each with and without decay."""
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[self.mark in name, name in decayed].append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.added_rate() if is_added else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for (is_added, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
            ],
            **options,
        )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the training loss since the last log."""
        if "loss" in logs:
            logs |= self._means()
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluate with the metrics of distillation; terms of training that wait for a log stay apart."""
        training, self._terms = self._terms, defaultdict(list)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._means().items()})
        finally:
            self._terms = training
        return output

    def _means(self) -> dict[str, float]:
        means = {name: float(torch.stack(values).float().mean()) for name, values in self._terms.items() if values}
        self._terms.clear()
        return means


def divergence_of_rows(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL of each row of a student's predictions to its teacher's, (R, C) -> (R,), in float32 at least."""
    wide = torch.promote_types(ours.dtype, torch.float32)
    log_ours, log_theirs = F.log_softmax(ours.to(wide), -1), F.log_softmax(theirs.to(wide), -1)
    return F.kl_div(log_ours, log_theirs, log_target=True, reduction="none").sum(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of (B, T) over real tokens."""
    if mask is None:
        return values.mean()
    keep = mask.to(values.dtype)
    return (values * keep).sum() / keep.sum().clamp_min(1)


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, host: PreTrainedModel) -> None:
    """Refuse a teacher of another shape than the student's host, or that host itself.

    Raises:
        ValueError: with what differs.
    """
    if teacher is host:
        raise ValueError("`teacher` is the student's own host: load the teacher a second time, because it stays frozen")
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            f"`teacher` is a {type(teacher).__name__}, expected the pretrained model that `linearize` was given"
        )
    ours, theirs = student.config.host_config, teacher.config
    for name in ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if getattr(ours, name, None) != getattr(theirs, name, None):
            raise ValueError(
                f"the teacher has {name}={getattr(theirs, name, None)!r} and the student "
                f"{getattr(ours, name, None)!r}: distil from the model that `linearize` was given"
            )
    if isinstance(teacher, PreTrainedModel) and not isinstance(teacher, type(host)):
        raise ValueError(
            f"the teacher is a {type(teacher).__name__} and the student's host a {type(host).__name__}: distil "
            "from the model that `linearize` was given"
        )


def add_lora(student: PreTrainedModel, rank: int = 16, alpha: int | None = None, target_modules=None):
    """Adapters of PEFT on the host, what the family added trained in full, everything else frozen: a `PeftModel` for the trainer.

    `model.merge_and_unload()` afterwards gives the student again, with what was learned.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'hf-linear-attn[peft]'") from error
    part = student.config.model_type  # the name of the family's part in each layer, too
    mark = f".{part}."
    names = sorted({name.split(mark)[0] + f".{part}" for name, _ in student.named_parameters() if mark in name})
    config = LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=target_modules, modules_to_save=names, fan_in_fan_out=False
    )
    return get_peft_model(student, config)


__all__ = ["DistillationTrainer", "add_lora", "check_teacher", "divergence_of_rows", "masked_mean"]
