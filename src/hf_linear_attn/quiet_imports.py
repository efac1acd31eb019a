"""What torchao and PyTorch say about each other, which no user of this package can act on, is not printed.

Where torchao is installed, Transformers imports it with its first model, and four lines appear: kernels of torchao for other
machines, and a call of PyTorch's that torchao should not make any more. All other messages, of these loggers too, are left alone.
"""

import logging
import re

TALK = {
    "torchao": re.compile(r"Failed to load .*_C\w*\.(abi3|cpython)"),
    "torch.utils._pytree": re.compile(r"register_constant\(\)"),
}


class Unheard(logging.Filter):
    """Drops the warnings of one logger that say what `TALK` lists; errors pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is printed."""
        return record.levelno > logging.WARNING or not TALK[record.name].search(record.getMessage())


_unheard = Unheard()


def drop_torchao_talk() -> None:
    """From now on; harmless when repeated."""
    for name in TALK:
        logging.getLogger(name).addFilter(_unheard)
