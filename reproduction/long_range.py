"""Long sequences in the manner of Long Range Arena: DANet with its published recipes against a rotary Transformer of its size.

    python -m reproduction long-range run --task listops --models danet transformer --steps 4000 --output outputs/long-range
    python -m reproduction long-range run --task fashion --fashion-folder /usr/share/datasets/fashion-mnist
    python -m reproduction long-range run --task digits --steps 300        two cores, half a minute a model
    python -m reproduction long-range table

Tasks: listops (500 to 2000 tokens), listops-short, fashion (784 pixels), digits (64 pixels). DANet is the preset `lra-listops` or
`lra-image`; the Transformer is ModernBERT's code with full attention in every layer. Both see the same batches in the same order.
Every run (task, model, seed) writes its own file.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.harness import machine
from hf_linear_attn import DanetConfig, DanetForSequenceClassification

from . import long_range_tasks as tasks
from .recipe import Recipe, option, results, write
from .training import Hyperparameters, autocast, default_device, fit

MODELS = ("danet", "transformer")


# Published: batch, rate, decay and dropout of each task, both betas 0.9, epsilon 1e-16, no clipping.
COMMON = Hyperparameters(beta2=0.9, epsilon=1e-16, clip=None, warmup=0.05, max_steps=4000, evaluations=10)
PUBLISHED = {
    "listops": replace(COMMON, batch_size=128, learning_rate=1e-3, weight_decay=0.1, dropout=0.1),
    "fashion": replace(COMMON, batch_size=100, learning_rate=1e-2, weight_decay=0.1, dropout=0.05),
    "listops-short": replace(COMMON, batch_size=32, learning_rate=2e-3, weight_decay=0.01, max_steps=600),
    "digits": replace(COMMON, batch_size=32, learning_rate=3e-3, weight_decay=0.01, max_steps=300),
}
# The usual values of Transformers on these tasks; at DANet's rates and without clipping they do not train.
TRANSFORMER = {"learning_rate": 5e-4, "beta2": 0.98, "epsilon": 1e-8, "clip": 1.0}
SIZES = {
    "listops": {"train": 96_000, "validation": 2_000, "test": 2_000},
    "listops-short": {"train": 10_000, "validation": 500, "test": 1_000},
}
# Transformer of DANet's number of parameters: layers, width of the gated feed-forward layer.
LIKE_DANET = {"listops": (6, 640), "fashion": (6, 320), "listops-short": (3, 80), "digits": (3, 80)}
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def build(
    name: str, task: str, recipe: Hyperparameters, length: int, changes: dict[str, Any] | None = None
) -> torch.nn.Module:
    """A classifier of ten classes with new weights. length: of the longest row. changes: fields of DANet's config."""
    preset = "lra-listops" if task.startswith("listops") else "lra-image"
    config = {"num_labels": 10, "hidden_dropout_prob": recipe.dropout, "attention_dropout": recipe.dropout}
    if task in ("listops-short", "digits"):
        # Windows of a short row, and the default size of the weights: the published one is for hundreds of channels.
        config |= SMALL | {"window_size": 8, "initializer_range": 0.1}
    danet = DanetConfig.preset(preset, **(config | (changes or {})))
    if name == "danet":
        return DanetForSequenceClassification(danet)
    layers, width = LIKE_DANET[task]
    modern = transformers.ModernBertConfig(
        vocab_size=danet.vocab_size,
        hidden_size=danet.hidden_size,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=danet.num_attention_heads,
        max_position_embeddings=max(length, 8),
        layer_types=["full_attention"] * layers,
        attention_dropout=0.0,  # dropped scores would rule out the fast kernels
        mlp_dropout=recipe.dropout,
        embedding_dropout=recipe.dropout,
        classifier_dropout=recipe.dropout,
        classifier_pooling="cls" if danet.pooler == "first" else "mean",
        pad_token_id=0 if task.startswith("listops") else danet.vocab_size - 1,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
        num_labels=10,
    )
    return transformers.ModernBertForSequenceClassification(modern)


