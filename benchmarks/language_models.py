"""Language models of ten million parameters on one budget: GPT-2, a Llama-style Transformer, LEAP (windowed, all-global),
Fastformer and causal DANet, on the speeches (BPE of 8192), on docs8 and on a slice of it (bytes). `benchmarks.corpora` makes the
texts.

    python -m benchmarks.language_models sweep --data outputs/speeches.npz --output outputs/language-models --jobs 18
    python -m benchmarks.language_models speed --data outputs/speeches.npz --output outputs/language-models
    python -m benchmarks.language_models collect --output outputs/language-models --json docs/data/language-models.json
    python -m benchmarks.language_models table --json docs/data/language-models.json
    python -m benchmarks.language_models picture --json docs/data/language-models.json --folder docs/images

Tokens, their order, optimiser, schedule and number of parameters are the same for all; nothing has dropout. Each model gets
three learning rates with the first seed, one more (a factor of three further) as long as the best is the largest or smallest,
and the other seeds at the rate with the lowest validation loss. Each run writes its own file, which is not computed again:
a sweep that is stopped goes on where it was. With --jobs, runs share the device, and their seconds say little; `speed` measures
the models alternately. `--tiny` makes everything small enough for a CPU.
"""

import argparse
import json
import math
import multiprocessing
import platform
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from .language_model_contenders import MODELS, VARIANTS, Setting, build
from .light_training import Recipe

RATES = (5e-4, 1.5e-3, 4.5e-3)
RECIPE = Recipe(length=1024, batch_size=8, schedule="cosine", warmup=0.05, weight_decay=0.1, evaluations=12)
SETTINGS = {
    "speeches": Setting(320, 6, 5, replace(RECIPE, epochs=4)),
    "docs8": Setting(384, 6, 6, replace(RECIPE, epochs=1, batch_size=32)),
    "docs8-slice": Setting(384, 6, 6, replace(RECIPE, epochs=1)),
}
TINY = Setting(32, 3, 1, replace(RECIPE, length=64, batch_size=4, epochs=1, max_steps=12, evaluations=3))


@dataclass(frozen=True)
class Run:
    """One training: which model, at which learning rate, from which seed."""

    model: str
    rate: float
    seed: int

    def file(self, folder: Path, corpus: str) -> Path:
        """Where its result lies."""
        return folder / f"{corpus}-{self.model}-rate{self.rate:g}-seed{self.seed}.json"


def wanted(model: str, results: list[dict], rates: tuple[float, ...], seeds: list[int], extra_rates: int) -> list[Run]:
    """What is still to be trained for a model, given its results: first the rates, then a rate beyond an edge, then the seeds."""
    tried = {result["rate"] for result in results if result["seed"] == seeds[0]}
    if missing := [Run(model, rate, seeds[0]) for rate in rates if rate not in tried]:
        return missing
    best = best_rate(results, seeds[0])
    if len(tried) < len(rates) + extra_rates and best in (min(tried), max(tried)):
        beyond = best * 3 if best == max(tried) else best / 3
        return [Run(model, float(f"{beyond:.3g}"), seeds[0])]
    done = {result["seed"] for result in results if result["rate"] == best}
    return [Run(model, best, seed) for seed in seeds if seed not in done]


def best_rate(results: list[dict], seed: int) -> float:
    """The learning rate with the lowest validation loss; a run that diverged is the worst."""

    def loss(result: dict) -> float:
        value = result["validation"]["loss"]
        return value if math.isfinite(value) else math.inf

    return min((result for result in results if result["seed"] == seed), key=loss)["rate"]


def sweep(options: argparse.Namespace) -> None:
    """Train all that is wanted, `--jobs` at once; after `--minutes` nothing new is started."""
    options.output.mkdir(parents=True, exist_ok=True)
    corpus = label_of(options)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    deadline = time.monotonic() + 60 * options.minutes
    running: dict[Any, tuple[Run, Any]] = {}
    failed: set[Run] = set()
    while True:
        results = read_folder(options.output, corpus)
        queue = [
            run
            for name in options.models
            for run in wanted(name, results[name], options.rates, options.seeds, options.extra_rates)
            if run not in failed and run not in {other for other, _ in running.values()}
        ]
        while queue and len(running) < options.jobs and time.monotonic() < deadline:
            run = queue.pop(0)
            process = context.Process(target=train_one, args=(options, run))
            process.start()
            running[process.sentinel] = (run, process)
        if not running:
            break
        for sentinel in wait(list(running)):
            run, process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                failed.add(run)
            print(f"{run}: {'failed, see its .log' if process.exitcode else 'done'}", flush=True)
    print(
        f"{sum(map(len, read_folder(options.output, corpus).values()))} runs done, {len(failed)} failed, "
        f"{len(queue)} left for want of time",
        flush=True,
    )


def train_one(options: argparse.Namespace, run: Run) -> None:
    """One run in a process of its own; its result goes to its own file, what it prints to a .log beside it."""
    import torch

    from .corpora import load_text
    from .light_training import train

    torch.set_num_threads(options.threads)
    device = device_of(options)
    corpus = label_of(options)
    file = run.file(options.output, corpus)
    with file.with_suffix(".log").open("w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        setting = setting_of(options)
        recipe = replace(setting.recipe, learning_rate=run.rate)
        text, facts = load_text(options.data)
        torch.manual_seed(run.seed)
        model = build(run.model, setting, text.vocab_size)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{run}, {parameters:,} parameters, on {device}")
        result = train(model, text, recipe, run.seed, device)
        result |= asdict(run) | {
            "corpus": corpus,
            "text": facts,
            "parameters": parameters,
            "setting": asdict(replace(setting, recipe=recipe)),
            "config": model.config.to_diff_dict(),
            "runs_at_once": options.jobs,
            "machine": machine(device),
        }
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1, default=str) + "\n")
        part.rename(file)


