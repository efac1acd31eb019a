"""Imports the part of Transformers that brings torchao along, without what torchao and PyTorch print about each other.

Where torchao is installed, Transformers imports it with its first model, and four lines appear that no user of this package
can act on: kernels of torchao for other machines, and a call of PyTorch's that torchao should not make any more. Imported
first by the package; messages at any other time, and those of other loggers, are left alone.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torchao", "torch.utils._pytree")


@contextmanager
def unheard(*names: str) -> Iterator[None]:
    """Drop warnings of these loggers (errors pass) while the context is open."""

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


with unheard(*TALKATIVE):
    from transformers import PreTrainedModel  # noqa: F401
