"""A training loop in sixty lines, for machines with PyTorch and Transformers alone: token ids from one .npz file, no `datasets`.

The optimisation is that of Transformers' Trainer (AdamW without decay on biases and norms, warm-up and decay of the rate,
clipping), and the order of the batches depends on the seed alone, so all models of a seed see the same.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from hf_linear_attn.training.tokenized_text import TokenBlocks, TokenizedText

EVALUATION_BATCHES = 4  # of training, taken at once where no gradient is kept


@dataclass(frozen=True)
class Recipe:
    """How to train. precision: autocast of the forward pass, bfloat16 or float32. warmup: share of the steps."""

    length: int = 2048
    batch_size: int = 2
    epochs: int = 8
    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "bfloat16"
    compile: bool = False  # the training steps; evaluation, whose batches differ in size, stays eager
    max_steps: int | None = None  # a shorter run, for trying things out
    evaluations: int | None = None  # points of the curve, at equal distances; one an epoch if not given


def train(
    model: torch.nn.Module,
    text: TokenizedText,
    recipe: Recipe,
    seed: int,
    device: str,
    on_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train and evaluate; returns losses, perplexities, bits per byte, the curve, seconds and tokens per second.

    `on_evaluation` is called after each point of the curve, to save the model as it is.
    """
    blocks = {split: _on_device(text, split, recipe.length, device) for split in ("train", "validation", "test")}
    model = model.to(device)
    run = torch.compile(model) if recipe.compile else model
    optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.learning_rate, fused=True)
    steps_per_epoch = len(blocks["train"]) // recipe.batch_size
    steps = min(steps_per_epoch * recipe.epochs, recipe.max_steps or 10**9)
    every = steps / recipe.evaluations if recipe.evaluations else steps_per_epoch
    stops = {min(steps, math.ceil(every * (i + 1))) for i in range(math.ceil(steps / every))}
    scheduler = get_scheduler(recipe.schedule, optimizer, int(recipe.warmup * steps), steps)
    curve, losses, seconds = [], [], 0.0
    model.train()
    started = time.perf_counter()
    for step, rows in enumerate(_batches(len(blocks["train"]), recipe, steps, seed), start=1):
        ids = blocks["train"][rows.to(device)]
        with _autocast(recipe, device):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step not in stops:
            continue
        training_loss = torch.stack(losses).mean().item()  # waits for the device, so the clock is right
        seconds += time.perf_counter() - started
        losses.clear()
        validation_loss = mean_loss(model, blocks["validation"], recipe)
        curve.append({"step": step, "training": training_loss, "validation": validation_loss, "seconds": seconds})
        print(f"step {step}/{steps}: training {training_loss:.4f}, validation {validation_loss:.4f}", flush=True)
        if on_evaluation is not None:
            on_evaluation()
        model.train()
        started = time.perf_counter()
    return {
        "validation": _metrics(curve[-1]["validation"], text, "validation"),
        "test": _metrics(mean_loss(model, blocks["test"], recipe), text, "test"),
        "curve": curve,
        "steps": steps,
        "training_seconds": seconds,
        "tokens_per_second": steps * recipe.batch_size * recipe.length / seconds,
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else None,
    }


def _batches(rows: int, recipe: Recipe, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Row numbers of each step's blocks: every epoch in a new order, and the order a matter of the seed alone."""
    order = torch.Generator().manual_seed(seed)
    whole = rows // recipe.batch_size * recipe.batch_size
    done = 0
    while done < steps:
        for batch in torch.randperm(rows, generator=order)[:whole].split(recipe.batch_size)[: steps - done]:
            yield batch
            done += 1


@torch.no_grad()
def mean_loss(model, blocks: torch.Tensor, recipe: Recipe) -> float:
    """Mean loss in nats per token over all blocks."""
    model.eval()
    total = torch.zeros((), device=blocks.device)
    for ids in blocks.split(EVALUATION_BATCHES * recipe.batch_size):
        with _autocast(recipe, blocks.device.type):
            total += model(input_ids=ids, labels=ids, use_cache=False).loss.float() * len(ids)
    return (total / len(blocks)).item()


def _on_device(text: TokenizedText, split: str, length: int, device: str) -> torch.Tensor:
    blocks = TokenBlocks(text.ids[split], length, name=split).blocks
    return torch.from_numpy(blocks.astype("int64")).to(device)


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms, which are vectors, do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _autocast(recipe: Recipe, device: str):
    kind = device.split(":")[0]
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16")


def _metrics(loss: float, text: TokenizedText, split: str) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": text.bits_per_byte(split, loss)}
