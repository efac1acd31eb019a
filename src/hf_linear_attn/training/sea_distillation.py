"""Distil a pretrained teacher into its SEA student with Trainer.

    teacher = AutoModelForCausalLM.from_pretrained("path/or/hub-id")
    student = linearize(teacher, "sea", k=64, predictor_length=128)
    args = SeaDistillationArguments("out", max_steps=1000)
    SeaDistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=...).train()

The teacher runs frozen, a batch at a time; of each of its layers only queries, keys and context are kept, and every
T x T comparison is made by blocks of rows in the student's layer, so memory stays linear in the length.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..modeling.sea.host_attention import ATTENTION_NAME, Distillation, LayerResults, register_attention, sea_call
from ..modeling.sea.hosts import HOSTS
from ..modeling.sea.losses import TeacherTargets
from ..modeling.sea.modeling_sea import SeaPreTrainedModel
from ..modeling.sea.pretrained import PACKING_KEYWORDS
from ..modeling.shared.sequence import SequenceInputs, prepare_sequence
from .distillation import DistillationTrainer, add_lora, check_teacher, divergence_of_rows, masked_mean

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


class SeaDistillationTrainer(DistillationTrainer):
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
    mark = SEA_MARK

    def __init__(self, model: nn.Module, teacher: PreTrainedModel, args: SeaDistillationArguments, **kwargs):
        student = sea_model(model)
        check_teacher(teacher, student, student.host_model)
        if not isinstance(args, SeaDistillationArguments):
            raise ValueError("`args` must be SeaDistillationArguments, which hold the weights of the losses")
        super().__init__(model, teacher, args, **kwargs)
        self.add_callback(FeatureRedraw(student.config.feature_redraw_interval))

    def student_in(self, model: nn.Module) -> SeaPreTrainedModel:
        """The SEA model inside wrappers."""
        return sea_model(model)

    def added_rate(self) -> float:
        """That of the arguments."""
        return self.args.sea_learning_rate

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
                masked_mean((ours.float() - theirs.float()).square().mean(dim=-1), mask)
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
        [checkpoint(divergence_of_rows, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    )
    divergence = divergence.view(ours.shape[:-1])
    return masked_mean(divergence, mask if divergence.dim() == 2 else None)


__all__ = [
    "FeatureRedraw",
    "SeaDistillationArguments",
    "SeaDistillationTrainer",
    "add_lora",
    "prediction_divergence",
    "record_targets",
    "sea_model",
]
