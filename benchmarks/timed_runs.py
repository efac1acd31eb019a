"""What the benchmarks of SEA share: the arguments of a run that nothing but its steps should slow down, and its clock."""

import time
from typing import Any

import torch
from transformers import Trainer


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
