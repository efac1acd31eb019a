"""DANet beside BERT of the same size: masked words on the speeches, then classification, all through `hf-linear-attn train`.

    python -m reproduction encoder-tasks run --output outputs/encoders --jobs 4
    python -m reproduction encoder-tasks table --output outputs/encoders

Both families get the same text, tokenizer, batches and steps, and as many learning rates to choose from, each around those that
suit it. Pre-training: each rate once, the best one by validation loss goes on. Fine-tuning on each set: each rate with the first
seed, from that checkpoint and from new weights; the rate that is best by validation accuracy then with the other seeds, too.
--finetuning-config danet=pooler=max tries every rate with that change of the model, too, and the choice is among all. The test
part chooses nothing. Every run is a folder with training_report.json, and is not repeated while that file is there.
`--preset tiny` tries everything out in minutes on two cores.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .recipe import REPORT, Recipe, option, results, run_together, write

FAMILIES = ("danet", "bert")
STARTS = ("pretrained", "new")
TRAIN = ("hf_linear_attn", "train")
Choice = tuple[float, str]  # a learning rate, and what of the model's config was changed ("" is nothing)


@dataclass(frozen=True)
class Preset:
    """Sizes and budgets. layers, heads: of each family, for the same number of parameters."""

    hidden_size: int
    layers: dict[str, int]
    heads: dict[str, int]
    vocab_size: int
    block_length: int
    pretraining: dict[str, Any]
    pretraining_rates: dict[str, tuple[float, ...]]
    finetuning: dict[str, Any]
    finetuning_rates: dict[str, tuple[float, ...]]


PRESETS = {
    # DANet has 9 d^2 parameters a layer, BERT 12 d^2: 12 layers against 9. One head is what the DANet paper found best.
    "small": Preset(
        256,
        {"danet": 12, "bert": 9},
        {"danet": 1, "bert": 4},
        8192,
        256,
        {
            "batch-size": 32,
            "steps": 2000,
            "weight-decay": 0.05,
            "warmup": 0.1,
            "eval-every": 500,
            "save-every": 100_000,
        },
        {"danet": (5e-4, 1.5e-3, 4.5e-3), "bert": (1e-4, 2.5e-4, 6e-4)},
        {"batch-size": 32, "steps": 400, "warmup": 0.1, "dropout": 0.05, "eval-every": 200, "save-every": 100_000},
        {"danet": (1e-4, 3e-4, 1e-3, 3e-3), "bert": (5e-5, 1.5e-4, 5e-4, 1.5e-3)},
    ),
    # Two cores, a quarter of an hour: one rate for the masked words, two to choose from for the labels.
    "cpu": Preset(
        128,
        {"danet": 4, "bert": 3},
        {"danet": 1, "bert": 2},
        4096,
        128,
        {"batch-size": 16, "steps": 400, "eval-every": 100, "eval-tokens": 20_000, "final-eval-tokens": 100_000},
        {"danet": (1e-3,), "bert": (1e-3,)},
        {"batch-size": 16, "steps": 150, "dropout": 0.05, "eval-every": 75},
        {"danet": (5e-4, 2e-3), "bert": (5e-4, 2e-3)},
    ),
    "tiny": Preset(
        32,
        {"danet": 4, "bert": 3},
        {"danet": 1, "bert": 2},
        600,
        64,
        {"batch-size": 8, "steps": 20, "eval-every": 10, "eval-tokens": 2000, "final-eval-tokens": 4000},
        {"danet": (1e-3, 3e-3), "bert": (3e-4, 1e-3)},
        {"batch-size": 8, "steps": 10},
        {"danet": (1e-3, 3e-3), "bert": (1e-3,)},
    ),
}


def pretraining_command(
    preset: Preset, family: str, rate: float, folder: Path, options: argparse.Namespace
) -> list[str]:
    """`hf-linear-attn train --task mlm` with new weights."""
    words = [*TRAIN, "--task", "mlm", "--family", family, "--hidden-size", preset.hidden_size]
    words += ["--num-hidden-layers", preset.layers[family], "--num-attention-heads", preset.heads[family]]
    words += ["--vocab-size", preset.vocab_size, "--block-length", preset.block_length, "--learning-rate", rate]
    words += ["--data", *options.text] if options.text else []
    return [*words, *_flags(preset.pretraining), *_common(options, folder)]


def finetuning_command(
    preset: Preset, data: str, choice: Choice, seed: int, start: list[Any], folder: Path, options: argparse.Namespace
) -> list[str]:
    """`hf-linear-attn train --task classification`; start: the words that name a checkpoint or new weights."""
    rate, change = choice
    words = [*TRAIN, "--task", "classification", *_data_words(data), "--block-length", preset.block_length]
    words += ["--learning-rate", rate]
    words += ["--config", *change.split(",")] if change else []
    return [*words, "--seed", seed, *start, *_flags(preset.finetuning), *_common(options, folder)]


def _data_words(data: str) -> list[Any]:
    """Words for a named set, or for a folder with train.jsonl, validation.jsonl and test.jsonl."""
    folder = Path(data)
    if not folder.is_dir():
        return ["--data", data]
    names = {"--data": "train", "--validation-data": "validation", "--test-data": "test"}
    return [word for flag, split in names.items() for word in (flag, folder / f"{split}.jsonl")]


def _name_of(data: str) -> str:
    return Path(data).name if Path(data).is_dir() else data.partition(":")[0]


def _flags(values: dict[str, Any]) -> list[Any]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def _common(options: argparse.Namespace, folder: Path) -> list[Any]:
    words = ["--output", folder, "--overwrite", "--quiet", "--keep-checkpoints", 1, "--log-every", 50]
    words += ["--threads", options.threads] if options.threads else []
    return [*words, *(["--cpu"] if options.cpu else ["--precision", "bfloat16"])]


def reports(pattern: str, output: Path) -> list[dict[str, Any]]:
    """Reports of the finished runs whose folder matches."""
    return results(output, f"{pattern}/{REPORT}")


def best_pretraining(output: Path, family: str) -> Path | None:
    """Folder of the finished pre-training with the lowest validation loss."""
    done = [
        (folder, json.loads((folder / REPORT).read_text()))
        for folder in output.glob(f"mlm-{family}-*")
        if (folder / REPORT).exists()
    ]
    return min(done, key=lambda pair: pair[1]["validation"]["loss"])[0] if done else None


def best_choice(output: Path, data: str, family: str, start: str, seed: int) -> Choice | None:
    """Rate and change of the model with the highest validation accuracy among the finished fine-tunings with that seed."""
    done = reports(f"{_name_of(data)}-{family}-{start}-*-seed{seed}", output)
    best = max(done, key=lambda each: each["validation"]["accuracy"], default=None)
    return None if best is None else (best["options"]["learning_rate"], _change(best["options"]))


def _change(options: dict[str, Any]) -> str:
    return ",".join(options.get("config") or [])


def _start_words(preset: Preset, family: str, checkpoint: Path) -> dict[str, list[Any]]:
    """The words of `train` for the two starts: that checkpoint, or new weights with its tokenizer."""
    new = ["--family", family, "--tokenizer", checkpoint, "--hidden-size", preset.hidden_size]
    new += ["--num-hidden-layers", preset.layers[family], "--num-attention-heads", preset.heads[family]]
    return {"pretrained": ["--from-checkpoint", checkpoint], "new": new}


def run(options: argparse.Namespace) -> None:
    """Pre-train, choose, fine-tune."""
    preset = with_changes(PRESETS[options.preset], options)
    commands = {}
    for family in FAMILIES:
        for rate in preset.pretraining_rates[family]:
            folder = options.output / f"mlm-{family}-{rate:g}"
            commands[folder] = pretraining_command(preset, family, rate, folder, options)
    run_together(commands, options.jobs, options.gpus)

    first, *others = options.seeds
    all_choices = {
        family: [
            (rate, change)
            for change in ("", *(change for name, change in options.finetuning_config if name == family))
            for rate in preset.finetuning_rates[family]
        ]
        for family in FAMILIES
    }
    checkpoints = {family: found for family in FAMILIES if (found := best_pretraining(options.output, family))}

    def fine_tuning(start: str, seed: int) -> dict[Path, list[Any]]:
        """The runs of one start and seed: every choice with the first seed, the best one with another."""
        found = {}
        for data in options.sets if start in options.starts else ():
            for family, checkpoint in checkpoints.items():
                best = best_choice(options.output, data, family, start, first)
                choices = all_choices[family] if seed == first else ([] if best is None else [best])
                for rate, change in choices:
                    name = f"{_name_of(data)}-{family}-{start}-{rate:g}{f'-{change}' if change else ''}-seed{seed}"
                    folder = options.output / name
                    words = _start_words(preset, family, checkpoint)[start]
                    found[folder] = finetuning_command(preset, data, (rate, change), seed, words, folder, options)
        return found

    run_together(fine_tuning("pretrained", first), options.jobs, options.gpus)
    more = {folder: words for seed in others for folder, words in fine_tuning("pretrained", seed).items()}
    # What was pre-trained first: if time runs out, the comparison is there.
    run_together(more | fine_tuning("new", first), options.jobs, options.gpus)
    more = {folder: words for seed in others for folder, words in fine_tuning("new", seed).items()}
    run_together(more, options.jobs, options.gpus)
    table(options)


def with_changes(preset: Preset, options: argparse.Namespace) -> Preset:
    """The preset with the steps and rates that the command line names."""
    changes: dict[str, Any] = {}
    for stage in ("pretraining", "finetuning"):
        if steps := getattr(options, f"{stage}_steps"):
            changes[stage] = getattr(preset, stage) | {"steps": steps}
        changes[f"{stage}_rates"] = getattr(preset, f"{stage}_rates") | dict(getattr(options, f"{stage}_rates"))
    return replace(preset, **changes)


def of_family(word: str) -> tuple[str, str]:
    """danet=... of the command line."""
    family, _, rest = word.partition("=")
    if family not in FAMILIES:
        raise argparse.ArgumentTypeError(f"{word!r} does not begin with one of {', '.join(FAMILIES)} and =")
    return family, rest


def family_rates(word: str) -> tuple[str, tuple[float, ...]]:
    """danet=1e-3,3e-3 of the command line."""
    family, rates = of_family(word)
    return family, tuple(float(rate) for rate in rates.split(","))


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """What the tables need, from the runs' reports into a small file to keep; from that file where there are no reports."""
    file = options.output / "encoder-tasks.json"
    pretraining = [
        {
            key: each[key]
            for key in ("family", "parameters", "steps", "training_tokens", "training_seconds", "validation", "test")
        }
        | {"learning_rate": each["options"]["learning_rate"]}
        for each in reports("mlm-*", options.output)
    ]
    if not pretraining:
        return json.loads(file.read_text())
    finetuning = [
        {key: each[key] for key in ("family", "parameters", "steps", "training_seconds", "validation", "test")}
        | {key: each["options"][key] for key in ("learning_rate", "seed")}
        | {"change": _change(each["options"])}
        | {"set": Path(each["options"]["output"]).name.partition(f"-{each['family']}-")[0]}
        | {"start": "pretrained" if each["options"]["from_checkpoint"] else "new"}
        for each in reports("*-seed*", options.output)
    ]
    newest = max(folder.stat().st_mtime for folder in options.output.glob(f"*/{REPORT}"))
    machine = reports("mlm-*", options.output)[0]["machine"]
    machine |= {"date": time.strftime("%Y-%m-%d", time.gmtime(newest))}
    found = {"preset": options.preset, "machine": machine, "pretraining": pretraining, "finetuning": finetuning}
    write(file, found)
    return found


