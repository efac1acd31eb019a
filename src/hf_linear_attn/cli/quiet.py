"""What the libraries print on their own, and a user of the command line need not read unless something goes wrong."""

import logging
import os
import sys
from collections import deque

from ..terminal_text import printable

KEPT = 20


class HeldBack(logging.Handler):
    """Keeps the latest warnings of a library for the case that an error refers to them; errors are printed at once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: deque[str] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Print or keep one message."""
        if record.levelno >= logging.ERROR:
            print(self.format(record), file=sys.stderr)
        else:
            self.messages.append(record.getMessage())


_held = HeldBack()


def begin_work(*checkpoints: str) -> None:
    """What every command does when its words are read and checked, before it imports anything that takes seconds.

    Args:
        *checkpoints: names that the command is about to load.

    Raises:
        ImportError: a Transformers that is not supported.
    """
    for name in checkpoints:
        say_if_no_folder(name)
    from ..registration import register_all

    register_all()
    quiet_libraries()


def say_if_no_folder(checkpoint: str) -> None:
    """A mistyped folder may be a name on the Hub, whose answer takes half a minute without a network: the user hears at once."""
    if not os.path.exists(checkpoint):
        what = printable(f"there is no folder {checkpoint!r} here: looking for a repository of that name")
        print(what, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Errors only from Transformers, and none of its bars for files (the bar of a training run is ours and stays)."""
    from transformers.utils import logging as library

    library.set_verbosity_warning()
    library.disable_default_handler()
    library.add_handler(_held)  # a handler that is there already is not added again
    library.disable_progress_bar()
    _held.messages.clear()


def held_back() -> str:
    """The warnings since the command began, a line each: an error may say "see above" and mean them."""
    return "".join(f"{message}\n" for message in _held.messages)
