"""The commands of `hf-linear-attn`: finds the one that is called, and turns errors that a user can mend into one message."""

import importlib
import re
import sys
from pathlib import Path

from .parser import did_you_mean

# command -> (module with `run(arguments) -> exit code`, what it does)
COMMANDS = {
    "demo": ("demo", "train a small LEAP, a DANet and a GPT-2 on real text, compare them, generate"),
    "train": ("train", "train a language model with every knob, and resume it"),
    "distill": ("distill", "turn a pretrained model into a SEA model and distil it"),
    "convert": ("convert", "pretrained models and published checkpoints into our families; ours into ONNX"),
    "generate": ("generate", "continue a prompt with a trained model"),
    "evaluate": ("evaluate", "perplexity, bits per byte, masked words or accuracy of a checkpoint"),
    "explain": ("explain", "which tokens of a text a model looks at, in colours and as a page"),
    "bench": ("bench", "speed and state of models on this machine, side by side"),
    "card": ("card", "write the model card of a checkpoint"),
}


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
    """Run one command; returns its exit code (2 for a wrong call, 1 for an error, 130 after Ctrl-C)."""
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
    try:
        command = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        return command.run(words[1:])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError) as error:
        # What a user can put right: say what is wrong, without the stack of our own calls.
        print(f"hf-linear-attn {name}: error: {error}{_looked_up(words[1:], error)}", file=sys.stderr)
        return 1


def _looked_up(words: list[str], error: Exception) -> str:
    """Which word was taken for a name on the Hub, where the Hub could not be reached: mostly a folder with a wrong name."""
    if not isinstance(error, OSError) or "huggingface.co" not in str(error):
        return ""
    names = [word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", word) and not Path(word).exists()]
    names = [word for word in names if word[0] != "-" and word not in str(error)]
    return f"\nThere is no folder {names[0]!r} here, so the Hub was asked for it." if names else ""


if __name__ == "__main__":
    sys.exit(main())
