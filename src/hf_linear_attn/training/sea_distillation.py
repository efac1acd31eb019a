"""Distil a pretrained teacher into its SEA student with Trainer.

    teacher = AutoModelForCausalLM.from_pretrained("path/or/hub-id")
    student = linearize(teacher, "sea", k=64, predictor_length=128)
    args = SeaDistillationArguments("out", max_steps=1000)
    SeaDistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=...).train()

The teacher runs frozen, a batch at a time; of each of its layers only queries, keys and context are kept, and every
T x T comparison is made by blocks of rows in the student's layer, so memory stays linear in the length.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..conversion.linearize import check_can_be_saved
from ..modeling.sea.host_attention import ATTENTION_NAME, Distillation, LayerResults, register_attention, sea_call
from ..modeling.sea.hosts import HOSTS
from ..modeling.sea.losses import TeacherTargets
from ..modeling.sea.modeling_sea import SeaPreTrainedModel
from ..modeling.sea.pretrained import PACKING_KEYWORDS
from ..modeling.shared.sequence import SequenceInputs, prepare_sequence
from .checkpoints import LossSinceLog

SEA_MARK = ".sea."
BLOCK_ELEMENTS = 1 << 24  # elements of the predictions that are compared together
PREDICTIONS = ("logits", "start_logits", "end_logits")
TARGETS = ("labels", "shift_labels", "start_positions", "end_positions")


@dataclass
class SeaDistillationArguments(TrainingArguments):
    """`TrainingArguments` with the weights of the losses. Defaults follow the paper: constant rate, weight decay 0.01.

    Args:
        learning_rate: rate of the weights that come from the teacher (1e-5; the paper's OPT runs take 2e-6).
        sea_learning_rate: rate of what SEA adds.
        task_weight: weight of the task's own loss (needs labels).
        hidden_weight: weight of the mean squared error of the hidden states; 10 for BERT, 5 for OPT in the paper.
        logits_weight: weight of the KL of the predictions; 0.1 for BERT, 0.2 for OPT in the paper.
        attention_weight: weight of the layers' losses (estimate, attention, context).
        attention_loss_rows: how many query rows, drawn anew at each step, the layers' losses look at; None for all. The
            loss then costs rows x T instead of T x T.
        train_host: whether the teacher's weights are trained along; with False only SEA is (and adapters, if any).
    """

    learning_rate: float = field(default=1e-5)
    sea_learning_rate: float = field(default=1e-4)
    weight_decay: float = field(default=0.01)
    lr_scheduler_type: str = field(default="constant")
    task_weight: float = field(default=0.1)
    hidden_weight: float = field(default=10.0)
    logits_weight: float = field(default=0.1)
    attention_weight: float = field(default=1.0)
    attention_loss_rows: int | None = field(default=None)
    train_host: bool = field(default=True)

    def __post_init__(self):
        super().__post_init__()
        weights = {
            name: getattr(self, name) for name in ("task_weight", "hidden_weight", "logits_weight", "attention_weight")
        }
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not any(weights.values()):
            raise ValueError("all loss weights are 0: there is nothing to learn from")
        if self.attention_loss_rows is not None and self.attention_loss_rows < 1:
            raise ValueError(
                f"attention_loss_rows must be at least 1, or None for all rows, got {self.attention_loss_rows}"
            )
        if not self.sea_learning_rate > 0:
            raise ValueError(f"sea_learning_rate must be greater than 0, got {self.sea_learning_rate}")


class FeatureRedraw(TrainerCallback):
    """Draws the random features anew every `interval` optimizer steps, the same on every device and after a resume."""

    def __init__(self, interval: int):
        self.interval = interval

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Redraw, if it is time."""
        if self.interval and state.global_step % self.interval == 0:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + state.global_step)
            sea_model(model).redraw_features(generator)


class SaveAsTheTeacher(TrainerCallback):
    """A student that could not be saved stops before its first step, not at its first checkpoint.

    Trainer writes a tokenizer's special tokens into the generation configuration. Transformers then takes it for one that a user
    wrote and refuses flags that it lets pass in a published one; as the teacher's was, the student's stays a published one.
    """

    published = False

    def look(self, student: SeaPreTrainedModel) -> None:
        """Before Trainer writes to it: whether the generation configuration is as it was published."""
        made = getattr(student, "generation_config", None)
        self.published = made is not None and getattr(made, "_original_object_hash", None) == hash(made)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Mark it, then try."""
        student = sea_model(model)
        if self.published:
            student.generation_config._original_object_hash = hash(student.generation_config)
        check_can_be_saved(student)


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


def sea_model(model: nn.Module) -> SeaPreTrainedModel:
    """The SEA model inside wrappers (PEFT, DistributedDataParallel)."""
    for module in model.modules():
        if isinstance(module, SeaPreTrainedModel):
            return module
    raise ValueError(f'{type(model).__name__} holds no SEA model: make one with `linearize(model, "sea")`')


@contextmanager
def _recording(teacher: PreTrainedModel):
    """Let the teacher's layers leave their targets while the context is open."""
    register_attention()
    config = teacher.config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _tokens(inputs: dict[str, Any]) -> torch.Tensor:
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def _sequence(inputs: dict[str, Any]) -> SequenceInputs:
    documents = {name: inputs.get(name) for name in ("seq_idx", "cu_seq_lens_q")}
    return prepare_sequence(_tokens(inputs), inputs.get("attention_mask"), inputs.get("position_ids"), **documents)


