"""Long sequences in the manner of Long Range Arena: DANet with its published recipes against a rotary Transformer of its size.

    python -m benchmarks.long_range run --task listops --models danet transformer --steps 4000 --output outputs/long-range
    python -m benchmarks.long_range run --task fashion --fashion-folder /usr/share/datasets/fashion-mnist
    python -m benchmarks.long_range run --task digits --steps 300        two cores, half a minute a model
    python -m benchmarks.long_range table

Tasks: listops (500 to 2000 tokens), listops-short, fashion (784 pixels), digits (64 pixels). DANet is the preset `lra-listops` or
`lra-image`; the Transformer is ModernBERT's code with full attention in every layer. Both see the same batches in the same order.
Every run (task, model, seed) writes its own file.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from . import long_range_tasks as tasks

MODELS = ("danet", "transformer")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on a task. After the warm-up the rate falls linearly to 0.

    seconds: where given, the schedule runs over that time instead of `steps`, whichever ends first.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float
    dropout: float
    beta1: float = 0.9
    beta2: float = 0.9
    epsilon: float = 1e-16
    clip: float | None = None
    warmup: float = 0.05
    steps: int = 4000
    seconds: float | None = None
    precision: str = "bfloat16"
    compile: bool = False


# Published: batch, rate, decay and dropout of each task, both betas 0.9, epsilon 1e-16, no clipping.
PUBLISHED = {
    "listops": Recipe(128, 1e-3, 0.1, 0.1),
    "fashion": Recipe(100, 1e-2, 0.1, 0.05),
    "listops-short": Recipe(32, 2e-3, 0.01, 0.0, steps=600),
    "digits": Recipe(32, 3e-3, 0.01, 0.0, steps=300),
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


def build(name: str, task: str, recipe: Recipe, length: int, changes: dict[str, Any] | None = None) -> torch.nn.Module:
    """A classifier of ten classes with new weights. length: of the longest row. changes: fields of DANet's config."""
    from hf_linear_attn import DanetConfig, DanetForSequenceClassification

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

    def in_order(self, batch_size: int):
        """Every row once, by length."""
        order = np.argsort(self.sizes, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])


def train(model, splits: dict[str, tasks.Split], recipe: Recipe, seed: int, device: str, report=None) -> dict[str, Any]:
    """Train and evaluate. report: called with the result so far after each evaluation. Returns accuracies, curve and times."""
    rows = {name: Rows(split, device) for name, split in splits.items()}
    model = model.to(device)
    if recipe.compile:
        model.compile(dynamic=rows["train"].padded)
        _compile_now(model, rows, recipe, device)
    optimizer = torch.optim.AdamW(
        _groups(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=True,
    )
    rng, step, seen, curve = np.random.default_rng(seed), 0, 0, []
    started, evaluating = time.perf_counter(), 0.0
    result: dict[str, Any] = {"recipe": asdict(recipe), "curve": curve}
    losses: list[torch.Tensor] = []
    next_evaluation, done = 0.1, False
    while not done:
        for batch in rows["train"].epoch(recipe.batch_size, rng):
            elapsed = time.perf_counter() - started - evaluating
            progress = max(step / recipe.steps, elapsed / recipe.seconds if recipe.seconds else 0.0)
            if progress >= next_evaluation or progress >= 1:
                before = time.perf_counter()
                curve.append(
                    {
                        "step": step,
                        "samples": seen,
                        "seconds": round(elapsed, 1),
                        "training_loss": torch.stack(losses).mean().item() if losses else None,
                        "validation": accuracy(model, rows["validation"], recipe, device),
                    }
                )
                losses.clear()
                next_evaluation = (math.floor(progress * 10) + 1) / 10
                evaluating += time.perf_counter() - before
                print(json.dumps(curve[-1]), flush=True)
                if report is not None:
                    report(result)
            if progress >= 1:
                done = True
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(progress, recipe.warmup)
            model.train()
            with _autocast(recipe, device):
                loss = model(**batch).loss
            loss.backward()
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if len(losses) < 200:
                losses.append(loss.detach())
            step += 1
            seen += len(batch["labels"])
            if step % 20 == 0 and device != "cpu":
                torch.cuda.synchronize()  # so that the clock of the schedule is right
    result |= {
        "steps": step,
        "samples": seen,
        "epochs": seen / len(rows["train"].sizes),
        "training_seconds": round(time.perf_counter() - started - evaluating, 1),
        "validation": curve[-1]["validation"],
        "test": accuracy(model, rows["test"], recipe, device),
        "test_rows": len(rows["test"].sizes),
        "training_rows": len(rows["train"].sizes),
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else None,
    }
    return result


def _compile_now(model, rows: dict[str, Rows], recipe: Recipe, device: str) -> None:
    """Run the shortest and the longest rows through training and evaluation, so that the clock does not measure the compiler."""
    started = time.perf_counter()
    for order in (1, -1):
        batch = rows["train"].batch(np.argsort(rows["train"].sizes, kind="stable")[::order][: recipe.batch_size])
        for training in (True, False):
            model.train(training)
            with _autocast(recipe, device), torch.set_grad_enabled(training):
                loss = model(**batch).loss
            if training:
                loss.backward()
    model.zero_grad(set_to_none=True)
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model, rows: Rows, recipe: Recipe, device: str) -> float:
    """Share of rows whose class is named right."""
    model.eval()
    right = 0
    for batch in rows.in_order(recipe.batch_size):
        labels = batch.pop("labels")
        with _autocast(recipe, device):
            right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return right / len(rows.sizes)


