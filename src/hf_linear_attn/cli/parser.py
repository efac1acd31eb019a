"""Command-line parsing that helps: options from a dataclass, and a suggestion for a mistyped word."""

import argparse
import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NoReturn

from ..checkpoint_names import no_such_folder
from ..packaged import PACKAGED_MODEL
from ..terminal_text import printable
from ..training.number_range import NumberRange


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, suggestions for unknown ones, and exit code 2 for a wrong call."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.ranges: dict[str, NumberRange] = {}
        self.texts: set[str] = set()

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """Parsed values by name; options that were not given and have no default are absent."""
        values, unknown = self.parse_known_args(arguments)
        for word in unknown:
            name = word.split("=")[0]
            if name.startswith("-"):
                self.error(f"unknown option {name!r}{did_you_mean(name, self._option_names())}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        for action in self._actions:
            self._check(action, getattr(values, action.dest, None))
        return vars(values)

    def _check(self, action: argparse.Action, given: Any) -> None:
        """Refuse a number out of its range, a name or path that is empty, and a word that is no text."""
        name = action.option_strings[0] if action.option_strings else action.dest
        for value in given if isinstance(given, list) else [given]:
            if (
                action.dest in self.ranges
                and value is not None
                and (problem := self.ranges[action.dest].problem(value))
            ):
                self.error(f"{name} {problem}")
            if isinstance(value, str) and not is_text(value):
                self.error(f"{name} holds bytes that are not UTF-8 text")
            if value == "" and action.dest not in self.texts:
                self.error(f"{name} is empty: give a value, or leave it out")

    def add_text(self, name: str, help: str) -> None:
        """A positional argument that is a text, which may be empty, and not a name or a path."""
        self.texts.add(name)
        self.add_argument(name, help=help)

    def add_number(
        self, name: str, kind: type, allowed: NumberRange, help: str, default: Any = None, **more: Any
    ) -> None:
        """An option that takes numbers in a range, which its error names."""
        self.ranges[name.removeprefix("--").replace("-", "_")] = allowed
        self.add_argument(name, type=kind, default=default, metavar=kind.__name__.upper(), help=help, **more)

    def error(self, message: str) -> NoReturn:
        """Print the message alone (the full usage would bury it) and where help is; exit code 2."""
        self.exit(2, printable(f"{self.prog}: error: {message}\nSee {self.prog} --help\n"))

    def add_json(self) -> None:
        """The option `--json`, which every command has."""
        text = "print the result as one JSON object, everything else on stderr"
        self.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)

    def add_checkpoint(self, about: str, name: str = "checkpoint") -> None:
        """A positional argument that names a saved model; where it is left out, the one in the package."""
        about += " (default: the small LEAP in the package)"
        self.add_argument(name, nargs="?", default=PACKAGED_MODEL, type=checkpoint, help=about)

    def add_device(self) -> None:
        """The option `--device`; one that PyTorch cannot use here is a wrong call."""
        self.add_argument(
            "--device", type=usable_device, default="cpu", metavar="NAME", help="cpu, cuda, mps (default: cpu)"
        )

    def _option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def add_dataclass(self, options: type) -> None:
        """One option for each field of a dataclass made of `training.options.option`;
        defaults stay with the dataclass.
        """
        groups: dict[str, Any] = {}
        for each in fields(options):
            about = each.metadata
            group = groups.setdefault(about["group"], self.add_argument_group(about["group"]))
            flag = "--" + each.name.replace("_", "-")
            keywords: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS}
            if about["kind"] is bool:
                group.add_argument(flag, action="store_true", help=about["help"], **keywords)
                continue
            default = "" if each.default in (None, "") or "default:" in about["help"] else f" (default: {each.default})"
            several = not isinstance(each.default, str | int | float | None)
            if several:
                default, keywords["nargs"] = "", "+"
            choices = about["choices"]
            keywords["type"] = one_of(choices) if choices else about["kind"]
            keywords["metavar"] = about["metavar"] or ("|".join(choices) if choices else about["kind"].__name__.upper())
            group.add_argument(flag, help=about["help"] + default, **keywords)


def is_text(word: str) -> bool:
    """Whether a word from the command line is text: bytes that are not UTF-8 come as surrogates, which no library takes."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def checkpoint(name: str) -> str:
    """Argument type of a saved model: a folder, or a name that the Hub may know."""
    missing = no_such_folder(name) if name else None  # an empty one has its own message
    if missing is not None:
        raise argparse.ArgumentTypeError(missing)
    return os.path.expanduser(name)


def usable_device(name: str) -> str:
    """Argument type of a device that PyTorch can put a tensor on."""
    if name == "cpu":  # there always is; and PyTorch takes seconds to import
        return name
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        here = f"cpu, {found.type}" if found else "cpu alone"
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used ({reason}); here is {here}") from None
    return name


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """Argument type that takes one of the words, and suggests the nearest for another one."""

    def convert(word: str) -> str:
        if word not in choices:
            raise argparse.ArgumentTypeError(
                f"{word!r} is not one of {', '.join(choices)}{did_you_mean(word, choices)}"
            )
        return word

    return convert