def table(options: argparse.Namespace) -> None:
    """Both tables in Markdown."""
    found = collect(options)
    print("| masked words | parameters | rate | steps | tokens | validation loss | test loss | test: words guessed |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for each in found["pretraining"]:
        print(
            f"| {each['family']} | {each['parameters']:,} | {each['learning_rate']:g} | {each['steps']:,} "
            f"| {each['training_tokens'] / 1e6:.1f}M | {each['validation']['loss']:.3f} | {each['test']['loss']:.3f} "
            f"| {100 * each['test']['accuracy']:.1f}% |"
        )
    print(
        "\n| set | family | start | rate | seeds | test accuracy | macro F1 | validation accuracy at each rate, first seed |"
    )
    print("|---|---|---|---:|---:|---|---|---|")
    for names, (choice, runs, tried) in chosen(found["finetuning"]).items():
        cells = []
        for metric in ("accuracy", "macro_f1"):
            values = [100 * each["test"][metric] for each in runs]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        cells.append(", ".join(f"{_words(each)}: {100 * tried[each]:.1f}" for each in sorted(tried)))
        print(f"| {' | '.join(names)} | {_words(choice)} | {len(runs)} | {' | '.join(cells)} |")


def _words(choice: Choice) -> str:
    """0.001, or 0.001 with pooler=max."""
    rate, change = choice
    return f"{rate:g} with {change}" if change else f"{rate:g}"


def chosen(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], tuple[Choice, list[dict], dict[Choice, float]]]:
    """(set, family, start) -> the choice, its runs, and the validation accuracy of the first seed at each choice."""
    groups: dict[tuple[str, str, str], dict[Choice, list[dict]]] = {}
    for each in runs:
        choices = groups.setdefault((each["set"], each["family"], each["start"]), {})
        choices.setdefault((each["learning_rate"], each.get("change", "")), []).append(each)
    found = {}
    for names, choices in groups.items():
        first = min(run["seed"] for of_choice in choices.values() for run in of_choice)
        tried = {
            choice: run["validation"]["accuracy"]
            for choice, of_choice in choices.items()
            for run in of_choice
            if run["seed"] == first
        }
        best = max(tried, key=tried.__getitem__)
        found[names] = best, choices[best], tried
    return found