@torch.no_grad()
def record_targets(teacher: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[int, TeacherTargets], Any]:
    """Run a teacher on a batch: its layers' targets and its output with hidden states. Memory linear in T.

    `inputs` is what Trainer gives a model; padding may stand anywhere and rows may be packed, as for the student.
    """
    tokens = _tokens(inputs)
    arguments = {name: value for name, value in inputs.items() if name not in {"position_ids"} | PACKING_KEYWORDS}
    call = sea_call(_sequence(inputs), tokens, recorded=LayerResults())
    if HOSTS[teacher.config.model_type].causal:
        arguments["use_cache"] = False
    if not HOSTS[teacher.config.model_type].token_types:
        arguments.pop("token_type_ids", None)
    with _recording(teacher):
        output = teacher(
            **arguments, position_ids=call.position_ids, output_hidden_states=True, return_dict=True, sea_call=call
        )
    return call.recorded.found, output


class SeaDistillationTrainer(Trainer):
    """A Trainer whose loss compares the student with a teacher: predictions, hidden states, and every attention layer.

    In evaluation the loss is the task's own (so that it compares with any other model's), and the metrics add
    `teacher_loss`, `distillation_loss`, `estimate_kl` against `uniform_kl` (below it the estimate knows something),
    `top_k_recall`, `attention_mass` and `keys_per_query`, means over layers.

    Args:
        model: a SEA model from `linearize`, with or without PEFT adapters.
        teacher: the pretrained model; frozen here. It must be another object than the student's host.
        args: `SeaDistillationArguments`.
        **kwargs: as for `Trainer`.

    Raises:
        ValueError: a model that is no SEA model, a teacher of another shape.
    """

    args: SeaDistillationArguments

    def __init__(self, model: nn.Module, teacher: PreTrainedModel, args: SeaDistillationArguments, **kwargs):
        student = sea_model(model)
        _check_teacher(teacher, student)
        if not isinstance(args, SeaDistillationArguments):
            raise ValueError("`args` must be SeaDistillationArguments, which hold the weights of the losses")
        self.teacher = teacher.eval().requires_grad_(False)
        if not args.train_host:
            for name, parameter in student.named_parameters():
                if SEA_MARK not in name and "lora_" not in name:
                    parameter.requires_grad_(False)
        use_cache = student.config.use_cache
        super().__init__(model=model, args=args, **kwargs)
        student.config.use_cache = use_cache  # Trainer switches it off, and would save it so; this loss makes no cache
        # The loss is a mean over the batch: Trainer divides it by the accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.teacher.to(args.device)
        self.add_callback(FeatureRedraw(student.config.feature_redraw_interval))
        self._saving = SaveAsTheTeacher()
        self.add_callback(self._saving)
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.add_callback(DistillationSinceLog(self))

    def train(self, *args, **kwargs):
        """As Trainer's, after a look at what will be saved (ValueError if Transformers would refuse to)."""
        self._saving.look(sea_model(self.model))
        return super().train(*args, **kwargs)

    def create_optimizer(self, model=None):
        """AdamW with two rates: the teacher's weights and SEA's."""
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[SEA_MARK in name, name in decayed].append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.args.sea_learning_rate if is_sea else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for (is_sea, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
            ],
            **options,
        )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of section 2.2; in evaluation the task's loss, and the rest goes into the metrics."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        with self.accelerator.autocast():  # the student's forward is wrapped by accelerate, the teacher's is not
            targets, expected = record_targets(self.teacher, inputs)
        evaluating = not model.training
        distillation = Distillation(targets, self._loss_rows(inputs), measure=evaluating)
        output = model(**inputs, distillation=distillation, output_hidden_states=True)
        terms = self._loss_terms(output, expected, inputs)
        loss = torch.stack(list(terms.values())).sum()
        if evaluating:
            fidelity = [layer for layer in output["fidelity"] if layer]
            for name in fidelity[0] if fidelity else ():
                self._terms[name].append(torch.stack([layer[name] for layer in fidelity]).mean())
            self._terms["distillation_loss"].append(loss.detach())
            targets = {name: inputs[name] for name in TARGETS if name in inputs}
            if targets:
                teacher_loss = sea_model(model).loss_of(expected, _sequence(inputs), **targets)
                self._terms["teacher_loss"].append(teacher_loss.detach())
            loss = output["loss"] if output.get("loss") is not None else loss
        else:
            for name, term in terms.items():
                self._terms[name].append(term.detach())
        return (loss, output) if return_outputs else loss

    def _loss_terms(self, output, expected, inputs) -> dict[str, torch.Tensor]:
        """The weighted terms; those of weight 0 are left out."""
        args, terms = self.args, {}
        mask = inputs.get("attention_mask")
        if args.task_weight and output.get("loss") is not None:
            terms["task_loss"] = args.task_weight * output["loss"]
        if args.hidden_weight:
            errors = [
                _masked_mean((ours.float() - theirs.float()).square().mean(dim=-1), mask)
                for ours, theirs in zip(output["hidden_states"], expected["hidden_states"])
            ]
            terms["hidden_loss"] = args.hidden_weight * torch.stack(errors).mean()
        if args.logits_weight:
            divergences = [
                prediction_divergence(output[name], expected[name], mask)
                for name in PREDICTIONS
                if output.get(name) is not None
            ]
            if divergences:
                terms["logits_loss"] = args.logits_weight * torch.stack(divergences).mean()
        layers = [torch.stack(list(losses.values())).sum() for losses in output["attention_losses"] if losses]
        if args.attention_weight and layers:
            terms["attention_loss"] = args.attention_weight * torch.stack(layers).mean()
        return terms

    def _loss_rows(self, inputs) -> torch.Tensor | None:
        """Rows for this step: the same on every device, in every accumulated batch, and after a resume."""
        count = self.args.attention_loss_rows
        tokens = _tokens(inputs)
        if count is None or count >= tokens.shape[1]:
            return None
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        return torch.randperm(tokens.shape[1], generator=generator)[:count].sort().values.to(tokens.device)

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

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in Trainer, but every batch has a loss, with labels or without."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        predictions = tuple(output[name].detach() for name in PREDICTIONS if output.get(name) is not None)
        labels = tuple(inputs[name] for name in self.label_names if inputs.get(name) is not None)
        return (
            loss.detach(),
            predictions[0] if len(predictions) == 1 else predictions or None,
            labels[0] if len(labels) == 1 else labels or None,
        )

    def _means(self) -> dict[str, float]:
        means = {name: float(torch.stack(values).float().mean()) for name, values in self._terms.items() if values}
        self._terms.clear()
        return means


