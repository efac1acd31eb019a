"""How a reproduction trains: Transformers' Trainer over a stream of batches whose order depends on the seed alone.

All models of a seed see the same tokens in the same order, and the rate may follow the clock, where time is the budget. Needs
PyTorch and Transformers, and no `datasets`.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_linear_attn.training.tokenized_text import TokenBlocks, TokenizedText

EVALUATION_BATCHES = 4  # of training, taken at once where no gradient is kept
Batch = dict[str, Any]


@dataclass(frozen=True)
class Hyperparameters:
    """How to train: AdamW, then a rate that falls to 0 after the warm-up (a share of the steps). clip: None for no clipping.

    precision: autocast of the forward pass, bfloat16 or float32. seconds: where given, the schedule runs over that time or over
    `max_steps`, whichever ends first.
    """

    length: int = 2048
    batch_size: int = 2
    epochs: int = 8
    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.01
    clip: float | None = 1.0
    precision: str = "bfloat16"
    compile: bool = False  # the training steps; evaluation, whose batches differ in size, stays eager
    max_steps: int | None = None  # a shorter run, for trying things out
    evaluations: int | None = None  # points of the curve, at equal distances; one an epoch if not given
    dropout: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    seconds: float | None = None

    def rate(self, progress: float) -> float:
        """Share of the learning rate at a share of the way."""
        if progress < self.warmup:
            return progress / self.warmup
        rest = max(0.0, (1 - progress) / (1 - self.warmup))
        return {"linear": rest, "cosine": 0.5 * (1 - math.cos(math.pi * rest))}[self.schedule]


def training_arguments(batch_size: int, eval_batch_size: int, warmup_steps: int, seed: int, **more: Any) -> dict:
    """Keywords of `TrainingArguments`: a rate that falls linearly to 0, bfloat16 where there is a GPU, nothing saved."""
    cuda = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": eval_batch_size,
        "lr_scheduler_type": "linear",
        "warmup_steps": warmup_steps,
        "bf16": cuda,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        **more,
    }


def train_timed(trainer: Trainer) -> float:
    """Train; the seconds that it took."""
    started = time.perf_counter()
    trainer.train()
    return round(time.perf_counter() - started, 1)


def default_device(asked: str | None) -> str:
    """The device asked for, else a GPU where there is one."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


class Stream(IterableDataset):
    """Batches without end."""

    def __init__(self, batches: Iterator[Batch]):
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self.batches


class StreamTrainer(Trainer):
    """Trainer over batches that are made already; keeps the losses of its steps."""

    losses: list[torch.Tensor]

    def get_train_dataloader(self) -> DataLoader:
        """The stream as it is."""
        return DataLoader(self.train_dataset, batch_size=None)

    def training_step(self, *given, **named) -> torch.Tensor:
        """As ever."""
        self.losses.append(loss := super().training_step(*given, **named))
        return loss


class Pace(TrainerCallback):
    """The clock without evaluations, where on its way a run is, and its curve."""

    def __init__(self, plan: Hyperparameters, steps: int, evaluate: Callable[[], dict], on_evaluation):
        self.plan, self.steps, self.evaluate, self.on_evaluation = plan, steps, evaluate, on_evaluation
        self.points = plan.evaluations or 10
        self.curve: list[dict[str, Any]] = []
        self.started, self.evaluating = 0.0, 0.0
        self.trainer: Any = None

    def seconds(self) -> float:
        """Of training so far."""
        return time.perf_counter() - self.started - self.evaluating if self.started else 0.0

    def progress(self, step: int) -> float:
        """Share of the steps, or of the time, that is over."""
        return max(step / self.steps, self.seconds() / self.plan.seconds if self.plan.seconds else 0.0)

    def on_train_begin(self, *given, **named) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **named) -> None:
        """Evaluate where a point of the curve is due, and stop at the end of the way."""
        progress = self.progress(state.global_step)
        if progress < min(1.0, (len(self.curve) + 1) / self.points):
            return
        training = torch.stack(self.trainer.losses).mean().item()  # waits for the device, so the clock is right
        seconds, before = self.seconds(), time.perf_counter()
        self.trainer.losses.clear()
        found = {"step": state.global_step, "training": training, **self.evaluate(), "seconds": round(seconds, 2)}
        self.curve.append(found)
        print(
            f"step {state.global_step}/{self.steps}: training {training:.4f}, validation {found['validation']:.4f}",
            flush=True,
        )
        if self.on_evaluation is not None:
            self.on_evaluation()
        self.trainer.model.train()
        self.evaluating += time.perf_counter() - before
        control.should_training_stop = control.should_training_stop or progress >= 1