_OUTPUT = option("--output", Path("outputs/encoders"))
_PRESET = option("--preset", "small", choices=PRESETS)
_RATES = {"type": family_rates, "nargs": "+", "default": [], "metavar": "FAMILY=RATE,RATE"}
RECIPE = Recipe(
    reproduces="DANet paper, GLUE: DANet 86.4 against BERT 85.2",
    results=("encoder-tasks/encoder-tasks.json", "encoder-tasks/400-steps/encoder-tasks.json"),
    stages={
        run: [
            _OUTPUT,
            _PRESET,
            option(
                "--sets",
                ["r8", "spam-assassin"],
                "as `train --data` names them, or folders with train, validation and test.jsonl; none: masked words alone",
                nargs="*",
            ),
            option("--text", help="files for pre-training instead of the speeches", nargs="+", default=[]),
            option("--seeds", [0, 1, 2]),
            option("--jobs", max(1, (os.cpu_count() or 1) // 4), "runs at once"),
            option("--gpus", help="devices to spread the runs over, as in 0 1", nargs="+", default=[]),
            option("--pretraining-steps", help="instead of the preset's", type=int),
            option("--finetuning-steps", help="instead of the preset's", type=int),
            option("--pretraining-rates", help="instead of the preset's", **_RATES),
            option("--finetuning-rates", help="instead of the preset's", **_RATES),
            option(
                "--finetuning-config",
                help="changes of a family's model that fine-tuning may choose, at every rate beside the unchanged one",
                type=of_family,
                nargs="+",
                default=[],
                metavar="FAMILY=KEY=VALUE",
            ),
            option("--starts", list(STARTS), "of fine-tuning", choices=STARTS),
            option("--threads", help="CPU threads of a run", type=int),
            option("--cpu", False, "stay on the CPU, in float32"),
        ],
        table: [_OUTPUT, _PRESET],
    },
)