def speed(options: argparse.Namespace) -> None:
    """Training and decoding speed, memory and state of each model, measured in turn; several rounds, medians in the table."""
    from .corpora import load_text
    from .language_model_speed import measure_models

    options.output.mkdir(parents=True, exist_ok=True)
    setting, device, corpus = setting_of(options), device_of(options), label_of(options)
    text, _ = load_text(options.data)
    file = options.output / f"{corpus}-speed.json"
    facts = {"machine": machine(device), "setting": asdict(setting), "rounds": options.rounds}
    for models in measure_models(options.models, setting, text.vocab_size, device, options.rounds):
        file.write_text(json.dumps(facts | {"models": models}, indent=1) + "\n")
    print(file)


def collect(options: argparse.Namespace) -> None:
    """All results of a folder into one file, which tables and pictures are made from."""
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.keep else {}
    labels = {json.loads(file.read_text())["corpus"] for file in options.output.glob("*-seed*.json")}
    for corpus in sorted(labels, key=lambda name: (not name.startswith("speeches"), name)):
        runs = {_key(run): run for run in found.get(corpus, {}).get("runs", [])}
        runs |= {_key(run): run for results in read_folder(options.output, corpus).values() for run in results}
        measured = options.output / f"{corpus}-speed.json"
        speed = json.loads(measured.read_text()) if measured.exists() else found.get(corpus, {}).get("speed")
        found[corpus] = {**found.get(corpus, {}), "runs": [runs[key] for key in sorted(runs)], "speed": speed}
    for corpus, cut in unfinished(options.output).items():
        done = set(map(_key, found.get(corpus, {}).get("runs", [])))
        if cut := [run for run in cut if _key(run) not in done]:
            found.setdefault(corpus, {})["unfinished"] = cut
    if not found:
        raise SystemExit(
            f"{options.output} holds no results: run `sweep` first, or the smaller `sweep --tiny --jobs 1`"
        )
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
    results: dict[str, list[dict]] = defaultdict(list)
    for file in sorted(folder.glob(f"{corpus}-*-seed*.json")):
        result = json.loads(file.read_text())
        if result["corpus"] == corpus:
            results[result["model"]].append(result)
    return results


def corpus_of(data: Path) -> str:
    """Name of the corpus, from the facts beside its file. SystemExit with the way out where it is missing."""
    facts = data.with_suffix(".json")
    if not (data.exists() and facts.exists()):
        raise SystemExit(
            f"there is no {data} with its {facts.name}: make it with `python -m benchmarks.corpora speeches`"
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
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not options.tiny:
        raise SystemExit(
            "ten million parameters need a GPU (days on a CPU): --tiny tries everything out, --device cpu insists"
        )
    return device


def machine(device: str) -> dict[str, str]:
    """Device, versions and the day."""
    import torch
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def report(options: argparse.Namespace) -> None:
    """Tables or pictures from the collected results."""
    from . import language_model_report

    if not options.json.exists():
        raise SystemExit(f"there is no {options.json}: `collect` makes it from the results of a sweep")
    results = json.loads(options.json.read_text())
    if options.command == "summary":
        print(language_model_report.summary(results))
    elif options.command == "table":
        print(language_model_report.tables(results, options.corpus, options.parts))
    else:
        print("\n".join(map(str, language_model_report.pictures(results, options.folder))))


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    default_json = Path("docs/data/language-models.json")
    for name, about in {
        "sweep": "train",
        "speed": "measure speed and memory",
        "collect": "results into one file",
    }.items():
        command = commands.add_parser(name, help=about)
        command.add_argument(
            "--output", type=Path, default=Path("outputs/language-models"), help="folder of the results"
        )
        if name == "collect":
            command.add_argument("--json", type=Path, default=default_json)
            command.add_argument("--keep", action="store_true", help="keep what the file has and the folder has not")
            continue
        command.add_argument("--data", type=Path, required=True, help="file written by benchmarks.corpora")
        command.add_argument("--models", nargs="+", choices=[*MODELS, *VARIANTS], default=list(MODELS))
        command.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda)")
        command.add_argument("--tiny", action="store_true", help="a small model and twelve steps, to try it out")
        command.add_argument(
            "--batch-size", type=int, help="another one: smaller batches are more steps on the same tokens"
        )
        command.add_argument("--compile", action="store_true", help="training steps through torch.compile")
        command.add_argument("--rounds", type=int, default=5, help="of `speed`")
        command.add_argument("--jobs", type=int, default=1, help="runs at once")
        command.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
        command.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates")
        command.add_argument("--extra-rates", type=int, default=2, help="more of them beyond the edges")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--minutes", type=float, default=1e6, help="start nothing new after so long")
    for name, about in {
        "table": "print the tables",
        "summary": "print one small table",
        "picture": "draw the learning curves",
    }.items():
        command = commands.add_parser(name, help=about)
        command.add_argument("--json", type=Path, default=default_json)
        if name == "table":
            command.add_argument("--corpus", help="of this corpus alone")
            command.add_argument(
                "--parts", nargs="+", help="facts, models, claims, costs, rates, variants or cut alone"
            )
        elif name == "picture":
            command.add_argument("--folder", type=Path, default=Path("docs/images"))
    return parser.parse_args()


def main() -> None:
    """Run the sub-command."""
    options = arguments()
    {"sweep": sweep, "speed": speed, "collect": collect}.get(options.command, report)(options)


if __name__ == "__main__":
    main()
