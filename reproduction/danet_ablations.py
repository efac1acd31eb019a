"""Parts of DANet's encoder changed one at a time, by how well it learns masked words of the speeches.

    python -m reproduction danet-ablations run --output outputs/danet-ablations --jobs 12
    python -m reproduction danet-ablations table

What is published: one head is best, local layers are better than global ones alone, and MaxNorm is as good as LayerNorm, which
does not train in float16. The model, the text and the budget are those of `encoder-tasks`; every change gets each rate with the
first seed, and the other seeds at the rate with the lowest validation loss. Every run is a folder with
training_report.json, and is not repeated. `--preset tiny` tries everything out in minutes on two cores.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import machine

from .encoder_tasks import PRESETS, Preset, pretraining_command
from .recipe import DATA, REPORT, Recipe, option, run_together, write

JSON = DATA / "danet-ablations.json"
LAYER_NORM = tuple(f"{place}_norm=standard_ln" for place in ("pre", "post", "embedding", "final"))


@dataclass(frozen=True)
class Change:
    """What is different, in words and for the command line. seeds: False where the first one says enough."""

    words: str
    heads: int = 1
    config: tuple[str, ...] = ()
    precision: str = "bfloat16"
    seeds: bool = True


CHANGES = {
    "base": Change("as published: one head, local and global layers, MaxNorm"),
    "heads4": Change("4 heads", heads=4),
    "heads16": Change("16 heads", heads=16),
    "global": Change("all layers global", config=("layer_pattern=g",)),
    "layernorm": Change("LayerNorm for every MaxNorm", config=LAYER_NORM),
    "base-float16": Change("as published, in float16", precision="float16", seeds=False),
    "layernorm-float16": Change("LayerNorm, in float16", config=LAYER_NORM, precision="float16", seeds=False),
}


def command(name: str, preset: Preset, rate: float, seed: int, folder: Path, options: argparse.Namespace) -> list[Any]:
    """Words of `python -m`."""
    change = CHANGES[name]
    preset = replace(preset, heads={"danet": change.heads})
    words = [*pretraining_command(preset, "danet", rate, folder, options), "--seed", seed]
    words += ["--config", *change.config] if change.config else []
    return words if options.cpu else [*words, "--precision", change.precision]


def run(options: argparse.Namespace) -> None:
    """Every rate with the first seed, then the other seeds at the best rate; the results into one file."""
    import torch

    if not (options.cpu or torch.cuda.is_available()):
        raise SystemExit("there is no GPU: `--preset tiny --cpu` tries everything out, `--cpu` alone takes a day")
    preset = PRESETS[options.preset]
    if options.steps:
        preset = replace(preset, pretraining=preset.pretraining | {"steps": options.steps})
    first, *others = options.seeds

    def folder(name: str, rate: float, seed: int) -> Path:
        return options.output / f"{name}-rate{rate:g}-seed{seed}"

    def commands(wanted: list[tuple[str, float, int]]) -> dict[Path, list[Any]]:
        return {folder(*each): command(each[0], preset, *each[1:], folder(*each), options) for each in wanted}

    run_together(commands([(name, rate, first) for name in options.changes for rate in options.rates]), options.jobs)
    found = collect(options)
    more = [
        (name, best(found[name], last_step(found))["rate"], seed)
        for name in found
        if CHANGES[name].seeds
        for seed in others
    ]
    run_together(commands(more), options.jobs)
    collect(options)


def collect(options: argparse.Namespace) -> dict[str, list[dict]]:
    """Validation losses of every run by change, of those that were cut as well; also written to `--json`."""
    found: dict[str, list[dict]] = {}
    where = None
    for name in CHANGES:
        for log in sorted(options.output.glob(f"{name}-rate*.log")):
            named = re.fullmatch(rf"{name}-rate(.+)-seed(\d+)", log.stem)
            points = re.findall(r"^step +(\d+)/(\d+) +validation loss ([\w.]+)", log.read_text(), re.MULTILINE)
            if named is None or not points:
                continue
            report = log.with_suffix("") / REPORT
            where = json.loads(report.read_text())["machine"] if report.exists() else where
            curve = [{"step": int(step), "validation": float(loss)} for step, _, loss in points]
            found.setdefault(name, []).append(
                {"rate": float(named[1]), "seed": int(named[2]), "steps": int(points[0][1]), "curve": curve}
            )
    write(options.json, {"machine": where or machine(), "changes": found})
    return found


def last_step(found: dict[str, list[dict]]) -> int:
    """The last step at which every run was evaluated."""
    return min(run["curve"][-1]["step"] for runs in found.values() for run in runs)


def loss_at(run: dict, step: int) -> float:
    """Validation loss there; of a run that diverged the worst."""
    value = next(point["validation"] for point in run["curve"] if point["step"] == step)
    return value if math.isfinite(value) else math.inf


def best(runs: list[dict], step: int) -> dict:
    """Of the first seed's runs the one with the lowest loss."""
    first = min(run["seed"] for run in runs)
    return min((run for run in runs if run["seed"] == first), key=lambda run: loss_at(run, step))


def losses(found: dict[str, list[dict]], name: str) -> list[float]:
    """Of each seed at the best rate, after the last step that every run of all changes reached."""
    step = last_step(found)
    rate = best(found[name], step)["rate"]
    return [loss_at(run, step) for run in found[name] if run["rate"] == rate]


def table(options: argparse.Namespace) -> None:
    """One line a change."""
    if not options.json.exists():
        raise SystemExit(
            f"there is no {options.json}: `run` makes it; `run --preset tiny --cpu` tries that out in minutes"
        )
    found = json.loads(options.json.read_text())["changes"]
    step, steps = last_step(found), next(iter(found.values()))[0]["steps"]
    after = f"after {step:,} of {steps:,} steps"
    print(f"| DANet | validation loss {after}: each rate, first seed | each seed at the best rate |\n|---|---|---|")
    for name, runs in found.items():
        first = [run for run in runs if run["seed"] == best(runs, step)["seed"]]
        rates = ", ".join(f"{run['rate']:g}: {loss_at(run, step):.3f}" for run in first)
        print(f"| {CHANGES[name].words} | {rates} | {', '.join(f'{loss:.3f}' for loss in losses(found, name))} |")


_JSON = option("--json", JSON, "file of the results")
RECIPE = Recipe(
    reproduces="DANet paper, ablations: heads, local and global layers, MaxNorm and LayerNorm",
    results=("danet-ablations.json",),
    stages={
        run: [
            _JSON,
            option("--output", Path("outputs/danet-ablations")),
            option("--changes", list(CHANGES), choices=CHANGES),
            option("--preset", "small", choices=PRESETS),
            option("--steps", 1800),
            option("--rates", [5e-4, 1.5e-3]),
            option("--seeds", [0, 1, 2]),
            option("--text", help="files instead of the speeches", nargs="+", default=[]),
            option("--jobs", 1, "runs at once"),
            option("--threads", help="CPU threads of a run", type=int),
            option("--cpu", False, "stay on the CPU, in float32"),
        ],
        table: [_JSON],
    },
)
