"""Language models of ten million parameters on one budget: GPT-2, a Llama-style Transformer, LEAP (windowed, all-global),
Fastformer and causal DANet, on the speeches (BPE of 8192), on docs8 and on a slice of it (bytes). The recipe `corpora` makes
the texts.

    python -m reproduction language-models sweep --data outputs/speeches.npz --output outputs/language-models --jobs 18
    python -m reproduction language-models speed --data outputs/speeches.npz --output outputs/language-models
    python -m reproduction language-models collect --output outputs/language-models --json docs/data/language-models.json
    python -m reproduction language-models table --json docs/data/language-models.json
    python -m reproduction language-models picture --json docs/data/language-models.json --folder docs/images

Tokens, their order, optimiser, schedule and number of parameters are the same for all; nothing has dropout. Each model gets
three learning rates with the first seed, one more (a factor of three further) as long as the best is the largest or smallest,
and the other seeds at the rate with the lowest validation loss. Each run writes its own file, which is not computed again:
a sweep that is stopped goes on where it was. With --jobs, runs share the device, and their seconds say little; `speed` measures
the models alternately. `--tiny` makes everything small enough for a CPU.
"""

import argparse
import json
import re
from collections import defaultdict
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine

from . import language_model_report
from .corpora import load_text
from .language_model_contenders import MODELS, VARIANTS, Setting, build
from .language_model_report import best_rate
from .language_model_speed import measure_models
from .recipe import Recipe, command, option, results, run_together, write
from .training import Hyperparameters, default_device, train

RATES = (5e-4, 1.5e-3, 4.5e-3)
BUDGET = Hyperparameters(length=1024, batch_size=8, schedule="cosine", warmup=0.05, weight_decay=0.1, evaluations=12)
SETTINGS = {
    "speeches": Setting(320, 6, 5, replace(BUDGET, epochs=4)),
    "docs8": Setting(384, 6, 6, replace(BUDGET, epochs=1, batch_size=32)),
    "docs8-slice": Setting(384, 6, 6, replace(BUDGET, epochs=1)),
}
TINY = Setting(32, 3, 1, replace(BUDGET, length=64, batch_size=4, epochs=1, max_steps=12, evaluations=3))


@dataclass(frozen=True)
class Run:
    """One training: which model, at which learning rate, from which seed."""

    model: str
    rate: float
    seed: int

    def file(self, folder: Path, corpus: str) -> Path:
        """Where its result lies."""
        return folder / f"{corpus}-{self.model}-rate{self.rate:g}-seed{self.seed}.json"


def wanted(model: str, done: list[dict], rates: tuple[float, ...], seeds: list[int], extra_rates: int) -> list[Run]:
    """What is still to be trained for a model, given its results: first the rates, then a rate beyond an edge, then the seeds."""
    tried = {result["rate"] for result in done if result["seed"] == seeds[0]}
    if missing := [Run(model, rate, seeds[0]) for rate in rates if rate not in tried]:
        return missing
    best = best_rate(done, seeds[0])
    if len(tried) < len(rates) + extra_rates and best in (min(tried), max(tried)):
        beyond = best * 3 if best == max(tried) else best / 3
        return [Run(model, float(f"{beyond:.3g}"), seeds[0])]
    seen = {result["seed"] for result in done if result["rate"] == best}
    return [Run(model, best, seed) for seed in seeds if seed not in seen]


def sweep(options: argparse.Namespace) -> None:
    """Train all that is wanted, `--jobs` at once: the rates of every model, then what their results ask for."""
    if options.one:
        return train_one(options, Run(options.models[0], options.one[0], int(options.one[1])))
    corpus, tried = label_of(options), set()
    while True:
        done = read_folder(options.output, corpus)
        asked = (options.rates, options.seeds, options.extra_rates)
        runs = {run for name in options.models for run in wanted(name, done[name], *asked)} - tried
        if not runs:
            break
        tried |= runs  # what failed once is left
        commands = {
            run.file(options.output, corpus): [
                *command("language-models", options, models=[run.model]), "--one", f"{run.rate!r}", run.seed
            ]
            for run in sorted(runs, key=astuple)
        }  # fmt: skip
        run_together(commands, options.jobs)