def _rate(progress: float, warmup: float) -> float:
    return min(progress / warmup + 1e-3, 1.0) if progress < warmup else max(0.0, (1 - progress) / (1 - warmup))


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _autocast(recipe: Recipe, device: str):
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16")


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
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    splits = splits_of(options)
    print(f"{options.task}: {', '.join(f'{s} {len(each.lengths):,}' for s, each in splits.items())} rows", flush=True)
    for seed in options.seeds:
        for name in options.models:
            file = options.output / f"{options.task}-{name}-seed{seed}.json"
            if file.exists():
                print(f"{file} is there already", flush=True)
                continue
            recipe = recipe_of(options, name, device)
            torch.manual_seed(seed)
            model = build(name, options.task, recipe, max(int(s.lengths.max()) for s in splits.values()))
            facts = {
                "task": options.task,
                "model": name,
                "seed": seed,
                "parameters": sum(p.numel() for p in model.parameters()),
                "machine": {
                    "device": torch.cuda.get_device_name() if device != "cpu" else platform.processor(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
            print(f"{options.task}, {name}, seed {seed}, {facts['parameters']:,} parameters, on {device}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".partial.json")

            def keep(so_far, unfinished=unfinished, facts=facts):
                unfinished.write_text(json.dumps(facts | so_far))

            result = train(model, splits, recipe, seed, device, keep)
            file.write_text(json.dumps(facts | result, indent=1) + "\n")
            unfinished.unlink(missing_ok=True)
            print(f"{name}, seed {seed}: test accuracy {result['test']:.4f} after {result['steps']} steps", flush=True)


def recipe_of(options: argparse.Namespace, model: str, device: str) -> Recipe:
    """The published recipe with what the model needs and the user asks."""
    recipe = PUBLISHED[options.task]
    if model == "transformer":
        recipe = replace(recipe, **TRANSFORMER)
    asked = {"steps": options.steps, "seconds": options.seconds, "learning_rate": options.learning_rate}
    asked |= {"compile": options.compile or None, "precision": "float32" if device == "cpu" else None}
    return replace(recipe, **{name: value for name, value in asked.items() if value is not None})


PUBLISHED_ACCURACY = {"listops": {"danet": "50.50", "transformer": "47.90"}}


def table(options: argparse.Namespace) -> None:
    """One line for each task and model: test accuracy of each seed and what it took."""
    found: dict[tuple[str, str], list[dict]] = {}
    for file in sorted(options.output.glob("*-seed*.json")):
        result = json.loads(file.read_text())
        if "test" in result:
            found.setdefault((result["task"], result["model"]), []).append(result)
    print(
        "| task | model | parameters | test accuracy (each seed) | steps | passes over the data | seconds | published |"
    )
    print("|---|---|---:|---|---:|---:|---:|---:|")
    for (task, name), results in found.items():
        each = ", ".join(f"{100 * result['test']:.2f}" for result in results)
        first = results[0]
        print(
            f"| {task} | {name} | {first['parameters']:,} | {each} | {first['steps']:,} | {first['epochs']:.1f} "
            f"| {first['training_seconds']:.0f} | {PUBLISHED_ACCURACY.get(task, {}).get(name, '-')} |"
        )


def prepare(options: argparse.Namespace) -> None:
    """Write the rows of the task into one file."""
    splits = splits_of(options)
    tasks.save(splits, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.1f} MiB")


def main(words: list[str] | None = None) -> None:
    """Run the sub-command."""
    options = arguments(words)
    {"prepare": prepare, "run": run, "table": table}[options.command](options)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run", "table"):
        command = commands.add_parser(name)
        folder = Path("outputs/long-range")
        command.add_argument("--output", type=Path, default=folder / "task.npz" if name == "prepare" else folder)
        if name == "table":
            continue
        command.add_argument("--task", choices=PUBLISHED, required=True)
        command.add_argument(
            "--fashion-folder", type=Path, default=tasks.FASHION_FOLDER, help="folder with the .gz files"
        )
        command.add_argument(
            "--train-rows", type=int, help="fewer training rows than 96,000 expressions or 55,000 pictures"
        )
        command.add_argument("--processes", type=int, default=2, help="processes that make expressions")
        command.add_argument("--data", type=Path, help="file that `prepare` wrote")
        if name == "run":
            command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
            command.add_argument("--seeds", nargs="+", type=int, default=[0])
            command.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
            command.add_argument("--seconds", type=float, help="training time instead: the schedule follows the clock")
            command.add_argument("--learning-rate", type=float, help="another peak rate for all models")
            command.add_argument("--threads", type=int, default=2)
            command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
            command.add_argument("--compile", action="store_true", help="torch.compile the models")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