class Rows:
    """A split on the device; batches of rows of like length, cut to the longest of them."""

    def __init__(self, split: tasks.Split, device: str):
        self.ids = torch.from_numpy(np.ascontiguousarray(split.ids)).to(device)
        self.lengths = torch.from_numpy(split.lengths).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.sizes = split.lengths
        self.padded = bool((split.lengths < split.ids.shape[1]).any())

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Model inputs of these rows; no mask where no row of the task is ever padded."""
        index = torch.from_numpy(rows).to(self.ids.device)
        if not self.padded:
            return {"input_ids": self.ids[index].long(), "labels": self.labels[index]}
        longest = min(self.ids.shape[1], -(-int(self.sizes[rows].max()) // 64) * 64)
        lengths = self.lengths[index]
        mask = torch.arange(longest, device=index.device) < lengths[:, None]
        return {
            "input_ids": self.ids[index, :longest].long(),
            "attention_mask": mask.long(),
            "labels": self.labels[index],
        }

    def epoch(self, batch_size: int, rng: np.random.Generator):
        """Batches of one pass in random order; rows of a batch are neighbours in length among fifty batches' rows."""
        order = rng.permutation(len(self.sizes))
        batches = []
        for start in range(0, len(order), 50 * batch_size):
            pool = order[start : start + 50 * batch_size]
            pool = pool[np.argsort(self.sizes[pool], kind="stable")] if self.padded else pool
            batches += [pool[i : i + batch_size] for i in range(0, len(pool) - batch_size + 1, batch_size)]
        for i in rng.permutation(len(batches)):
            yield self.batch(batches[i])

    def epochs(self, batch_size: int, seed: int):
        """Pass after pass, without end."""
        rng = np.random.default_rng(seed)
        while True:
            yield from self.epoch(batch_size, rng)

    def in_order(self, batch_size: int):
        """Every row once, by length."""
        order = np.argsort(self.sizes, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])


def learn(model, splits: dict[str, tasks.Split], plan: Hyperparameters, seed: int, device: str) -> dict[str, Any]:
    """Train and evaluate. Returns accuracies, curve and times."""
    rows = {name: Rows(split, device) for name, split in splits.items()}
    model = model.to(device)
    found = fit(
        model, rows["train"].epochs(plan.batch_size, seed), plan, plan.max_steps, seed, device,
        lambda: {"validation": accuracy(model, rows["validation"], plan, device)},
    )  # fmt: skip
    samples = found["steps"] * plan.batch_size
    return found | {
        "recipe": asdict(plan),
        "samples": samples,
        "epochs": samples / len(rows["train"].sizes),
        "validation": found["curve"][-1]["validation"],
        "test": accuracy(model, rows["test"], plan, device),
        "test_rows": len(rows["test"].sizes),
        "training_rows": len(rows["train"].sizes),
    }


@torch.no_grad()
def accuracy(model, rows: Rows, plan: Hyperparameters, device: str) -> float:
    """Share of rows whose class is named right."""
    model.eval()
    right = 0
    for batch in rows.in_order(plan.batch_size):
        labels = batch.pop("labels")
        with autocast(plan, device):
            right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return right / len(rows.sizes)


def splits_of(options: argparse.Namespace) -> dict[str, tasks.Split]:
    """Rows of the task: from the prepared file, else made or read now."""
    if options.data is not None and options.data.exists():
        return tasks.load(options.data)
    if options.task == "digits":
        return tasks.digits()
    if options.task == "fashion":
        rows = {"train": options.train_rows or 55_000, "validation": 5_000, "test": 10_000}
        return tasks.fashion_mnist(options.fashion_folder, rows)
    grammar = tasks.SHORT_GRAMMAR if options.task == "listops-short" else tasks.Grammar()
    sizes = SIZES[options.task] | ({"train": options.train_rows} if options.train_rows else {})
    return tasks.listops(sizes, grammar, processes=options.processes)