def train_one(options: argparse.Namespace, run: Run) -> None:
    """One run; its result goes to its own file."""
    torch.set_num_threads(options.threads)
    device, corpus, setting = device_of(options), label_of(options), setting_of(options)
    plan = replace(setting.recipe, learning_rate=run.rate)
    text, facts = load_text(options.data)
    torch.manual_seed(run.seed)
    model = build(run.model, setting, text.vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{run}, {parameters:,} parameters, on {device}", flush=True)
    result = train(model, text, plan, run.seed, device) | asdict(run)
    result |= {
        "corpus": corpus,
        "text": facts,
        "parameters": parameters,
        "setting": asdict(replace(setting, recipe=plan)),
        "config": model.config.to_diff_dict(),
        "runs_at_once": options.jobs,
        "machine": machine(),
    }
    write(run.file(options.output, corpus), result)


def speed(options: argparse.Namespace) -> None:
    """Training and decoding speed, memory and state of each model, measured in turn; several rounds, medians in the table."""
    setting, device, corpus = setting_of(options), device_of(options), label_of(options)
    text, _ = load_text(options.data)
    file = options.output / f"{corpus}-speed.json"
    facts = {"machine": machine(), "setting": asdict(setting), "rounds": options.rounds}
    for models in measure_models(options.models, setting, text.vocab_size, device, options.rounds):
        write(file, facts | {"models": models})
    print(file)


def collect(options: argparse.Namespace) -> None:
    """All results of a folder into one file, which tables and pictures are made from."""
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.keep else {}
    labels = {json.loads(file.read_text())["corpus"] for file in options.output.glob("*-seed*.json")}
    for corpus in sorted(labels, key=lambda name: (not name.startswith("speeches"), name)):
        runs = {_key(run): run for run in found.get(corpus, {}).get("runs", [])}
        runs |= {_key(run): run for each in read_folder(options.output, corpus).values() for run in each}
        measured = options.output / f"{corpus}-speed.json"
        costs = json.loads(measured.read_text()) if measured.exists() else found.get(corpus, {}).get("speed")
        found[corpus] = {**found.get(corpus, {}), "runs": [runs[key] for key in sorted(runs)], "speed": costs}
    for corpus, cut in unfinished(options.output).items():
        done = set(map(_key, found.get(corpus, {}).get("runs", [])))
        if cut := [run for run in cut if _key(run) not in done]:
            found.setdefault(corpus, {})["unfinished"] = cut
    if not found:
        raise SystemExit(f"{options.output} holds no results: run `sweep` first, or the smaller `sweep --tiny`")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(
        f"{options.json}: " + ", ".join(f"{name} {len(next(iter(each.values())))} runs" for name, each in found.items())
    )


def _key(run: dict) -> tuple[str, float, int]:
    return run["model"], run["rate"], run["seed"]


def unfinished(folder: Path) -> dict[str, list[dict]]:
    """Curves of runs that were stopped before they wrote a result, from their logs, by corpus."""
    cut: dict[str, list[dict]] = defaultdict(list)
    names = "|".join(sorted([*MODELS, *VARIANTS], key=len, reverse=True))
    for log in sorted(folder.glob("*-seed*.log")):
        named = re.fullmatch(rf"(.+?)-({names})-rate(.+)-seed(\d+)", log.stem)
        points = re.findall(r"step (\d+)/(\d+): training (\S+), validation (\S+)", log.read_text())
        if named is None or not points or log.with_suffix(".json").exists():
            continue
        curve = [{"step": int(step), "training": float(a), "validation": float(b)} for step, _, a, b in points]
        run = {"model": named[2], "rate": float(named[3]), "seed": int(named[4]), "steps": int(points[0][1])}
        cut[named[1]].append(run | {"curve": curve})
    return cut


def read_folder(folder: Path, corpus: str) -> dict[str, list[dict]]:
    """Results by model."""
    found: dict[str, list[dict]] = defaultdict(list)
    for result in results(folder, f"{corpus}-*-seed*.json"):
        if result["corpus"] == corpus:
            found[result["model"]].append(result)
    return found


def corpus_of(data: Path) -> str:
    """Name of the corpus, from the facts beside its file. SystemExit with the way out where it is missing."""
    facts = data.with_suffix(".json")
    if not (data.exists() and facts.exists()):
        raise SystemExit(
            f"there is no {data} with its {facts.name}: make it with `python -m reproduction corpora speeches`"
        )
    return json.loads(facts.read_text())["corpus"]


def label_of(options: argparse.Namespace) -> str:
    """The corpus, with the batch size where it is not the setting's own."""
    corpus = corpus_of(options.data)
    return f"{corpus}-batch{options.batch_size}" if options.batch_size else corpus


def setting_of(options: argparse.Namespace) -> Setting:
    """The corpus's setting, or the tiny one; with the batch size asked for."""
    setting = TINY if options.tiny else SETTINGS[corpus_of(options.data)]
    recipe = replace(setting.recipe, compile=options.compile)
    if options.batch_size:
        recipe = replace(recipe, batch_size=options.batch_size)
    return replace(setting, recipe=recipe)


def device_of(options: argparse.Namespace) -> str:
    """The device asked for, else CUDA. Without a GPU only the tiny setting makes sense."""
    device = default_device(options.device)
    if device == "cpu" and not options.tiny:
        raise SystemExit(
            "ten million parameters need a GPU (days on a CPU): --tiny tries everything out, --device cpu insists"
        )
    return device


def _collected(options: argparse.Namespace) -> dict[str, Any]:
    if not options.json.exists():
        raise SystemExit(f"there is no {options.json}: `collect` makes it from the results of a sweep")
    return json.loads(options.json.read_text())


def table(options: argparse.Namespace) -> None:
    """Print the tables."""
    print(language_model_report.tables(_collected(options), options.corpus, options.parts))


def summary(options: argparse.Namespace) -> None:
    """Print one small table."""
    print(language_model_report.summary(_collected(options)))


def picture(options: argparse.Namespace) -> None:
    """Draw the learning curves."""
    print("\n".join(map(str, language_model_report.pictures(_collected(options), options.folder))))


_OUTPUT = option("--output", Path("outputs/language-models"), "folder of the results")
_JSON = option("--json", Path("docs/data/language-models.json"))
_TRAINING = [
    _OUTPUT,
    option("--data", help="file written by `corpora`", type=Path, required=True),
    option("--models", list(MODELS), choices=[*MODELS, *VARIANTS]),
    option("--device", help="cpu or cuda (default: cuda)"),
    option("--tiny", False, "a small model and twelve steps, to try it out"),
    option("--batch-size", help="another one: smaller batches are more steps on the same tokens", type=int),
    option("--compile", False, "training steps through torch.compile"),
]
RECIPE = Recipe(
    reproduces="LEAP below GPT-2 (54.2 against 62.9), causal DANet at most a Llama (8.79 against 8.88): at one budget of ours",
    results=("language-models.json",),
    stages={
        sweep: [
            *_TRAINING,
            option("--jobs", 1, "runs at once"),
            option("--threads", 1, "CPU threads of a run"),
            option("--rates", list(RATES), "learning rates"),
            option("--extra-rates", 2, "more of them beyond the edges"),
            option("--seeds", [0, 1, 2]),
            option("--one", help=argparse.SUPPRESS, nargs=2, type=float, metavar=("RATE", "SEED")),
        ],
        speed: [*_TRAINING, option("--rounds", 5)],
        collect: [_OUTPUT, _JSON, option("--keep", False, "keep what the file has and the folder has not")],
        table: [
            _JSON,
            option("--corpus", help="of this corpus alone"),
            option("--parts", help="facts, models, claims, costs, rates, variants or cut alone", nargs="+"),
        ],
        summary: [_JSON],
        picture: [_JSON, option("--folder", Path("docs/images"))],
    },
)
