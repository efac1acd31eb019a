"""Distil a pretrained causal model into its Hedgehog student with Trainer, in stages.

    teacher = AutoModelForCausalLM.from_pretrained("path/or/hub-id")
    student = linearize(teacher, "hedgehog", window=64)
    args = HedgehogDistillationArguments("out", max_steps=1000)
    HedgehogDistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=...).train()

1. transfer: what Hedgehog adds learns each layer's attention output from the teacher's queries, keys and values: layers learn
   apart, in one forward pass of the teacher. 2. predictions: all weights learn the teacher's predicted words (KL). 3. long: the
   same on longer rows, with a smaller rate.

The stages are those of LoLCATs (arXiv 2410.10254, section 3: attention transfer, then training for predictions) and RADLADS
(arXiv 2505.03005, section 3: with KL to the teacher, all weights, and longer texts at the end).
"""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainingArguments

from ..modeling.hedgehog.mechanism import hedgehog_attention
from ..modeling.hedgehog.modeling_hedgehog import HedgehogForCausalLM
from ..modeling.hedgehog.softmax_layers import eager_attention
from ..modeling.shared.call import Call
from ..modeling.shared.causal_lm import next_token_labels
from ..modeling.shared.compat import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from ..modeling.shared.cross_entropy import IGNORED
from ..modeling.shared.sequence import SequenceInputs, prepare_sequence
from .checkpoints import CarriedOver
from .distillation import DistillationTrainer, check_teacher

HEDGEHOG_MARK = ".hedgehog."
RECORDING = "hf_linear_attn_recording"  # of the teacher's attention function, in Transformers' registry
TRANSFER, PREDICTIONS, LONG = STAGES = ("transfer", "predictions", "long")
WARM_UP, LAST_RATE = 0.05, 0.1  # share of a stage; share of its rate that is left at its end
BLOCK_ELEMENTS = {"cuda": 1 << 26}  # predictions that are compared together; elsewhere
SMALL_BLOCK_ELEMENTS = 1 << 24
TAKEN = {"input_ids", "attention_mask", "labels"}


