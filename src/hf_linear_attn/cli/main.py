"""The commands of `hf-linear-attn`: finds the one that is called, and turns errors that a user can mend into one message."""

import importlib
import os
import re
import sys

from ..terminal_text import printable
from .parser import did_you_mean
from .quiet import held_back

# command -> (module with `run(arguments) -> exit code`, what it does)
COMMANDS = {
    "demo": ("demo", "train a small LEAP, a DANet and a GPT-2 on real text, compare them, generate"),
    "train": ("train", "train a language model with every knob, and resume it"),
    "distill": ("distill", "turn a pretrained model into a SEA model and distil it"),
    "convert": ("convert", "pretrained models and published checkpoints into our families; ours into ONNX"),
    "generate": ("generate", "continue a prompt with a trained model"),
    "serve": ("serve", "Transformers' server with our families: OpenAI's protocol, streaming, chat"),
    "evaluate": ("evaluate", "perplexity, bits per byte, masked words or accuracy of a checkpoint"),
    "explain": ("explain", "which tokens of a text a model looks at, in colours and as a page"),
    "bench": ("bench", "speed and state of models on this machine, side by side"),
    "card": ("card", "write the model card of a checkpoint"),
}
CLOSED_PIPE = 128 + 13  # as of any program that SIGPIPE ends
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Invalid buffer size", re.I)
NOT_WRITTEN = re.compile(r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|No space left on device")


def usage() -> str:
    """What `hf-linear-attn --help` prints."""
    commands = "\n".join(f"  {name:10} {about}" for name, (_, about) in COMMANDS.items())
    return (
        "usage: hf-linear-attn COMMAND [options]\n\n"
        "Linear attention for Hugging Face Transformers.\n\n"
        f"commands:\n{commands}\n\n"
        "Each command explains itself: hf-linear-attn train --help\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2 for a wrong call, 1 for an error, 130 after Ctrl-C, 141
    where the reader of the output has gone).
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        from ..version import __version__

        print(__version__)
        return 0
    name = words[0]
    if name not in COMMANDS:
        print(
            f"hf-linear-attn: error: unknown command {name!r}{did_you_mean(name, COMMANDS)}\n\n{usage()}",
            file=sys.stderr,
        )
        return 2
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that the terminal does not have is no error
            stream.reconfigure(errors="replace")
    try:
        command = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        code = command.run(words[1:])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has stopped, as `| head` does. Nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except Exception as error:
        message = user_message(error)
        if message is None:  # a fault of ours: its stack is what we need to see
            print(held_back(), end="", file=sys.stderr)
            raise
        print(printable(f"hf-linear-attn {name}: error: {message}"), file=sys.stderr)
        return 1


def user_message(error: BaseException) -> str | None:
    """What a user can put right, in words without the stack of our calls; None for an error that is a fault of this package.

    The one place that knows which classes are a user's: Python's for values, files and missing packages, and those of the
    libraries that say the same and derive from none of these.
    """
    import csv
    import tarfile
    import zlib
    from zipfile import BadZipFile

    from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
    from safetensors import SafetensorError

    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}"
    if isinstance(error, ValueError | ImportError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        return f"there is not enough memory: {text or 'take smaller sizes'}"
    if isinstance(error, RuntimeError) and NOT_WRITTEN.search(text):  # torch.save names neither the file nor the reason
        return f"a file could not be written ({text}): is the disk full?"
    if isinstance(error, BadZipFile | tarfile.TarError | zlib.error | EOFError | csv.Error):
        return f"a file is damaged or cut short: {text}"
    if isinstance(error, SafetensorError):
        return f"a file of weights could not be read or written: {text}"
    if isinstance(error, StrictDataclassError | EntryNotFoundError):
        return text
    # These libraries are imported only where text is read.
    if any(base.__module__.partition(".")[0] in ("datasets", "pyarrow") for base in type(error).__mro__):
        return user_message(error.__cause__) if error.__cause__ is not None else text
    return None


if __name__ == "__main__":
    sys.exit(main())
