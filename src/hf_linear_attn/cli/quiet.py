"""What the libraries print on their own, and a user of the command line need not read."""


def quiet_libraries() -> None:
    """Errors only from Transformers, and none of its bars for files (the bar of a training run is ours and stays)."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
