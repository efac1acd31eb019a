"""Stopping a Trainer run without losing a step, and finding where to go on."""

import json
import logging
import re
import signal
import threading
from pathlib import Path

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint-N in `folder` that was written to its end, or None.

    Trainer writes trainer_state.json last, so a run that was killed while it saved leaves a checkpoint without a
    readable one.
    """
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            logger.warning("%s is incomplete (the run was killed while it saved): going back to the one before", path)
            continue
        return path
    return None


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