@dataclass
class HedgehogDistillationArguments(TrainingArguments):
    """`TrainingArguments` with the stages. Within each stage its rate rises over 5% and falls by a cosine to a tenth.

    Args:
        transfer_share: share of the steps (or minutes) in which only what Hedgehog adds is trained, to the teacher's attention.
        long_share: share of them, at the end, on the rows of the data set as they are; what is left learns predictions.
        transfer_length, row_length (*optional*): tokens to which rows are cut in the first stage, and in the second. The rows of
            the data set must be multiples of them, without padding. As they are if not given.
        transfer_learning_rate: rate of what Hedgehog adds, in the first stage.
        feature_learning_rate: and in the second. learning_rate: of all weights that come from the teacher, there.
        long_learning_rate: of these in the last stage, in which that of what Hedgehog adds is as much smaller.
        logits_weight, task_weight: weight of the KL to the teacher's predictions, and of the text's own cross-entropy.
        minutes (*optional*): the most minutes of training, which the stages share as they share the steps.
        train_host: whether the teacher's weights are trained along; with False only what Hedgehog adds is (and adapters, if any).
        compile_parts: run `torch.compile` over the bodies, the layers' errors and the comparison of predictions.
    """

    learning_rate: float = field(default=1e-4)
    transfer_learning_rate: float = field(default=1e-2)
    feature_learning_rate: float = field(default=1e-3)
    long_learning_rate: float = field(default=3e-5)
    transfer_share: float = field(default=0.3)
    long_share: float = field(default=0.0)
    transfer_length: int | None = field(default=None)
    row_length: int | None = field(default=None)
    logits_weight: float = field(default=1.0)
    task_weight: float = field(default=0.0)
    minutes: float | None = field(default=None)
    train_host: bool = field(default=True)
    compile_parts: bool = field(default=False)

    def __post_init__(self):
        super().__post_init__()
        for name in ("transfer_learning_rate", "feature_learning_rate", "learning_rate", "long_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("transfer_share", "long_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.transfer_share + self.long_share > 1:
            raise ValueError(
                f"transfer_share {self.transfer_share} and long_share {self.long_share} are together more than 1"
            )
        for name in ("logits_weight", "task_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.transfer_share < 1 and not (self.logits_weight or self.task_weight):
            raise ValueError(
                "logits_weight and task_weight are both 0: behind the first stage there is nothing to learn"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be greater than 0, got {self.minutes}")

    def shares(self) -> dict[str, float]:
        """The stages that the run has, in order, with their shares."""
        rest = round(1 - self.transfer_share - self.long_share, 9)
        found = {TRANSFER: self.transfer_share, PREDICTIONS: rest, LONG: self.long_share}
        return {name: share for name, share in found.items() if share > 0}

    def length_of(self, stage: str) -> int | None:
        """Tokens to which the rows are cut in a stage; None: as they are."""
        return {TRANSFER: self.transfer_length, PREDICTIONS: self.row_length, LONG: None}[stage]


class Stages(CarriedOver):
    """In which stage the run is, and how far in it: by steps, and by minutes where these are limited. Kept in checkpoints."""

    def __init__(self, trainer: "HedgehogDistillationTrainer | None" = None):
        # None: made by Trainer itself from a checkpoint
        self.trainer: Any = trainer
        self.stage = 0
        self.first_step, self.first_second = 0, 0.0  # of the stage
        self.seconds = 0.0  # of earlier sessions
        self.layers: dict[str, Any] = {}  # the layers' errors, at the end of the first stage
        self.softmax_choice: dict[str, Any] | None = None
        self._started: float | None = None

    def values(self) -> dict[str, Any]:
        """All that a resumed run goes on from."""
        names = ("stage", "first_step", "first_second", "layers", "softmax_choice")
        return {name: getattr(self, name) for name in names} | {"seconds": self.now()}

    def now(self) -> float:
        """Seconds of training so far."""
        return self.seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    @property
    def name(self) -> str:
        """The stage that the run is in."""
        return self.place(self.trainer.state.global_step)[0]

    def place(self, step: int) -> tuple[str, float]:
        """The stage that step `step` belongs to, as things stand, and how much of it is over: from 0 to 1."""
        args = self.trainer.args
        names = list(args.shares())
        stage = min(self.stage, len(names) - 1)
        done = self._done(step)
        if done >= 1 and stage + 1 < len(names):
            return names[stage + 1], 0.0
        return names[stage], min(1.0, done)

    def _done(self, step: int) -> float:
        args = self.trainer.args
        names, shares = list(args.shares()), list(args.shares().values())
        stage = min(self.stage, len(names) - 1)
        steps = max(1, round(sum(shares[: stage + 1]) * self.trainer.steps()) - self.first_step)
        done = (step - self.first_step) / steps
        if args.minutes is not None:
            seconds = max(1e-3, sum(shares[: stage + 1]) * args.minutes * 60 - self.first_second)
            done = max(done, (self.now() - self.first_second) / seconds)
        return done

    def on_train_begin(self, args, state, control, **kwargs):
        """Take over the place of the interrupted run, and start the clock."""
        super().on_train_begin(args, state, control, **kwargs)
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Open the next stage when this one is over; behind the last one, end the run."""
        if self._done(state.global_step) < 1:
            return
        names = list(args.shares())
        ended = names[min(self.stage, len(names) - 1)]
        if ended == TRANSFER and not self.layers:
            self.layers = self.trainer.layer_errors()
            print(f"end of the attention transfer, step {state.global_step}\n{layer_table(self.layers)}", flush=True)
        if self.stage + 1 < len(names):
            self.stage += 1
            self.first_step, self.first_second = state.global_step, self.now()
        elif args.minutes is not None:
            control.should_save = control.should_training_stop = True

    def rate(self, step: int, of_host: bool) -> float:
        """What a learning rate of the optimizer is multiplied with at a step."""
        args = self.trainer.args
        stage, done = self.place(step)
        shape = (
            (done + 1e-3) / (WARM_UP + 1e-3)
            if done < WARM_UP
            else LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
        )
        if stage == TRANSFER:
            return 0.0 if of_host else shape
        shape *= args.long_learning_rate / args.learning_rate if stage == LONG else 1.0
        return shape if of_host else shape * args.feature_learning_rate / args.transfer_learning_rate


class HedgehogDistillationTrainer(DistillationTrainer):
    """A Trainer that teaches a Hedgehog model its teacher's attention, then its predictions. On one device.

    In evaluation the loss is the text's own cross-entropy (so that it compares with any other model's), and the metrics add
    `teacher_loss` and `logits_kl`.

    Args:
        model: a `HedgehogForCausalLM` from `linearize`, with or without PEFT adapters.
        teacher: the pretrained model; frozen here. It must be another object than the student's host.
        args: `HedgehogDistillationArguments`.
        **kwargs: as for `Trainer`. Rows hold `input_ids`, `labels` and, if they are padded, `attention_mask`.

    Raises:
        ValueError: a model that is no Hedgehog language model, a teacher of another shape, several devices.
    """

    args: HedgehogDistillationArguments
    mark = HEDGEHOG_MARK
    lr_scheduler: Any

    def __init__(self, model: nn.Module, teacher: PreTrainedModel, args: HedgehogDistillationArguments, **kwargs):
        student = hedgehog_model(model)
        check_teacher(getattr(teacher, "base_model", teacher), student, student.model.host)
        if teacher.get_output_embeddings() is None:
            raise ValueError(f"the teacher is a {type(teacher).__name__}, expected a causal language model")
        if not isinstance(args, HedgehogDistillationArguments):
            raise ValueError("`args` must be HedgehogDistillationArguments, which hold the stages")
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"Hedgehog is distilled on one device, and here are {max(args.world_size, args.n_gpu)}: start one process and "
                "show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        super().__init__(model, teacher, args, **kwargs)
        self.stages = Stages(self)
        self.add_callback(self.stages)
        learned = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._added = [p for name, p in learned if self.mark in name]
        self._of_host = [p for name, p in learned if self.mark not in name]
        self._parts = {
            "student": student.model,
            "teacher": self.teacher.base_model,
            "error": layer_error,
            "block": block_losses,
        }
        if args.compile_parts:
            self._parts = {name: torch.compile(part, dynamic=False) for name, part in self._parts.items()}

    def student_in(self, model: nn.Module) -> HedgehogForCausalLM:
        """The Hedgehog model inside wrappers."""
        return hedgehog_model(model)

    def added_rate(self) -> float:
        """That of the first stage."""
        return self.args.transfer_learning_rate

    def steps(self) -> int:
        """Steps of the whole run."""
        return self.args.max_steps if self.args.max_steps > 0 else self.state.max_steps

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The stages' rates."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            added = {id(p) for p in self._added}
            of_host = [id(group["params"][0]) not in added for group in optimizer.param_groups]
            rates: list[Callable[[int], float]] = [partial(self.stages.rate, of_host=host) for host in of_host]
            self.lr_scheduler = LambdaLR(optimizer, rates)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the stage; in evaluation the text's own, and the rest goes into the metrics."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        unknown = sorted(set(inputs) - TAKEN)
        if unknown or "input_ids" not in inputs:
            raise ValueError(f"rows have {sorted(inputs)}, expected `input_ids`, `labels` and at most `attention_mask`")
        evaluating = not model.training
        with self.accelerator.autocast():
            if evaluating:
                terms = self._prediction_terms(model, inputs)
                self._terms["teacher_loss"].append(terms["teacher_loss"].detach())
                self._terms["logits_kl"].append(terms["logits_kl"].detach())
                loss = terms["task_loss"]
                return (loss, {}) if return_outputs else loss
            stage = self.stages.name
            self._open(stage)
            inputs = cut_rows(inputs, self.args.length_of(stage))
            if stage == TRANSFER:
                errors = self._transfer_errors(model, inputs)
                loss = torch.stack(list(errors.values())).mean()
                self._terms["attention_error"].append(loss.detach())
            else:
                terms = self._prediction_terms(model, inputs)
                weights = {"logits_kl": self.args.logits_weight, "task_loss": self.args.task_weight}
                loss = torch.stack([weight * terms[name] for name, weight in weights.items() if weight]).sum()
                for name in weights:
                    self._terms[name].append(terms[name].detach())
        return (loss, {}) if return_outputs else loss

    def _open(self, stage: str) -> None:
        """Let the weights of a stage have gradients, and no others."""
        for parameter in self._of_host:
            parameter.requires_grad_(stage != TRANSFER)

    def _transfer_errors(self, model, inputs, record=None) -> dict[int, torch.Tensor]:
        """By layer: the error of its attention on the teacher's queries, keys and values, relative to the teacher's output."""
        cores = self.student_in(model).hedgehog_layers()
        call = _call(inputs)
        errors: dict[int, torch.Tensor] = {}
        learns = torch.is_grad_enabled()

        def keep(layer, query, key, value, scaling, softcap, output):
            if record is not None:
                record[layer] = output
            if layer not in cores:
                return
            core = cores[layer]
            with torch.set_grad_enabled(learns):
                given = query, key, value, output, core.query_map, core.key_map, core.window_gain, core.log_decay(value)
                options = {"window": core.window, "scale": scaling, "softcap": softcap, "mask": call.mask}
                options["chunk_size"] = core.chunk_size
                if (
                    learns
                ):  # computed again in the backward pass: of each layer only queries, keys, values and output are kept
                    again = {"use_reentrant": False, "preserve_rng_state": False}
                    errors[layer] = checkpoint(self._parts["error"], *given, **again, **options)
                else:
                    errors[layer] = layer_error(*given, **options)

        with torch.no_grad(), recording(self.teacher):
            self.teacher.base_model(**_inputs_of_body(inputs, call), hf_linear_attn_record=keep)
        return errors

    def _prediction_terms(self, model, inputs) -> dict[str, torch.Tensor]:
        """KL to the teacher's predictions over real tokens, and the cross-entropy of student and teacher."""
        student, call = self.student_in(model), _call(inputs)
        parts = self._parts if model.training else {"student": student.model, "teacher": self.teacher.base_model}
        with torch.no_grad():
            theirs = parts["teacher"](**_inputs_of_body(inputs, call)).last_hidden_state
        ours = parts["student"](**_inputs_of_student(inputs)).last_hidden_state
        labels = inputs.get("labels")
        labels = torch.full_like(inputs["input_ids"], IGNORED) if labels is None else next_token_labels(labels, call)
        heads = student.get_output_embeddings(), self.teacher.get_output_embeddings()
        block = self._parts["block"] if model.training else block_losses
        sums = compare_predictions(ours, theirs, *heads, labels, call.mask, block)
        real = ours[..., 0].numel() if call.mask is None else call.mask.sum()
        targets = (labels != IGNORED).sum().clamp(min=1)
        return {"logits_kl": sums[0] / real, "task_loss": sums[1] / targets, "teacher_loss": sums[2] / targets}

    @torch.no_grad()
    def layer_errors(self) -> dict[str, Any]:
        """By linear layer: how far its attention output is from the teacher's on the evaluation rows, as a share of that.

        Returns:
            `{"layers": [...], "alone": [...], "in_place": [...]}`: squared error over squares, of the layer's attention given the
            teacher's queries, keys and values, and within the student, on whose own inputs it works there.
        """
        model, rows = self.model, self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        student, size = self.student_in(model), self.args.per_device_eval_batch_size
        cores, training = student.hedgehog_layers(), model.training
        sums = {layer: [0.0, 0.0] for layer in cores}
        batches = 0
        model.eval()
        try:
            for start in range(0, len(rows), size):
                batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
                inputs = {name: value.to(self.args.device) for name, value in batch.items() if name in TAKEN}
                with self.accelerator.autocast():
                    alone, in_place = self._errors_of(model, student, cores, inputs)
                for layer in cores:
                    sums[layer][0] += alone[layer].item()
                    sums[layer][1] += in_place[layer].item()
                batches += 1
        finally:
            model.train(training)
        return {
            "layers": sorted(cores),
            "alone": [sums[layer][0] / batches for layer in sorted(cores)],
            "in_place": [sums[layer][1] / batches for layer in sorted(cores)],
        }

    def _errors_of(self, model, student, cores, inputs):
        """Both errors of each layer on one batch."""
        targets: dict[int, torch.Tensor] = {}
        alone, in_place, call = self._transfer_errors(model, inputs, targets), {}, _call(inputs)

        def compare(core, given, output):
            in_place[core.layer_idx] = relative_error(output[0], targets[core.layer_idx], call.mask)

        hooks = [core.register_forward_hook(compare) for core in cores.values()]
        try:
            student.model(**_inputs_of_student(inputs))
        finally:
            for hook in hooks:
                hook.remove()
        return alone, in_place

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: predictions over a vocabulary are never all there."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


def layer_table(found: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The errors of `layer_errors` as text, behind those of another time if these are given."""
    columns = [] if before is None else [("before", before["alone"])]
    columns += [("alone", found["alone"]), ("in place", found["in_place"])]
    lines = [
        "attention error, relative to the teacher's output",
        "layer" + "".join(f"{name:>10}" for name, _ in columns),
    ]
    for row, layer in enumerate(found["layers"]):
        lines.append(f"{layer:>5}" + "".join(f"{values[row]:>10.4f}" for _, values in columns))
    means = "".join(f"{sum(values) / len(values):>10.4f}" for _, values in columns)
    return "\n".join([*lines, f" mean{means}"])


def hedgehog_model(model: nn.Module) -> HedgehogForCausalLM:
    """The Hedgehog language model inside wrappers (PEFT)."""
    for module in model.modules():
        if isinstance(module, HedgehogForCausalLM):
            return module
    raise ValueError(
        f'{type(model).__name__} holds no Hedgehog language model: make one with `linearize(model, "hedgehog")`'
    )


def cut_rows(inputs: dict[str, torch.Tensor], length: int | None) -> dict[str, torch.Tensor]:
    """Rows (B, T) as more rows of `length` tokens.

    Raises:
        ValueError: rows that are no multiple of it, or padded.
    """
    if length is None or inputs["input_ids"].shape[1] == length:
        return inputs
    if inputs["input_ids"].shape[1] % length or "attention_mask" in inputs:
        raise ValueError(
            f"rows of {inputs['input_ids'].shape[1]} tokens cannot be cut into rows of {length}: make them a multiple of it, "
            "without padding"
        )
    return {name: value.reshape(-1, length) for name, value in inputs.items()}


def _call(inputs) -> Call:
    sequence: SequenceInputs = prepare_sequence(inputs["input_ids"][..., None], inputs.get("attention_mask"))
    return Call(sequence.mask, sequence.position_ids, sequence.segment_ids)


def _inputs_of_student(inputs) -> dict[str, Any]:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    return given | {"use_cache": False, "return_dict": True}


def _inputs_of_body(inputs, call: Call) -> dict[str, Any]:
    """What the teacher's body takes: it counts padding in its positions unless it is given these."""
    given = _inputs_of_student(inputs)
    return given if call.mask is None else given | {"position_ids": (call.mask.cumsum(-1) - 1).clamp(min=0)}


def layer_error(query, key, value, output, query_map, key_map, gain, log_decay, mask, **options) -> torch.Tensor:
    """Error of a layer on the teacher's (B, T, H, D) queries, keys and values, relative to the teacher's output.

    A function of tensors, so that one compiled program serves all layers.
    """
    ours, _ = hedgehog_attention(query, key, value, query_map, key_map, gain, log_decay=log_decay, mask=mask, **options)
    return relative_error(ours, output, mask)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sum of squared differences over the sum of squares of `theirs`, of real tokens: a scalar in float32 at least."""
    wide = torch.promote_types(ours.dtype, torch.float32)
    ours, theirs = ours.to(wide), theirs.to(wide)
    if mask is not None:
        ours, theirs = (x.masked_fill(~mask[..., None, None], 0.0) for x in (ours, theirs))
    return (ours - theirs).square().sum() / theirs.square().sum().clamp_min(torch.finfo(wide).tiny)


def compare_predictions(ours, theirs, our_head, their_head, labels, mask=None, block=None) -> torch.Tensor:
    """Sums (3,) of KL(teacher || student) over real tokens and of both cross-entropies over labels that are not -100.

    From the last hidden states (B, T, d) and the output matrices, by blocks of tokens which the backward pass computes again: no
    tensor as large as the predictions is ever made. labels: (B, T), shifted.
    """
    elements = BLOCK_ELEMENTS.get(ours.device.type, SMALL_BLOCK_ELEMENTS)
    rows = max(1, elements // our_head.weight.shape[0])
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    parts = (ours.flatten(0, 1), theirs.flatten(0, 1), labels.flatten(), real.flatten())
    sums = [
        checkpoint(block or block_losses, our_head, their_head, *each, use_reentrant=False, preserve_rng_state=False)
        for each in zip(*(part.split(rows) for part in parts), strict=True)
    ]
    return torch.stack(sums).sum(0)


def block_losses(our_head, their_head, ours, theirs, labels, real) -> torch.Tensor:
    """The sums of `compare_predictions` over some tokens (R, d)."""
    wide = torch.promote_types(ours.dtype, torch.float32)
    log_ours = our_head(ours).to(wide).log_softmax(-1)
    with torch.no_grad():
        log_theirs = their_head(theirs).to(wide).log_softmax(-1)
    divergence = F.kl_div(log_ours, log_theirs, log_target=True, reduction="none").sum(-1)
    entropies = [F.nll_loss(x, labels, ignore_index=IGNORED, reduction="sum") for x in (log_ours, log_theirs)]
    return torch.stack((divergence.masked_fill(~real, 0.0).sum(), *entropies))


def recording_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, hf_linear_attn_record=None, **kwargs
):
    """The teacher's softmax attention (B, H, T, D) -> (B, T, H, D), whose inputs and output are handed to a function."""
    softcap = kwargs.get("softcap")
    attend = eager_attention if softcap is not None else ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, _ = attend(module, query, key, value, attention_mask, scaling=scaling, dropout=0.0, softcap=softcap)
    heads = (x.transpose(1, 2) for x in (query, key, value))
    hf_linear_attn_record(module.layer_idx, *heads, scaling, softcap, output)
    return output, None


@contextmanager
def recording(teacher: PreTrainedModel):
    """While the context is open the teacher's attention is `recording_attention`."""
    ALL_ATTENTION_FUNCTIONS.register(RECORDING, recording_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(RECORDING, sdpa_mask)
    config = teacher.config
    before = config._attn_implementation
    config._attn_implementation = RECORDING
    try:
        yield
    finally:
        config._attn_implementation = before


__all__ = [
    "HedgehogDistillationArguments",
    "HedgehogDistillationTrainer",
    "compare_predictions",
    "cut_rows",
    "hedgehog_model",
    "layer_error",
    "relative_error",
]
