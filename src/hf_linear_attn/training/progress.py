"""One progress bar for a whole run, with a readable line for each point of the learning curve."""

import math
import sys

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class TrainingProgress(TrainerCallback):
    """Bar over the steps on stderr (redrawn rarely where that is no terminal) and lines of losses on stdout."""

    def __init__(self, show_bar: bool = True):
        self.show_bar = show_bar
        self.bar: tqdm | None = None

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
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            mininterval=interval,
            disable=not self.show_bar,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the losses that Trainer has just logged."""
        logs = logs or {}
        step = f"step {state.global_step:>5}/{state.max_steps}"
        if "loss" in logs:
            self._write(f"{step}  training loss {logs['loss']:.3f}")
        elif "eval_macro_f1" in logs:
            accuracy, f1 = logs["eval_accuracy"], logs["eval_macro_f1"]
            self._write(f"{step}  validation accuracy {accuracy:.3f}, macro F1 {f1:.3f}, loss {logs['eval_loss']:.3f}")
        elif "eval_loss" in logs:
            perplexity = math.exp(min(logs["eval_loss"], 50))
            self._write(f"{step}  validation loss {logs['eval_loss']:.3f}, perplexity {perplexity:.1f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _write(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