def prediction_divergence(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """KL of a student's predictions to a teacher's: mean over samples (B, C), or over real tokens (B, T, C).

    Start and end scores (B, T) are distributions over the tokens, of which only real ones count. Large vocabularies go through
    by blocks of tokens, which the backward pass computes again: beside the predictions and their gradient no tensor of their
    size is made.
    """
    if ours.dim() == 2 and mask is not None and ours.shape == mask.shape:
        ours, theirs = (x.masked_fill(mask == 0, torch.finfo(x.dtype).min / 2) for x in (ours, theirs))
    rows = max(1, BLOCK_ELEMENTS // ours.shape[-1])
    blocks = zip(ours.flatten(0, -2).split(rows), theirs.flatten(0, -2).split(rows))
    divergence = torch.cat(
        [checkpoint(_divergence, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    )
    divergence = divergence.view(ours.shape[:-1])
    return _masked_mean(divergence, mask if divergence.dim() == 2 else None)


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL of each row, (R, C) -> (R,)."""
    log_ours, log_theirs = F.log_softmax(ours.float(), -1), F.log_softmax(theirs.float(), -1)
    return F.kl_div(log_ours, log_theirs, log_target=True, reduction="none").sum(-1)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of (B, T) over real tokens."""
    if mask is None:
        return values.mean()
    keep = mask.to(values.dtype)
    return (values * keep).sum() / keep.sum().clamp_min(1)


def _check_teacher(teacher: PreTrainedModel, student: SeaPreTrainedModel) -> None:
    if teacher is student.host_model:
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
    if isinstance(teacher, PreTrainedModel) and not isinstance(teacher, type(student.host_model)):
        raise ValueError(
            f"the teacher is a {type(teacher).__name__} and the student's host a {type(student.host_model).__name__}: distil "
            "from the model that `linearize` was given"
        )


def add_lora(student: SeaPreTrainedModel, rank: int = 16, alpha: int | None = None, target_modules=None):
    """Adapters of PEFT on the host, SEA trained in full, everything else frozen: a `PeftModel` for the trainer.

    `model.merge_and_unload()` afterwards gives the SEA model again, with what was learned.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'hf-linear-attn[peft]'") from error
    names = sorted({name.split(SEA_MARK)[0] + ".sea" for name, _ in student.named_parameters() if SEA_MARK in name})
    config = LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=target_modules, modules_to_save=names, fan_in_fan_out=False
    )
    return get_peft_model(student, config)


__all__ = [
    "FeatureRedraw",
    "SeaDistillationArguments",
    "SeaDistillationTrainer",
    "add_lora",
    "prediction_divergence",
    "record_targets",
    "sea_model",
]
