"""Stopping a Trainer run without losing a step, finding where to go on, and what a checkpoint of Trainer's leaves out."""

import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState

from ..modeling.shared.compat import add_loss_since_log, exportable_state, loss_since_log
from .files import damage, model_files


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoint-N in `folder` with their N, newest first, whole or not."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    return sorted(found, reverse=True)


def checkpoint_damage(checkpoint: Path, with_scaler: bool = False) -> str | None:
    """Why a run cannot go on from `checkpoint` as if nothing had happened, as in "optimizer.pt is missing"; None where it can.

    with_scaler: the run scales its losses (float16), which is a state, too.
    """
    files = [*model_files(checkpoint), "optimizer.pt", "scheduler.pt"]
    files += sorted(path.name for path in checkpoint.glob("rng_state_*.pth")) or ["rng_state.pth"]
    files += ["scaler.pt"] if with_scaler else []
    wrong = damage(checkpoint, [*files, "trainer_state.json"])
    if wrong is None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if checkpoint.name != f"checkpoint-{state.get('global_step')}" or not isinstance(
            state.get("log_history"), list
        ):
            return "trainer_state.json is damaged"
    return wrong


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint-N in `folder` of which every file is there and can be read, or None."""
    return next((path for _, path in checkpoints(folder) if checkpoint_damage(path) is None), None)


class CarriedOver(TrainerCallback, exportable_state()):  # type: ignore[misc]  # a class that is imported late
    """A callback whose values go through Trainer's checkpoints: a resumed run begins with those of the interrupted one."""

    def values(self) -> dict[str, Any]:
        """The values, as JSON takes them."""
        raise NotImplementedError

    def take_over(self, values: dict[str, Any]) -> None:
        """Go on from what `values` returned."""
        for name, value in values.items():
            setattr(self, name, value)

    def state(self) -> dict[str, Any]:
        """What Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": self.values()}

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        """Take over what the checkpoint brought. One without an entry (of an older version) gets one, which Trainer expects."""
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self.take_over(saved["attributes"])


class LossSinceLog(CarriedOver):
    """Carries the sum of the losses since the last point of the curve, which Trainer keeps outside its state.

    Without it the first point after a resume is the mean over fewer steps than that of an undisturbed run.
    """

    def __init__(self, trainer: Trainer | None = None):
        # None: made by Trainer itself from a checkpoint (restore_callback_states_from_checkpoint)
        self.trainer = trainer

    def values(self) -> dict[str, Any]:
        """The sum, and the step of the last point. Nothing before the first step."""
        found = None if self.trainer is None else loss_since_log(self.trainer)
        return {} if found is None else dict(zip(("loss", "last_logged"), found, strict=True))

    def take_over(self, values: dict[str, Any]) -> None:
        """Let the next point count the losses of the interrupted run."""
        if self.trainer is not None and values:
            add_loss_since_log(self.trainer, **values)


class StopOnSignal(TrainerCallback):
    """Turns Ctrl-C (SIGINT) and SIGTERM into: finish this step, write a checkpoint, stop.
    A second signal stops at once.

    Use it as a context manager around `trainer.train()`; outside the main thread, where Python allows no signal
    handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number, frame):
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        """Ask Trainer to save and to stop, once a signal has come."""
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
