"""Command-line parsing that helps: options from a dataclass, and a suggestion for a mistyped word."""

import argparse
import difflib
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NoReturn


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, suggestions for unknown ones, and exit code 2 for a wrong call."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """Parsed values by name; options that were not given and have no default are absent."""
        values, unknown = self.parse_known_args(arguments)
        for word in unknown:
            name = word.split("=")[0]
            if name.startswith("-"):
                self.error(f"unknown option {name!r}{did_you_mean(name, self._option_names())}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return vars(values)

    def error(self, message: str) -> NoReturn:
        """Print the message alone (the full usage would bury it) and where help is; exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\nSee {self.prog} --help\n")

    def add_json(self) -> None:
        """The option `--json`, which every command has."""
        text = "print the result as one JSON object, everything else on stderr"
        self.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)

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


def usable_device(name: str) -> str:
    """Argument type of a device that PyTorch can put a tensor on."""
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
