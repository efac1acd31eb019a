"""Train the LEAP of two million parameters that the package carries, so that `hf-linear-attn generate "My fellow citizens"` works
after an installation. Text: the presidents' speeches, which are in the public domain.

    python -m reproduction corpora speeches --vocab-size 4096 --output outputs/tiny/speeches.npz
    python -m model_cards.tiny_leap --data outputs/tiny/speeches.npz --output outputs/tiny/leap       (minutes on a GPU)
    python -m model_cards.tiny_leap --install outputs/tiny/leap                                        (into the package)

Rows are short, because a prompt is: with rows of 1,024 tokens a model hardly practises beginnings. The weights are kept in
float16 and computed with in float32. `--max-steps 20` tries it out on a CPU.
"""

import argparse
import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from reproduction.training import Hyperparameters

PACKAGED = Path(__file__).parents[1] / "src" / "hf_linear_attn" / "tiny_leap"
LARGEST = 5_000_000  # bytes of the whole folder
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def train_tiny(options: argparse.Namespace) -> None:
    """Train, evaluate, save the model with its tokenizer and a report that `hf-linear-attn card` reads."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.harness import machine
    from hf_linear_attn import LeapConfig, LeapForCausalLM
    from reproduction.corpora import load_text
    from reproduction.training import train

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text, facts = load_text(options.data)
    tokenizer = AutoTokenizer.from_pretrained(options.data.with_name(f"{options.data.stem}-tokenizer"))
    recipe = Hyperparameters(
        length=options.length,
        batch_size=16_384 // options.length,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        schedule="cosine",
        warmup=0.02,
        weight_decay=0.1,
        max_steps=options.max_steps,
        evaluations=20,
    )
    torch.manual_seed(options.seed)
    model = LeapForCausalLM(
        LeapConfig(
            vocab_size=text.vocab_size,
            hidden_size=128,
            num_hidden_layers=8,
            num_attention_heads=2,
            position_embedding_type=options.positions,
            max_position_embeddings=recipe.length,
            hidden_dropout_prob=options.dropout,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    tokenizer.save_pretrained(options.output)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)

    def save() -> None:
        """In half precision, to be computed with in single."""
        copy.deepcopy(model).half().save_pretrained(options.output)
        file = options.output / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")

    result = train(model, text, recipe, options.seed, device, on_evaluation=save)
    report = result | {
        "family": "leap",
        "text": facts["description"],
        "training_tokens": result["steps"] * recipe.batch_size * recipe.length,
        "curve": {
            kind: [{"step": point["step"], "loss": point[kind]} for point in result["curve"]]
            for kind in ("training", "validation")
        },
        "options": asdict(recipe) | {"dropout": options.dropout, "positions": options.positions, "seed": options.seed},
        "machine": machine(),
    }
    (options.output / "training_report.json").write_text(json.dumps(report, indent=1) + "\n")
    scores = ", ".join(f"{split} perplexity {result[split]['perplexity']:.1f}" for split in ("validation", "test"))
    print(f"{options.output}: {scores}")


def install(folder: Path) -> None:
    """Copy what loading needs, and the report, into the package; refuse what is too large for it."""
    files = [*FILES, "training_report.json"]
    size = sum((folder / name).stat().st_size for name in files)
    if size > LARGEST:
        raise SystemExit(f"{folder} has {size:,} bytes; the package takes {LARGEST:,}")
    PACKAGED.mkdir(exist_ok=True)
    for name in files:
        shutil.copyfile(folder / name, PACKAGED / name)
    config = json.loads((PACKAGED / "config.json").read_text())
    config.pop("auto_map", None)  # the code is in the package
    (PACKAGED / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{PACKAGED}: {size:,} bytes")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/tiny/speeches.npz"))
    parser.add_argument("--output", type=Path, default=Path("outputs/tiny/leap"))
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens a row; a step has 16,384 in all")
    parser.add_argument("--positions", choices=("rotary", "learned"), default="rotary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument("--max-steps", type=int, help="a shorter run")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="copy a trained folder into the package instead")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.install:
        install(given.install)
    else:
        train_tiny(given)