def run(options: argparse.Namespace) -> None:
    """Train each model with each seed, one after the other."""
    torch.set_num_threads(options.threads)
    device, splits = default_device(options.device), splits_of(options)
    print(f"{options.task}: {', '.join(f'{s} {len(each.lengths):,}' for s, each in splits.items())} rows", flush=True)
    for seed in options.seeds:
        for name in options.models:
            file = options.output / f"{options.task}-{name}-seed{seed}.json"
            if file.exists():
                print(f"{file} is there already", flush=True)
                continue
            plan = plan_of(options, name, device)
            torch.manual_seed(seed)
            model = build(name, options.task, plan, max(int(s.lengths.max()) for s in splits.values()))
            parameters = sum(p.numel() for p in model.parameters())
            facts = {"task": options.task, "model": name, "seed": seed, "parameters": parameters, "machine": machine()}
            print(f"{options.task}, {name}, seed {seed}, {parameters:,} parameters, on {device}", flush=True)
            result = learn(model, splits, plan, seed, device)
            write(file, facts | result)
            print(f"{name}, seed {seed}: test accuracy {result['test']:.4f} after {result['steps']} steps", flush=True)


def plan_of(options: argparse.Namespace, model: str, device: str) -> Hyperparameters:
    """The published values with what the model needs and the user asks."""
    plan = PUBLISHED[options.task]
    if model == "transformer":
        plan = replace(plan, **TRANSFORMER)
    asked = {"max_steps": options.steps, "seconds": options.seconds, "learning_rate": options.learning_rate}
    asked["precision"] = "float32" if device == "cpu" else None
    return replace(plan, **{name: value for name, value in asked.items() if value is not None})


PUBLISHED_ACCURACY = {"listops": {"danet": "50.50", "transformer": "47.90"}}


def table(options: argparse.Namespace) -> None:
    """One line for each task and model: test accuracy of each seed and what it took."""
    found: dict[tuple[str, str], list[dict]] = {}
    for result in results(options.output, "*-seed*.json"):
        found.setdefault((result["task"], result["model"]), []).append(result)
    print(
        "| task | model | parameters | test accuracy (each seed) | steps | passes over the data | seconds | published |"
    )
    print("|---|---|---:|---|---:|---:|---:|---:|")
    for (task, name), runs in found.items():
        each = ", ".join(f"{100 * run['test']:.2f}" for run in runs)
        first = runs[0]
        print(
            f"| {task} | {name} | {first['parameters']:,} | {each} | {first['steps']:,} | {first['epochs']:.1f} "
            f"| {first['training_seconds']:.0f} | {PUBLISHED_ACCURACY.get(task, {}).get(name, '-')} |"
        )


def prepare(options: argparse.Namespace) -> None:
    """Write the rows of the task into one file."""
    splits = splits_of(options)
    tasks.save(splits, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.1f} MiB")


_FOLDER = Path("outputs/long-range")
_TASK = [
    option("--task", choices=PUBLISHED, required=True),
    option("--fashion-folder", tasks.FASHION_FOLDER, "folder with the .gz files"),
    option("--train-rows", help="fewer training rows than 96,000 expressions or 55,000 pictures", type=int),
    option("--processes", 2, "processes that make expressions"),
    option("--data", help="file that `prepare` wrote", type=Path),
]
RECIPE = Recipe(
    reproduces="DANet paper, Long Range Arena: ListOps 50.50 against 47.90, pixels 72.55 against 75.04 of a rotary Transformer",
    results=("long-range/*.json",),
    stages={
        prepare: [option("--output", _FOLDER / "task.npz"), *_TASK],
        run: [
            option("--output", _FOLDER),
            *_TASK,
            option("--models", list(MODELS), choices=MODELS),
            option("--seeds", [0]),
            option("--steps", help="optimizer steps (default: the published ones)", type=int),
            option("--seconds", help="training time instead: the schedule follows the clock", type=float),
            option("--learning-rate", help="another peak rate for all models", type=float),
            option("--threads", 2),
            option("--device", help="cpu or cuda (default: cuda where there is one)"),
        ],
        table: [option("--output", _FOLDER)],
    },
)
