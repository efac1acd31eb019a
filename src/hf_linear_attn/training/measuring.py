"""Perplexity, tokens per second and peak memory of a training run."""

import math
import sys
import time
from typing import Any

import torch

from .checkpoints import CarriedOver


def peak_memory_mb() -> float:
    """Largest memory so far in MiB: allocated on the CUDA device where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it: a model that diverged is measured like any other."""
    return math.exp(loss) if not loss > 709 else math.inf


class Throughput(CarriedOver):
    """Adds up the time of the optimizer steps: no evaluation, no saving, and not the first step, which warms up."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.seconds = 0.0
        self.steps = 0
        self._first = True
        self._start = 0.0

    def values(self) -> dict[str, Any]:
        """What is measured so far."""
        return {"seconds": self.seconds, "steps": self.steps}

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock; before a pause in the stream of steps, wait until the device has done what was asked."""
        pause = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if pause and torch.cuda.is_available():
            torch.cuda.synchronize()
        if not self._first:
            self.seconds += time.perf_counter() - self._start
            self.steps += 1
        self._first = False

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the measured steps; None before the second step."""
        return self.steps * self.tokens_per_step / self.seconds if self.steps else None