def fit(
    model: torch.nn.Module, batches: Iterator[Batch], plan: Hyperparameters, steps: int, seed: int, device: str,
    evaluate: Callable[[], dict[str, float]], on_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train on the stream; returns the curve, steps, seconds of training and peak memory.

    evaluate: what a point of the curve holds besides, "validation" among it; `on_evaluation` is called after each point.
    """
    cuda = device != "cpu"
    pace = Pace(plan, steps, evaluate, on_evaluation)
    groups = [[p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
    decay = zip(groups, (plan.weight_decay, 0.0), strict=True)  # biases and norms, which are vectors, do not decay
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": weight_decay} for params, weight_decay in decay],
        lr=plan.learning_rate, betas=(plan.beta1, plan.beta2), eps=plan.epsilon, fused=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            **training_arguments(
                plan.batch_size, plan.batch_size, 0, seed, output_dir=folder, max_steps=steps, use_cpu=not cuda,
                bf16=plan.precision == "bfloat16", max_grad_norm=plan.clip or 0.0, logging_strategy="no",
            )
        )  # fmt: skip
        arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs take a run each
        whole = replace(plan, warmup=int(plan.warmup * steps) / steps)  # of steps, as Transformers' schedules have it
        scheduler = LambdaLR(optimizer, lambda step: whole.rate(pace.progress(step)))
        trainer = StreamTrainer(
            model, arguments, train_dataset=Stream(batches), optimizers=(optimizer, scheduler), callbacks=[pace]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.losses, pace.trainer = [], trainer
        trainer.model_accepts_loss_kwargs = False  # a step's loss is the mean of its batch
        if plan.compile:
            model.compile()
        trainer.train()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return {
        "curve": pace.curve,
        "steps": trainer.state.global_step,
        "training_seconds": round(pace.seconds(), 2),
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }


def autocast(plan: Hyperparameters, device: str) -> torch.autocast:
    """Of a forward pass."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=plan.precision == "bfloat16")


def train(
    model: torch.nn.Module, text: TokenizedText, plan: Hyperparameters, seed: int, device: str,
    on_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a language model and evaluate; returns losses, perplexities, bits per byte, curve, seconds and tokens per second."""
    blocks = {split: _on_device(text, split, plan.length, device) for split in ("train", "validation", "test")}
    steps_per_epoch = len(blocks["train"]) // plan.batch_size
    steps = min(steps_per_epoch * plan.epochs, plan.max_steps or 10**9)
    points = plan.evaluations or math.ceil(steps / steps_per_epoch)
    model = model.to(device)
    found = fit(
        model, _batches(blocks["train"], plan.batch_size, seed), replace(plan, evaluations=points), steps, seed, device,
        lambda: {"validation": mean_loss(model, blocks["validation"], plan)}, on_evaluation,
    )  # fmt: skip
    losses = {"validation": found["curve"][-1]["validation"], "test": mean_loss(model, blocks["test"], plan)}
    rate = found["steps"] * plan.batch_size * plan.length / found["training_seconds"]
    return {
        **{split: _metrics(loss, text, split) for split, loss in losses.items()},
        **found,
        "tokens_per_second": rate,
    }


def _batches(blocks: torch.Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Blocks of each step without end: every epoch in a new order, and the order a matter of the seed alone."""
    order = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(blocks), generator=order)[: len(blocks) // size * size].split(size):
            ids = blocks[rows.to(blocks.device)]
            yield {"input_ids": ids, "labels": ids, "use_cache": False}


@torch.no_grad()
def mean_loss(model, blocks: torch.Tensor, plan: Hyperparameters) -> float:
    """Mean loss in nats per token over all blocks."""
    model.eval()
    total = torch.zeros((), device=blocks.device)
    for ids in blocks.split(EVALUATION_BATCHES * plan.batch_size):
        with autocast(plan, blocks.device.type):
            # `forward`, since a compiled call would be compiled again for these batches.
            total += model.forward(input_ids=ids, labels=ids, use_cache=False).loss.float() * len(ids)
    return (total / len(blocks)).item()


def _on_device(text: TokenizedText, split: str, length: int, device: str) -> torch.Tensor:
    blocks = TokenBlocks(text.ids[split], length, name=split).blocks
    return torch.from_numpy(blocks.astype("int64")).to(device)


def _metrics(loss: float, text: TokenizedText, split: str) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": text.bits_per_byte(split, loss)}
