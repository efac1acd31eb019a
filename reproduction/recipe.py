"""The one form of a recipe: what it reproduces, where its results lie, its stages and their options; and how runs are started."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

RECIPES = (
    "corpora",
    "danet-ablations",
    "distributed",
    "encoder-tasks",
    "faithfulness",
    "language-models",
    "long-range",
    "paper-wikitext",
    "sea-cells",
    "sea-classification",
    "sea-language",
)
DATA = Path(__file__).parents[1] / "docs" / "data"
REPORT = "training_report.json"  # of `hf-linear-attn train`, in the folder of a run
Option = tuple[str, dict[str, Any]]
Stages = dict[Callable[[argparse.Namespace], Any], list[Option]]


@dataclass(frozen=True)
class Recipe:
    """`RECIPE` of a module of this folder, whose docstring says how to run it.

    reproduces: what is published, and where; or what is compared. results: files of docs/data that it makes. stages: functions
    of the parsed options, in their order, each with its options; its name is the stage's, its docstring the help.
    """

    reproduces: str
    results: tuple[str, ...]
    stages: Stages

    def parser(self, name: str, about: str | None) -> argparse.ArgumentParser:
        """Of `python -m reproduction NAME STAGE ...`."""
        parser = argparse.ArgumentParser(
            prog=f"python -m reproduction {name}",
            description=f"{about}\nReproduces: {self.reproduces}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        stages = parser.add_subparsers(dest="stage", required=True)
        for function, options in self.stages.items():
            stage = stages.add_parser(function.__name__, help=(function.__doc__ or "").split("\n")[0])
            stage.set_defaults(function=function)
            for flag, settings in options:
                stage.add_argument(flag, **settings)
        return parser


def option(flag: str, default: Any = None, help: str = "", **settings: Any) -> Option:
    """For `add_argument`; the kind is that of the default. False is a switch, and a list takes several values."""
    if default is False:
        return flag, {"action": "store_true", "help": help}
    several = isinstance(default, list)
    example = (default or [None])[0] if several else default
    kind = Path if isinstance(example, Path) else str if example is None else type(example)
    given = {"default": default, "help": help, "type": kind} | ({"nargs": "+"} if several else {})
    return flag, given | settings


def load(name: str) -> tuple[Recipe, str | None]:
    """A recipe and what it says of itself. KeyError for an unknown name."""
    if name not in RECIPES:
        raise KeyError(name)
    module = import_module(f"reproduction.{name.replace('-', '_')}")
    return module.RECIPE, module.__doc__


def command(name: str, options: argparse.Namespace, **changes: Any) -> list[Any]:
    """Words of `python -m` for a stage with these options, some changed: a run in a process of its own."""
    words = ["reproduction", name, options.stage]
    for flag, _ in load(name)[0].stages[options.function]:
        value = {**vars(options), **changes}[flag[2:].replace("-", "_")]
        if value not in (None, False, []):
            words += [flag, *(value if isinstance(value, list) else [] if value is True else [value])]
    return words


def is_done(result: Path) -> bool:
    """Whether a run has left its JSON, or its report in its folder."""
    return (result if result.suffix == ".json" else result / REPORT).exists()


def run_together(commands: dict[Path, list[Any]], jobs: int, gpus: Sequence[str] = ()) -> None:
    """Run `python -m` with those words, `jobs` at once, printing into a .log beside the result; what is done is left alone.

    gpus: devices, as CUDA_VISIBLE_DEVICES names them; a run gets the one with the fewest runs on it.
    """
    waiting = [(result, list(map(str, words))) for result, words in commands.items() if not is_done(result)]
    print(f"{len(commands)} runs, of which {len(commands) - len(waiting)} are done", flush=True)
    running: list[tuple[Path, Any, subprocess.Popen, str | None]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            result, words = waiting.pop(0)
            result.parent.mkdir(parents=True, exist_ok=True)
            print(f"$ python -m {shlex.join(words)}", flush=True)
            log = result.with_name(result.name.removesuffix(".json") + ".log").open("w")
            gpu = min(gpus, key=[each[3] for each in running].count) if gpus else None
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}),
            )
            running.append((result, log, process, gpu))
        time.sleep(0.2)
        for item in [item for item in running if item[2].poll() is not None]:
            running.remove(item)
            result, log, process, _ = item
            log.close()
            print(f"{result.name}: {'done' if process.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def results(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The JSON files there, by name."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]


def write(file: Path, result: Any) -> None:
    """As JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, default=str) + "\n")
    part.rename(file)
