"""How far a command has come: a bar on a terminal; in a log a line of its own, at most one in ten seconds."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

SECONDS = 10.0  # between two lines of a log


def followed(items: Sequence[Any], what: str) -> Iterator[Any]:
    """The items one by one, with a bar or with lines on stderr; `what` is done with them."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, leave=False)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > SECONDS:
            print(f"{what}: {done} of {len(items)}", file=sys.stderr, flush=True)
            last = time.monotonic()


class TrainingProgress(TrainerCallback):
    """Losses as lines on stdout, and a bar over the steps on stderr where that is a terminal. In a log a line comes at most every
    ten seconds; validation losses always.
    """

    def __init__(self, show_bar: bool = True):
        self.show_bar = show_bar
        self.bar: tqdm | None = None
        self.last_line = -math.inf
        self.begun = (0, 0.0)

    @classmethod
    def replace_default(cls, trainer: Trainer, show_bar: bool) -> None:
        """Put this in the place of Trainer's own bar, which prints raw dictionaries and a second bar for each
        evaluation.
        """
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls(show_bar))

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar at the step where the run starts or resumes."""
        self.begun = (state.global_step, time.monotonic())
        if self.show_bar and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", mininterval=0.5)

    def on_step_end(self, args, state, control, **kwargs):
        """Advance the bar; in a log, say where the run is when it has been silent."""
        if self.bar is not None:
            self.bar.update(1)
        elif self.show_bar and time.monotonic() - self.last_line > SECONDS and self.last_line > 0:
            step, started = self.begun
            seconds = (time.monotonic() - started) / max(1, state.global_step - step)
            self._write(f"{_place(state)}  {(state.max_steps - state.global_step) * seconds / 60:.1f} minutes left")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the losses that Trainer has just logged."""
        logs = logs or {}
        if "loss" in logs:
            if self.bar is not None or time.monotonic() - self.last_line > SECONDS:
                self._write(f"{_place(state)}  training loss {logs['loss']:.3f}")
        elif "eval_macro_f1" in logs:
            accuracy, f1 = logs["eval_accuracy"], logs["eval_macro_f1"]
            self._write(
                f"{_place(state)}  validation accuracy {accuracy:.3f}, macro F1 {f1:.3f}, loss {logs['eval_loss']:.3f}"
            )
        elif "eval_loss" in logs:
            perplexity = math.exp(min(logs["eval_loss"], 50))
            self._write(f"{_place(state)}  validation loss {logs['eval_loss']:.3f}, perplexity {perplexity:.1f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _write(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        self.last_line = time.monotonic()


def _place(state) -> str:
    return f"step {state.global_step:>5}/{state.max_steps}"
